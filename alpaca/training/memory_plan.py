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
from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from alpaca.common.errors import UserError
from alpaca.common.progress import short_number
from alpaca.weights.checkpoint import DTYPES
from alpaca.weights.lora import LoraConfig
from dataset import pack_rows, step_examples
from model import LOGITS_CHUNK, LlamaConfig

GIB = 2**30  # what makers of memory call a GB
MFU = 0.45  # the share of a chip's peak that is reached: an assumption


class Chip(NamedTuple):
    flops: float  # bf16 with fp32 accumulation, dense, a second
    memory: float  # bytes


CHIPS = {
    "A100 40GB": Chip(312e12, 40 * GIB),
    "A100 80GB": Chip(312e12, 80 * GIB),
    "H100 PCIe": Chip(756e12, 80 * GIB),
    "H100": Chip(989e12, 80 * GIB),
    "H200": Chip(989e12, 140 * GIB),
    "B200": Chip(2250e12, 180 * GIB),
    "L40S": Chip(362e12, 48 * GIB),
    "A10": Chip(125e12, 24 * GIB),
    "RTX 4090": Chip(165e12, 24 * GIB),
    "RTX 3090": Chip(71e12, 24 * GIB),
    "RTX 4070": Chip(58e12, 12 * GIB),
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
    lora: LoraConfig | None = None  # what is learned, if not all
    bits: int = 16  # of the frozen blocks' matrices

    @property
    def shards(self) -> int:
        return self.world // self.replicas


def projections(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The shapes (N, K) of a block's matrices."""
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {**attention, "o_proj": (width, query), **mlp}


def matrix_parameters(config: LlamaConfig) -> int:
    """Of a block."""
    return sum(N * K for N, K in projections(config).values())


def block_parameters(config: LlamaConfig) -> int:
    return matrix_parameters(config) + 2 * config.hidden_size  # two norms


def root_parameters(config: LlamaConfig) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


def parameters(config: LlamaConfig) -> int:
    return config.num_hidden_layers * block_parameters(config) + root_parameters(config)


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    shapes = projections(config)
    return config.num_hidden_layers * sum(lora.rank * sum(shapes[name]) for name in lora.targets)


def flops_per_token(
    config: LlamaConfig, length: float, supervised: float = 1.0, lora: LoraConfig | None = None
) -> float:
    """Useful operations a token, forward and backward, in documents of that mean length.

    A weight costs a multiplication and an addition in the forward pass and twice that backward.
    A token attends to half its document on average. Only supervised tokens reach the head; the
    embedding is a look-up. What checkpointing computes again is work, but not useful work. A
    frozen weight has no gradient, which saves the last two of its six operations."""
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    body = layers * matrix_parameters(config)
    head = config.vocab_size * config.hidden_size * supervised
    attention = layers * 2 * width * length / 2
    if lora is None:
        return 6 * (body + head + attention)
    return 4 * (body + head) + 6 * (adapter_parameters(config, lora) + attention)


def mean_length(lengths: np.ndarray) -> float:
    """Of the document that a token finds itself in: long ones hold more tokens."""
    return float((lengths.astype(float) ** 2).sum() / lengths.sum())


def hours(flops: float, chip: Chip, world: int) -> float:
    return flops / (chip.flops * world * MFU) / 3600


# ---------------------------------------------------------------- memory

# projections that read the same input
SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


def whole_block(run: Run) -> float:
    """Bytes a token that autograd keeps of one block, when nothing is recomputed."""
    config, size, shapes = run.config, run.compute.itemsize, projections(run.config)
    width, inner, query = config.hidden_size, config.intermediate_size, shapes["q_proj"][0]
    qkv_and_result = size * (2 * query + 2 * shapes["k_proj"][0])
    attention = qkv_and_result + 4 * config.num_attention_heads  # what its softmax divided by
    if not run.lora:
        norm = 4 * width + 2 * size * width  # fp32 copy, normalised, and times the weight
        joined = size * query  # documents' results as one row
        return 2 * norm + attention + joined + 4 * size * inner
    # frozen: no weight but A and B asks for its input
    if run.lora.dropout:  # each projection's own, and what was dropped
        inputs = (size + 1) * sum(shapes[name][1] for name in run.lora.targets)
    else:  # one for all that read it
        read = [names[0] for names in SIDE_BY_SIDE if {*names} & {*run.lora.targets}]
        inputs = size * sum(shapes[name][1] for name in read)
    adapter = inputs + size * run.lora.rank * len(run.lora.targets)
    return 2 * 4 * width + attention + 3 * size * inner + adapter


def kept(run: Run) -> float:
    """Bytes of one row's activations at the end of the forward pass."""
    config, size, width = run.config, run.compute.itemsize, run.config.hidden_size
    block = size * width
    if run.checkpointing == "none":
        block = whole_block(run)
    elif run.checkpointing == "selective":  # what matrices and attention make
        shapes = projections(config)
        results = sum(N for N, _ in shapes.values()) + shapes["q_proj"][0]
        block += size * results + 4 * config.num_attention_heads
        if run.lora:  # and A and B
            block += size * sum(run.lora.rank + shapes[name][0] for name in run.lora.targets)
    last = 4 * width + 2 * size * width + 2 * size * width * run.supervised  # norm; head's rows
    if run.lora:
        last = 4 * width + size * width * run.supervised
    return run.row_tokens * (config.num_hidden_layers * block + last)


def chunk_of_logits(run: Run) -> float:
    """Bytes, of logits and their fp32 copy."""
    rows = min(run.row_tokens * run.supervised, max(1, LOGITS_CHUNK // run.config.vocab_size))
    return rows * run.config.vocab_size * (run.compute.itemsize + 4)


BYTES = {8: 1.0, 4: 0.625}  # of a rounded weight, see quantize.py
DEQUANTIZED = {8: 8, 4: 12}  # of a weight on its way to fp32


def frozen_base(run: Run) -> tuple[float, float]:
    """Bytes of a base that is not learned: on a rank all the time, and to compute a block with."""
    config, size, layers = run.config, run.compute.itemsize, run.config.num_hidden_layers
    root, matrices = root_parameters(config), matrix_parameters(config)
    plain = block_parameters(config) - (matrices if run.bits < 16 else 0)  # in what it computes in
    held = size * (layers * plain + root) / run.shards
    gathered = size * (root + 2 * plain) if run.shards > 1 or run.offload else 0
    if run.bits < 16:
        held += layers * matrices * BYTES[run.bits]
        gathered += max(N * K for N, K in projections(config).values()) * DEQUANTIZED[run.bits]
    return held, gathered


def tides(run: Run) -> dict[str, dict[str, float]]:
    """Bytes of a rank by what they are for, at each of the moments that could be the highest."""
    config, size = run.config, run.compute.itemsize
    if run.lora:
        learned, (held, gathered) = adapter_parameters(config, run.lora), frozen_base(run)
        block, table = learned / config.num_hidden_layers, 0  # the head has no gradient
        passing = 3 * size * config.intermediate_size  # gradients of the MLP's, on their way
    else:
        learned, held, gathered = parameters(config), 0, size * root_parameters(config)
        block, table = block_parameters(config), config.vocab_size * config.hidden_size
        passing = 0
    shard = learned / run.shards
    always = {"weights": held + 4 * shard, "optimizer": 8 * shard}
    early = {**always, "gradients": 4 * shard * (run.rows > 1 or run.lora is not None)}
    gathered += size * 2 * block
    moments = {
        "forward": {
            **early,
            "activations": kept(run),
            "gathered": gathered,
            "loss": chunk_of_logits(run) + table * (4 + size),
        }
    }
    if run.checkpointing != "none":
        moments["recompute"] = {
            **early,
            "activations": kept(run) + run.row_tokens * (whole_block(run) + passing),
            "gathered": gathered + (size + 4) * block,
            "loss": size * table,
        }
    if run.lora is None:  # an adapter's gradients are too few to make a moment of their own
        whole = (2 * size + 4) * root_parameters(config)
        moments["reduce"] = {**always, "gradients": 4 * shard, "gathered": whole}
    return moments


HOST = ("weights", "gradients", "optimizer")  # what --offload keeps in host memory


def peak(run: Run) -> float:
    """Bytes of a rank's device at the highest moment."""
    aside = HOST if run.offload else ()
    return max(sum(n for k, n in parts.items() if k not in aside) for parts in tides(run).values())


def remedies(run: Run, limit: float) -> list[str]:
    """Changes after which it fits, the cheapest first."""
    full, rows = replace(run, checkpointing="full"), run.row_tokens // 2
    modes = ("selective", "full")
    found = {f"--checkpointing {mode}": replace(run, checkpointing=mode) for mode in modes}
    if run.lora and run.bits > 4:
        found["--checkpointing full --bits 4"] = replace(full, bits=4)
    found[f"--checkpointing full --row-tokens {rows}"] = replace(full, row_tokens=rows)
    if run.bits == 16:
        found["--checkpointing full --offload (slow)"] = replace(full, offload=True)
    fitting = [change for change, changed in found.items() if peak(changed) <= limit]
    for world in (2, 4, 8, 16, 32, 64, 128):
        if world > run.world and peak(replace(full, world=world, replicas=1)) <= limit:
            return [*fitting, f"--checkpointing full on {world} GPUs"]
    return fitting


def planned(args: Namespace, job: Any) -> str:
    """What the trainer's run would take on `--gpus` of the chip, by the rows it would have."""
    if args.gpus % args.replicas:
        raise UserError(f"--replicas {args.replicas} does not divide the {args.gpus} --gpus")
    lengths, supervised = job.train.lengths, job.train.supervised
    longest = rows = tokens = 0
    for step in range(job.steps):
        which = step_examples(len(job.train), args.batch_size, args.epochs, args.seed, step)
        ranks = pack_rows(lengths[which], args.gpus, args.row_tokens)
        longest = max(longest, *(int(lengths[which[row]].sum()) for mine in ranks for row in mine))
        rows, tokens = max(rows, len(ranks[0])), tokens + int(lengths[which].sum())
    share = supervised.sum() / lengths.sum()
    how = args.checkpointing, DTYPES[args.dtype], args.offload, rows, args.lora, args.bits or 16
    run = Run(job.config, args.gpus, args.replicas, longest, share, *how)
    chip = CHIPS.get(args.chip)
    if chip is None and torch.cuda.is_available():
        chip = find_chip(torch.cuda.get_device_name())
    return report(run, tokens, job.steps, mean_length(lengths), chip)


def report(run: Run, tokens: int, steps: int, length: float, chip: Chip | None) -> str:
    """What `--plan` prints."""
    config, moments = run.config, tides(run)
    names = [name for name, known in CHIPS.items() if known == chip]
    limit, where = (chip.memory, names[0]) if chip else (memory_here(), "this machine")
    dtype = str(run.compute).removeprefix("torch.")
    copies = f" as {run.replicas} whole copies" if run.replicas > 1 else ""
    what = f"{short_number(parameters(config))} parameters on {run.world} x {where}{copies}"
    if run.lora:
        learned = short_number(adapter_parameters(config, run.lora))
        base = f"int{run.bits}" if run.bits < 16 else dtype
        what = f"an adapter of {learned} parameters, beside {base} of {what}"
    how = f"{dtype}, checkpointing {run.checkpointing}, rows of up to {run.row_tokens} tokens"
    lines = [f"{what}, {how}", "", f"{'GiB a rank':<12}" + "".join(f"{m:>10}" for m in moments)]
    for part in ("weights", "optimizer", "gradients", "gathered", "activations", "loss"):
        row = "".join(f"{parts.get(part, 0) / GIB:10.2f}" for parts in moments.values())
        host = "  in host memory" if run.offload and part in HOST else ""
        lines.append(f"{part:<12}{row}{host}")
    lines.append(f"at most {peak(run) / GIB:.1f} GiB of {limit / GIB:.0f} GiB")
    lines += ["", f"{steps} steps of {tokens / steps:,.0f} tokens, {tokens / 1e6:.1f}M in all"]
    flops = flops_per_token(config, length, run.supervised, run.lora) * tokens
    if chip:
        time, speed = hours(flops, chip, run.world), run.world * chip.flops / 1e12
        lines.append(
            f"{flops:.2e} useful operations: {time:.2f} hours if {MFU:.0%} "
            f"of the chips' {speed:,.0f} TFLOP/s is reached (an assumption)"
        )
    if peak(run) <= 0.95 * limit:
        return "\n".join([*lines, "It fits."])
    changes = remedies(run, 0.95 * limit)
    told = "; or ".join(changes) if changes else "a smaller model, or chips with more memory"
    return "\n".join([*lines, f"It does not fit. What would: {told}."])


def memory_here() -> int:
    if torch.cuda.is_available():  # a chip that is not in the table
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
