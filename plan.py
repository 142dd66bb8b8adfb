"""Where the memory and the hours go, before they are spent.

    python fsdp_train.py --model-dir llama-7b --data alpaca_data.json --plan --gpus 8 --chip H100

Weights, gradients and Adam's two moments are 16 bytes a parameter in fp32, divided among the ranks.
Beside them a step has its tides, and the highest decides:

    forward      activations have risen layer by layer, and the loss holds a chunk of logits
    recompute    a block under checkpointing is computed again on top of what was kept
    reduce       activations are gone, but the embedding's and the head's gradients, the largest,
                 are there whole, and once more in fp32 on their way to the other ranks

With an adapter (lora.py) the 16 bytes are for its few parameters; the base is held in what it
computes in, or as integers, whole on every rank, of which one matrix at a time is dequantized.

What is kept between forward and backward pass is the choice `--checkpointing` makes: everything
(none), a block's input and the results of matrix products (selective), a block's input (full).

Counted are the tensors that model.py and FSDP make in eager mode, held to 10 % by
tests/test_plan.py; compiled blocks keep fewer, and an allocator adds some of its own. Arithmetic is
simpler: six operations a weight and token, recomputation not counted.

Kaplan et al. arXiv:2001.08361; Korthikanti et al., on activations, 2205.05198.

Shown by tests/test_plan.py: test_a_real_step_takes_the_memory_planned.
"""

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

import console
from adapter import Lora
from loss import CHUNK
from model import LlamaConfig

GB = 1e9


class Chip(NamedTuple):
    flops: float  # bf16 with fp32 accumulation, dense, a second
    memory: float  # bytes


CHIPS = {
    "A100 40GB": Chip(312e12, 40 * 2**30),
    "A100 80GB": Chip(312e12, 80 * 2**30),
    "H100 PCIe": Chip(756e12, 80 * 2**30),
    "H100": Chip(989e12, 80 * 2**30),
    "H200": Chip(989e12, 141 * GB),
    "B200": Chip(2250e12, 180 * 2**30),
    "L40S": Chip(362e12, 48 * 2**30),
    "A10": Chip(125e12, 24 * 2**30),
    "RTX 4090": Chip(165e12, 24 * 2**30),
    "RTX 3090": Chip(71e12, 24 * 2**30),
    "RTX 4070": Chip(58e12, 12 * 2**30),
}


def find_chip(device_name: str) -> Chip | None:
    """The chip that torch.cuda.get_device_name() speaks of: "NVIDIA A100-SXM4-80GB"."""
    words = device_name.replace("-", " ").split()
    known = [name for name in CHIPS if all(word in words for word in name.split())]
    return CHIPS[max(known, key=len)] if known else None


@dataclass
class Run:
    config: LlamaConfig
    world: int  # ranks
    replicas: int
    row_tokens: int  # of the longest packed row
    supervised: float  # share of tokens the head computes
    checkpointing: str
    compute: torch.dtype
    offload: bool = False
    rows: int = 1  # of a rank in a step: from the second on there are gradients all the time
    lora: Lora | None = None  # what is learned, if not all
    bits: int = 16  # of the frozen blocks' matrices

    @property
    def shards(self) -> int:
        return self.world // self.replicas


def block_parameters(config: LlamaConfig) -> int:
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * width * heads * config.head_dim
    return attention + 3 * width * config.intermediate_size + 2 * width


def root_parameters(config: LlamaConfig) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


def parameters(config: LlamaConfig) -> int:
    return config.num_hidden_layers * block_parameters(config) + root_parameters(config)


def projections(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The shapes (N, K) of a block's matrices."""
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {**attention, "o_proj": (width, query), **mlp}


def block_adapter_parameters(config: LlamaConfig, lora: Lora) -> int:
    """Of a block."""
    shapes = projections(config)
    return sum(lora.rank * sum(shapes[name]) for name in lora.targets)


def flops_per_token(
    config: LlamaConfig, length: float, supervised: float = 1.0, lora: Lora | None = None
) -> float:
    """Useful operations a token, forward and backward, in documents of that mean length.

    A weight costs a multiplication and an addition in the forward pass and twice that backward.
    A token attends to half its document on average. Only supervised tokens reach the head; the
    embedding is a look-up. What checkpointing computes again is work, but not useful work. A
    frozen weight has no gradient, which saves the last two of its six operations."""
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    body = layers * (block_parameters(config) - 2 * config.hidden_size)
    head = config.vocab_size * config.hidden_size * supervised
    attention = layers * 2 * width * length / 2
    if lora is None:
        return 6 * (body + head + attention)
    return 4 * (body + head) + 6 * (layers * block_adapter_parameters(config, lora) + attention)


def mean_length(lengths: np.ndarray) -> float:
    """Of the document that a token finds itself in: long ones hold more tokens."""
    return float((lengths.astype(float) ** 2).sum() / lengths.sum())


def hours(flops: float, chip: Chip, world: int, mfu: float) -> float:
    return flops / (chip.flops * world * mfu) / 3600


# ---------------------------------------------------------------- memory


def block_activations(config: LlamaConfig, size: int) -> dict[str, float]:
    """Bytes a token that autograd keeps of one block, when nothing is recomputed; `size` is a
    value's, 2 in bf16."""
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    norm = 4 * width + 2 * size * width  # fp32 copy, normalised, and times the weight
    return {
        "norms": 2 * norm,
        "attention": size * (query + 2 * key) + size * query + 4 * config.num_attention_heads,
        "joined": size * query,  # documents' results as one row
        "mlp": 4 * size * inner,
    }


def frozen_block_activations(config: LlamaConfig, size: int, lora: Lora) -> dict[str, float]:
    """The same of a frozen block with an adapter: no weight but A and B asks for its input."""
    shapes, parts = projections(config), block_activations(config, size)
    inputs = {name: shapes[name][1] for name in lora.targets}
    if lora.dropout:  # each projection's own, and what was dropped
        dropped = sum((size + 1) * width for width in inputs.values())
    else:  # one for all that read it
        sides = {"q": 0, "k": 0, "v": 0, "o": 1, "g": 2, "u": 2, "d": 3}
        dropped = sum({sides[name[0]]: size * width for name, width in inputs.items()}.values())
    return {
        "norms": 2 * 4 * config.hidden_size,
        "attention": parts["attention"],
        "mlp": 3 * size * config.intermediate_size,
        "adapter": dropped + size * lora.rank * len(inputs),
    }


def kept(run: Run) -> float:
    """Bytes of one row's activations at the end of the forward pass."""
    config, size = run.config, run.compute.itemsize
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    block = size * width
    if run.checkpointing == "none":
        block = sum(whole_block(run).values())
    elif run.checkpointing == "selective":  # q, k, v, o, gate, up, down, and attention's result
        block += size * (query + 2 * key + width + 2 * inner + width + query)
        block += 4 * config.num_attention_heads
        if run.lora:  # what A and B make
            shapes = projections(config)
            block += size * sum(run.lora.rank + shapes[name][0] for name in run.lora.targets)
    last = 4 * width + 2 * size * width + 2 * size * width * run.supervised  # norm; head's rows
    if run.lora:
        last = 4 * width + size * width * run.supervised
    return run.row_tokens * (config.num_hidden_layers * block + last)


def whole_block(run: Run) -> dict[str, float]:
    if run.lora:
        return frozen_block_activations(run.config, run.compute.itemsize, run.lora)
    return block_activations(run.config, run.compute.itemsize)


def tides(run: Run) -> dict[str, dict[str, float]]:
    """Bytes of a rank by what they are for, at each of the moments that could be the highest."""
    if run.lora:
        return frozen_tides(run)
    config, size, shard = run.config, run.compute.itemsize, parameters(run.config) / run.shards
    block, root = block_parameters(config), root_parameters(config)
    table = config.vocab_size * config.hidden_size
    rows = min(run.row_tokens * run.supervised, max(1, CHUNK // config.vocab_size))
    always = {"weights": 4 * shard, "optimizer": 8 * shard}
    early = {**always, "gradients": 4 * shard * (run.rows > 1)}
    moments = {
        "forward": {
            **early,
            "activations": kept(run),
            "gathered": size * (root + 2 * block),
            "loss": rows * config.vocab_size * (size + 4) + table * (4 + size),
        }
    }
    if run.checkpointing != "none":
        again = run.row_tokens * sum(whole_block(run).values())
        moments["recompute"] = {
            **early,
            "activations": kept(run) + again,
            "gathered": size * (root + 2 * block) + (size + 4) * block,
            "loss": size * table,
        }
    full = {**always, "gradients": 4 * shard}
    return {**moments, "reduce": {**full, "gathered": (2 * size + 4) * root}}


def frozen_tides(run: Run) -> dict[str, dict[str, float]]:
    """The same with an adapter, whose gradients are too few to make a moment of their own."""
    config, size, layers = run.config, run.compute.itemsize, run.config.num_hidden_layers
    matrices = sum(N * K for N, K in projections(config).values())
    adapter, root = block_adapter_parameters(config, run.lora), root_parameters(config)
    plain = block_parameters(config) - (matrices if run.bits < 16 else 0)  # in what it computes in
    weights = (size * (layers * plain + root) + 4 * layers * adapter) / run.shards
    gathered = size * 2 * adapter
    if run.shards > 1 or run.offload:
        gathered += size * (root + 2 * plain)
    if run.bits < 16:
        weights += layers * matrices * BYTES[run.bits]
        gathered += max(N * K for N, K in projections(config).values()) * DEQUANTIZED[run.bits]
    learned = layers * adapter / run.shards
    always = {"weights": weights, "optimizer": 8 * learned, "gradients": 4 * learned}
    rows = min(run.row_tokens * run.supervised, max(1, CHUNK // config.vocab_size))
    loss = rows * config.vocab_size * (size + 4)
    forward = {"activations": kept(run), "gathered": gathered, "loss": loss}
    moments = {"forward": {**always, **forward}}
    if run.checkpointing != "none":
        passing = 3 * size * config.intermediate_size  # gradients of the MLP's, on their way
        again = run.row_tokens * (sum(whole_block(run).values()) + passing)
        recompute = {"activations": kept(run) + again, "gathered": gathered + (size + 4) * adapter}
        moments["recompute"] = {**always, **recompute}
    return moments


BYTES = {8: 1.0, 4: 0.625}  # of a rounded weight, see quantize.py
DEQUANTIZED = {8: 8, 4: 12}  # of a weight on its way to fp32
HOST = ("weights", "gradients", "optimizer")  # what --offload keeps in host memory


def peak(run: Run) -> float:
    """Bytes of a rank's device at the highest moment."""
    aside = HOST if run.offload else ()
    return max(sum(n for k, n in parts.items() if k not in aside) for parts in tides(run).values())


def remedies(run: Run, limit: float) -> list[str]:
    """Changes after which it fits, the cheapest first."""
    found = []
    for mode in ("selective", "full"):
        if run.checkpointing == "none" or (run.checkpointing, mode) == ("selective", "full"):
            found.append((f"--checkpointing {mode}", replace(run, checkpointing=mode)))
    full, rows = replace(run, checkpointing="full"), run.row_tokens // 2
    if run.lora and run.bits > 4:
        found.append(("--checkpointing full --bits 4", replace(full, bits=4)))
    found.append(
        (f"--checkpointing full --row-tokens {rows}", replace(full, row_tokens=rows)),
    )
    for world in (2, 4, 8, 16, 32, 64, 128):
        if world > run.world:
            found.append((f"{world} GPUs", replace(full, world=world, replicas=1)))
    if run.bits == 16:
        found.append(("--checkpointing full --offload (slow)", replace(full, offload=True)))
    fitting = [change for change, changed in found if peak(changed) <= limit]
    return [change for change in fitting if not change.endswith("GPUs")] + [
        change for change in fitting if change.endswith("GPUs")
    ][:1]


def report(
    run: Run, tokens: int, steps: int, length: float, chip: Chip | None, mfu: float = 0.45
) -> str:
    """What `--plan` prints."""
    config = run.config
    names = [name for name, known in CHIPS.items() if known == chip]
    limit, where = (chip.memory, names[0]) if chip else (host_memory(), "this machine")
    moments, dtype = tides(run), str(run.compute).removeprefix("torch.")
    copies = f" as {run.replicas} whole copies" if run.replicas > 1 else ""
    what = f"{console.human(parameters(config))} parameters on {run.world} x {where}{copies}"
    if run.lora:
        learned = config.num_hidden_layers * block_adapter_parameters(config, run.lora)
        base = f"int{run.bits}" if run.bits < 16 else str(run.compute).removeprefix("torch.")
        what = f"an adapter of {console.human(learned)} parameters, beside {base} of {what}"
    how = f"{dtype}, checkpointing {run.checkpointing}, rows of up to {run.row_tokens} tokens"
    lines = [
        f"{what}, {how}",
        "",
        f"{'GB a rank':<12}" + "".join(f"{moment:>10}" for moment in moments),
    ]
    for part in ("weights", "optimizer", "gradients", "gathered", "activations", "loss"):
        row = "".join(f"{parts.get(part, 0) / GB:10.2f}" for parts in moments.values())
        host = "  in host memory" if run.offload and part in HOST else ""
        lines.append(f"{part:<12}{row}{host}")
    lines.append(f"at most {peak(run) / GB:.1f} GB of {limit / GB:.0f} GB")
    lines += ["", f"{steps} steps of {tokens / steps:,.0f} tokens, {tokens / 1e6:.1f}M in all"]
    flops = flops_per_token(config, length, run.supervised, run.lora) * tokens
    if chip:
        time = hours(flops, chip, run.world, mfu)
        lines.append(
            f"{flops:.2e} useful operations: {time:.2f} hours if {mfu:.0%} of the chips' "
            f"{run.world * chip.flops / 1e12:,.0f} TFLOP/s is reached (an assumption)"
        )
    if peak(run) <= 0.95 * limit:
        return "\n".join([*lines, "It fits."])
    changes = remedies(run, 0.95 * limit)
    told = "; or ".join(changes) if changes else "a smaller model, or chips with more memory"
    return "\n".join([*lines, f"It does not fit. What would: {told}."])


def host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
