"""The speed of training: operations per token, peaks of GPUs, and the share of a peak reached.

A weight costs a multiplication and an addition in the forward pass, twice that in the backward
pass: six per weight and token (arXiv:2001.08361). The model FLOPs utilization (MFU, 2204.02311) is
the useful operations of a step divided by what the GPUs could have computed in its time. What
activation checkpointing computes again is work, but not useful work.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from alpaca.common.system import host_memory, peak_host_memory
from alpaca.weights.lora import LoraConfig
from model import LlamaConfig

GIB = 2**30


class Chip(NamedTuple):
    flops: float  # a second: bf16 with fp32 accumulation, dense
    memory: float  # bytes; less than the name says where error correction takes a part
    bandwidth: float  # of the memory, bytes a second
    link: float  # to the other GPUs: NVLink or PCIe, one direction, bytes a second


CHIPS = {
    "A100 40GB": Chip(312e12, 40 * GIB, 1.56e12, 300e9),
    "A100 80GB": Chip(312e12, 80 * GIB, 2.04e12, 300e9),
    "H100 PCIe": Chip(756e12, 80 * GIB, 2.0e12, 64e9),
    "H100": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "H200": Chip(989e12, 140 * GIB, 4.8e12, 450e9),
    "B200": Chip(2250e12, 180 * GIB, 8.0e12, 900e9),
    "L40S": Chip(362e12, 44 * GIB, 0.86e12, 32e9),
    "A10": Chip(125e12, 22 * GIB, 0.6e12, 32e9),
    "RTX 4090": Chip(165e12, 24 * GIB, 1.01e12, 32e9),
    "RTX 3090": Chip(71e12, 24 * GIB, 0.94e12, 32e9),
    "RTX 4070": Chip(58e12, 12 * GIB, 0.5e12, 32e9),
}
# Assumed by estimated_seconds: no GPU has confirmed them yet.
COMPUTED = 0.58  # of a GPU's peak, while a row is computed
MOVED = 0.8  # of the bandwidth of memory and links
HIDDEN = 0.5  # of the computing time, during which traffic costs nothing


def find_chip(device_name: str) -> str | None:
    """The entry of CHIPS for torch.cuda.get_device_name(), such as "NVIDIA A100-SXM4-80GB"."""
    words = device_name.replace("-", " ").split()
    matches = [name for name in CHIPS if all(word in words for word in name.split())]
    return max(matches, key=len) if matches else None


def find_device(chip: str | None) -> tuple[str | None, float]:
    """The name, if it is in the table, and the memory: a chip's, or else this machine's."""
    if chip:
        return chip, CHIPS[chip].memory
    if torch.cuda.is_available():  # has less than its name says: 79.2 GiB of an H100's 80
        chip = find_chip(torch.cuda.get_device_name())
        return chip, torch.cuda.get_device_properties(0).total_memory
    return None, host_memory()


# ---------------------------------------------------------------- parameters and operations


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The shapes (N, K) of a block's matrices."""
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {**attention, "o_proj": (width, query), **mlp}


def matrix_parameters(config: LlamaConfig) -> int:
    """Of one block."""
    return sum(N * K for N, K in projection_shapes(config).values())


def block_parameters(config: LlamaConfig) -> int:
    return matrix_parameters(config) + 2 * config.hidden_size  # two norms


def root_parameters(config: LlamaConfig) -> int:
    """Parameters outside the blocks: embedding, last norm, head."""
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


def model_parameters(config: LlamaConfig) -> int:
    return config.num_hidden_layers * block_parameters(config) + root_parameters(config)


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    shapes = projection_shapes(config)
    return config.num_hidden_layers * sum(lora.rank * sum(shapes[name]) for name in lora.targets)


def trained_count(config: LlamaConfig, lora: LoraConfig | None) -> int:
    """All of them, or an adapter's."""
    return adapter_parameters(config, lora) if lora else model_parameters(config)


def flops_per_token(
    config: LlamaConfig, length: float, supervised: float = 1.0, lora: LoraConfig | None = None
) -> float:
    """Useful operations per token, forward and backward, in documents of this mean length.

    A token attends to half its document on average. Only supervised tokens reach the head; the
    embedding is a look-up. A frozen weight has no gradient, which saves two of six operations."""
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    body = layers * matrix_parameters(config)
    head = config.vocab_size * config.hidden_size * supervised
    attention = layers * 2 * width * length / 2
    if lora is None:
        return 6 * (body + head + attention)
    return 4 * (body + head) + 6 * (adapter_parameters(config, lora) + attention)


def mean_length(lengths: np.ndarray) -> float:
    """The mean over tokens of the length of their document: long documents hold more tokens."""
    return float((lengths.astype(float) ** 2).sum() / lengths.sum())


def estimated_seconds(work: Any, chip: Chip) -> float:
    """The estimated time of a step of a Workload (memory_plan.py): computing; copies of weights and
    gradients on the GPU; traffic between GPUs, as far as it outlasts half of the computing.

    A GPU casts and copies what it gathers and reduces, which costs more where fewer share the work.
    AdamW and clipping move 40 bytes a parameter."""
    config, size, shards = work.config, work.itemsize, work.shards
    flops = flops_per_token(work.model, work.length, work.supervised, config.lora)
    if config.checkpointing == "full":  # the forward pass again: 2 operations to 6, or LoRA's 4
        flops *= 3 / 2 if config.lora else 4 / 3
    compute = flops * work.tokens / work.steps / config.gpus / (COMPUTED * chip.flops)
    gathered, trained = model_parameters(work.model), trained_count(work.model, config.lora)
    if config.lora:  # a base in integers, or on one rank, is whole already
        gathered *= shards > 1 and config.bits == 16
    gathered *= work.rows * (1 if config.stays_gathered else 2)
    reduced = trained * work.rows
    copied = gathered * (2 * size + (size + 4) / shards) + reduced * (size + 4 + 12 / shards)
    sent = (size * gathered + 4 * reduced) * (1 - 1 / shards)
    sent += 8 * trained / shards * work.rows * (config.replicas > 1)
    exposed = max(0, sent / (MOVED * chip.link) - HIDDEN * compute)
    return compute + (copied + 40 * trained / shards) / (MOVED * chip.bandwidth) + exposed


# ---------------------------------------------------------------- a run's figures


class Throughput:
    """Measures each step from the end of the one before."""

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None, device: torch.device):
        self.config, self.lora, self.device = config, lora, device
        name = find_chip(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self.peak_flops = CHIPS[name].flops * dist.get_world_size() if name else None
        self.restart()

    def restart(self) -> None:
        """What came before belongs to no step."""
        self.last = time.perf_counter()

    def step(self, lengths: np.ndarray, supervised: int) -> dict[str, float]:
        """The figures of a step, over all ranks, by the lengths of its examples."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        tokens = int(lengths.sum())
        figures: dict[str, float] = {"tokens": tokens, "tokens_per_s": round(tokens / seconds)}
        figures["supervised_per_s"] = round(supervised / seconds)
        figures["memory_GiB"] = peak_memory(self.device) / GIB
        if self.peak_flops:
            share = supervised / tokens
            flops = flops_per_token(self.config, mean_length(lengths), share, self.lora) * tokens
            figures["mfu"] = flops / seconds / self.peak_flops
        return figures


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used: on its GPU, or else in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_host_memory()
