"""Estimates the memory and the hours of a run before it starts.

    python fsdp_train.py --model-dir llama-7b --data alpaca_data.json --plan --gpus 8 --chip H100

Weights, gradients and Adam's two moments are 16 bytes a parameter in fp32, divided among the ranks.
With LoRA they are the adapter's; the frozen base is in the dtype that blocks compute in, or in
integers, whole on every rank and dequantized one matrix at a time. The phases that can need most:

    gather       embedding and head are gathered, once in the buffer that was received and once as
                 parameters, when the first block is received
    forward      at its end: what all blocks store, and the gradient of the head
    block N      N blocks are left in the backward pass. This one is recomputed, and its gradients
                 are not sharded yet. Those of the block before it are being reduced in fp32, and
                 the weights of the next one are already gathered
    embedding    nearly all gradients are sharded; those of embedding and head are not yet
    root         these two are being reduced

The fewer blocks are left, the fewer activations and the more gradients there are, so the worst N is
the first or the last. The estimate counts the tensors of model.py and FSDP in eager mode, and
agrees with bench/simulate.py within 3 %; compiled blocks need less. Activations: arXiv:2205.05198.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from alpaca.common.progress import short_number
from alpaca.training import throughput as counts
from alpaca.training.config import PAIRWISE, TrainConfig
from alpaca.training.throughput import CHIPS, GIB, find_device
from alpaca.weights.checkpoint import DTYPES
from dataset import Examples, pack_rows, shuffle_epoch, step_examples
from model import CUDA_LOGITS_CHUNK, LOGITS_CHUNK, LlamaConfig

MARGIN = 1.5 * GIB, 0.04  # of CUDA, cuBLAS and NCCL; the allocator's share of the peak
ROW_TOKENS = 4096  # the default without a GPU
PACKED = 2**27  # bounds the steps that are packed to find the longest row: about a second
SLOTS = 32  # answers that --objective group decodes together
IN_HOST_MEMORY = ("weights", "moments", "gradients")  # with --offload
INTEGER_BYTES = {8: 1.0, 4: 0.625}  # of a quantized weight, see quantized_linear.py
DEQUANTIZED_BYTES = {8: 8, 4: 12}  # of a weight on its way to fp32
SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Workload:
    """What memory and time depend on."""

    config: TrainConfig
    model: LlamaConfig
    row_tokens: int  # of the longest packed row
    supervised: float  # share of the tokens
    rows: int = 1  # of a rank in a step: from the second on, gradients are there in every phase
    steps: int = 1
    tokens: int = 1  # of all steps
    length: float = 0  # mean over tokens of the length of their document

    @property
    def shards(self) -> int:
        return self.config.gpus // self.config.replicas

    @property
    def logits_chunk(self) -> int:
        return CUDA_LOGITS_CHUNK if is_for_gpu(self.config) else LOGITS_CHUNK

    @property
    def itemsize(self) -> int:
        return DTYPES[self.config.dtype].itemsize


def is_for_gpu(config: TrainConfig) -> bool:
    return bool(config.chip) or (config.device != "cpu" and torch.cuda.is_available())


def block_activations(work: Workload) -> float:
    """Bytes a token that autograd stores in one block, if nothing is recomputed."""
    config, size, shapes = work.model, work.itemsize, counts.projection_shapes(work.model)
    width, inner, query = config.hidden_size, config.intermediate_size, shapes["q_proj"][0]
    qkv_and_result = size * (2 * query + 2 * shapes["k_proj"][0])
    attention = qkv_and_result + 4 * config.num_attention_heads  # the softmax's log-sum-exp
    lora = work.config.lora
    if not lora:
        norm = 4 * width + 2 * size * width  # fp32 copy, normalized, and times the weight
        flash = is_for_gpu(work.config) and size == 2
        joined = 0 if flash else size * query  # documents' results as one row
        return 2 * norm + attention + joined + 4 * size * inner
    # a frozen weight does not need its input: only A and B do
    if lora.dropout:  # each projection's own input, and its mask
        inputs = (size + 1) * sum(shapes[name][1] for name in lora.targets)
    else:
        read = [names[0] for names in SAME_INPUT if {*names} & {*lora.targets}]
        inputs = size * sum(shapes[name][1] for name in read)
    adapter = inputs + size * lora.rank * len(lora.targets)
    return 2 * 4 * width + attention + 3 * size * inner + adapter


def block_stored(work: Workload) -> float:
    """Bytes a token that a block stores until its backward pass."""
    config, size, lora = work.model, work.itemsize, work.config.lora
    block = size * config.hidden_size  # its input
    if work.config.checkpointing == "none":
        return block_activations(work)
    if work.config.checkpointing == "selective":  # results of matrix products and attention
        shapes = counts.projection_shapes(config)
        results = sum(N for N, _ in shapes.values()) + shapes["q_proj"][0]
        block += size * results + 4 * config.num_attention_heads
        if lora:
            block += size * sum(lora.rank + shapes[name][0] for name in lora.targets)
    return block


def activations(work: Workload) -> float:
    """Bytes that autograd stores of one row, at the end of the forward pass."""
    size, width = work.itemsize, work.model.hidden_size
    last = 4 * width + 2 * size * width + 2 * size * width * work.supervised  # norm; head's input
    if work.config.lora:
        last = 4 * width + size * width * work.supervised
    return work.row_tokens * (work.model.num_hidden_layers * block_stored(work) + last)


def dequantized(work: Workload) -> float:
    """Bytes of an integer matrix on its way to the dtype that blocks compute in."""
    shapes = counts.projection_shapes(work.model).values()
    return max(N * K for N, K in shapes) * DEQUANTIZED_BYTES.get(work.config.bits, 0)


def block_backward(work: Workload) -> tuple[float, float]:
    """Bytes of activations and of whole gradients at the worst moment of a block's backward pass,
    its activations computed again: in its MLP, in the norm before the MLP, or at its end."""
    config, size, T, stored = work.model, work.itemsize, work.row_tokens, block_activations(work)
    width, inner = config.hidden_size, size * config.intermediate_size  # inner: bytes a token
    if work.config.lora:  # the adapter's gradients are small, but a matrix may be dequantized
        stored += 2 * size * width  # gradients of the residual stream
        return T * stored + max(3 * T * inner, dequantized(work)), 0
    mlp = T * (stored + 3 * inner), width * inner
    norm = T * (stored - 4 * inner + 16 * width), 3 * width * inner
    end = T * 24 * width, size * counts.block_parameters(config)
    return max(mlp, norm, end, key=sum)


def frozen_base(work: Workload) -> tuple[float, float, float]:
    """Bytes of an adapter's base: those a rank always has, those gathered of a block, and those
    gathered outside the blocks."""
    config, size, bits = work.model, work.itemsize, work.config.bits
    layers, root = config.num_hidden_layers, counts.root_parameters(config)
    matrices = counts.matrix_parameters(config)
    plain = counts.block_parameters(config) - (matrices if bits < 16 else 0)  # not quantized
    always = size * (layers * plain + root) / work.shards
    if bits < 16:
        always += layers * matrices * INTEGER_BYTES[bits]
    sharded = work.shards > 1 or work.config.offload
    return always, size * plain * sharded, size * root * sharded


def sampler_bytes(work: Workload) -> float:
    """Bytes of the whole copy that --objective group draws answers with, and of its cache."""
    config, model = work.config, work.model
    if config.objective != "group":
        return 0
    copy = work.itemsize * counts.model_parameters(model)
    if config.lora:
        alone = replace(work, config=replace(config, gpus=1, replicas=1))
        copy = frozen_base(alone)[0] + 4 * counts.adapter_parameters(model, config.lora)
    width = model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    size = work.itemsize if is_for_gpu(config) else 4
    return copy + 2 * size * width * SLOTS * config.max_length


def memory_by_phase(work: Workload) -> dict[str, dict[str, float]]:
    """Bytes of a rank by category, in each phase of a step that can need most."""
    config, size, lora = work.model, work.itemsize, work.config.lora
    layers, root = config.num_hidden_layers, counts.root_parameters(config)
    if lora:
        trained, (base, block, whole) = counts.adapter_parameters(config, lora), frozen_base(work)
        reduced, root, table = 4 * trained / layers, 0, 0  # the head has no gradient
        block += size * trained / layers
    else:
        trained, base, whole = counts.model_parameters(config), 0, size * root
        reduced, table = 4 * counts.block_parameters(config), config.vocab_size * config.hidden_size
        block = size * counts.block_parameters(config)
    shard = trained / work.shards
    always = {"weights": base + 4 * shard, "moments": 8 * shard, "sampler": sampler_bytes(work)}
    earlier = 4 * shard * (work.rows > 1)  # gradients of the rows before
    waiting = work.rows > 1 and work.config.replicas > 1  # replicas' sums are added at the end
    ahead = block * (work.shards > 1)  # the next block, or the buffer that the last one came in
    received = (whole + block) * (work.shards > 1)
    staying = block if work.config.stays_gathered else 0  # of every block since its forward pass
    in_chunk = min(
        work.row_tokens * work.supervised, max(1, work.logits_chunk // config.vocab_size)
    )
    logits, embedding = in_chunk * config.vocab_size, size * table
    if work.config.objective == "reward":  # its head is one row
        logits = table = 0
    cast = size * table  # the head's gradient, which is summed in fp32
    # for a moment, logits are there as multiplied, in fp32, and normalized
    head = 4 * table + logits * (size + 4) + max(cast, 4 * logits * (size < 4))
    phases = {
        "gather": {
            "gradients": earlier,
            "gathered": whole + received,
            "temporary": received / work.shards,  # what this rank sends
        },
        "forward": {
            "gradients": earlier,
            "activations": activations(work),
            "gathered": whole + layers * staying + ahead,
            "temporary": max(head, dequantized(work)),
        },
    }
    stored, (computed, gradients) = work.row_tokens * block_stored(work), block_backward(work)
    for left in {layers, max(1, layers - 1), min(2, layers), 1}:  # blocks to go backward through
        done = (layers - left) * reduced / work.shards
        phases[f"block {left}"] = {
            "gradients": max(earlier, done) + waiting * done,
            "activations": (left - 1) * stored + computed,
            "gathered": whole + (left * staying or block) + ahead * (left > 1),
            "reduced": reduced * (left < layers),  # gradients of the block before, whole, in fp32
            "temporary": gradients + cast,
        }
    done = layers * reduced / work.shards
    sums = max(earlier, done) + waiting * done
    last = {"gathered": whole, "reduced": reduced, "temporary": cast + embedding}
    phases["embedding"] = {"gradients": sums, **last}
    sums += 4 * root / work.shards
    phases["root"] = {"gradients": sums, "reduced": 4 * root, "temporary": cast}
    return {name: always | sizes for name, sizes in phases.items()}


def peak_categories(work: Workload) -> dict[str, float]:
    """Bytes on a rank's device by category, in the phase that needs most."""
    elsewhere = IN_HOST_MEMORY if work.config.offload else ()
    phases = [
        {k: v for k, v in phase.items() if k not in elsewhere}
        for phase in memory_by_phase(work).values()
    ]
    return max(phases, key=lambda phase: sum(phase.values()))


def peak_bytes(work: Workload) -> float:
    """The most that a rank needs on its device."""
    return sum(peak_categories(work).values())


def needed_bytes(work: Workload) -> float:
    """The memory that a GPU must have: the peak and a margin."""
    fixed, share = MARGIN
    return fixed + (1 + share) * peak_bytes(work)


def stored_bytes(config: TrainConfig, model: LlamaConfig, steps: int) -> tuple[float, float]:
    """Bytes on disk that a run needs at most, and a rank's in host memory."""
    trained = counts.trained_count(model, config.lora)
    result = trained * (4 if config.lora else DTYPES[config.save_dtype].itemsize)
    # one is being written; steps of minutes are all saved
    snapshots = min(steps, config.save_total_limit + 1) if config.save_every else 0
    return result + 12 * trained * snapshots, 12 * trained * (snapshots > 0) / config.gpus


def suggest(work: Workload, memory: float) -> str:
    """The first of a few changes after which it fits."""
    gather_again = " --reshard" if work.config.stays_gathered else ""
    changes: dict[str, dict] = {"": {}}
    changes |= {" --bits 4": {"bits": 4}} if work.config.lora else {}
    counts = [count for count in (2, 4, 8, 16, 32, 64, 128) if count > work.config.gpus]
    changes |= {f" on {count} GPUs": {"gpus": count, "replicas": 1} for count in counts}
    for text, change in changes.items():
        config = replace(work.config, checkpointing="full", reshard=True, **change)
        if needed_bytes(replace(work, config=config)) <= memory:
            return f"It would fit with --checkpointing full{gather_again}{text}."
    return "Choose a smaller model, --row-tokens or --max-length, or GPUs with more memory."


def resolve_defaults(
    config: TrainConfig, model: LlamaConfig, examples: Examples, steps: int
) -> TrainConfig:
    """Decide what the flags leave open. On a GPU: rows as long as fit, and blocks stay gathered if
    they fit, too."""
    _, memory = find_device(config.chip)
    gpu = is_for_gpu(config)

    def fits(work: Workload, **settings) -> bool:
        return needed_bytes(replace(work, config=replace(work.config, **settings))) <= memory

    if not config.row_tokens:
        longest = config.longest_example
        each = -(-config.step_answers // config.gpus)
        shortest = max(512, longest)
        lengths = range(shortest, each * longest + shortest, 128) if gpu else ()
        share = float(examples.supervised.sum() / examples.lengths.sum())
        rows = [T for T in lengths if fits(Workload(config, model, T, share, rows=2))]
        default = shortest if gpu else max(ROW_TOKENS, longest)
        config = replace(config, row_tokens=max(rows, default=default))
    if config.reshard is None:
        keep = gpu and fits(measure(config, model, examples, steps), reshard=False)
        config = replace(config, reshard=not keep)
    return config


def measure(config: TrainConfig, model: LlamaConfig, examples: Examples, steps: int) -> Workload:
    """By the packed rows that the run would have, or those of its first steps if it has many."""
    lengths, supervised = examples.lengths, examples.supervised
    count, batch_size, most = len(examples), config.batch_size, config.step_answers
    if config.objective == "group":  # answers of which nothing is known yet
        room = config.max_length - lengths
        supervised, lengths = supervised + room, lengths + room
    epochs, rest = divmod(min(steps * batch_size, round(count * config.epochs)), count)
    tokens = int(lengths[shuffle_epoch(count, config.seed, epochs)[:rest]].sum())
    tokens += int(lengths.sum()) * epochs
    longest, rows = (int(lengths.max()) if epochs else 0), 0
    # The more examples a step has, the less do its rows differ from another step's.
    for step in range(min(steps, PACKED // (most + 64) ** 2 + 1)):
        batch = step_examples(count, batch_size, config.epochs, config.seed, step)
        batch = batch.repeat(most // batch_size)
        ranks = pack_rows(lengths[batch], min(config.gpus, most), config.row_tokens)
        longest = max(longest, *(int(lengths[batch[row]].sum()) for own in ranks for row in own))
        rows = max(rows, len(ranks[0]))
    share = float(supervised.sum() / lengths.sum())
    length = counts.mean_length(np.diff(examples.starts) if config.documents > 1 else lengths)
    return Workload(config, model, longest, share, rows, steps, tokens * most // batch_size, length)


def report_plan(work: Workload) -> str:
    """What `--plan` prints."""
    config, model, (chip, memory) = work.config, work.model, find_device(work.config.chip)
    trained = f"{short_number(counts.model_parameters(model))} parameters"
    if config.lora:
        base = f"int{config.bits}" if config.bits < 16 else config.dtype
        adapter = short_number(counts.adapter_parameters(model, config.lora))
        trained = f"an adapter of {adapter} parameters on {trained} in {base}"
    categories = {**peak_categories(work), "peak": peak_bytes(work)}
    lines = []
    for name, size in categories.items():
        if name == "peak" or size >= GIB / 200:  # not 0.00
            lines.append(f"{name:<12}{size / GIB:8.2f} GiB a rank")
    total, margin = needed_bytes(work), needed_bytes(work) - peak_bytes(work)
    lines.append(f"margin      {margin / GIB:8.2f} GiB for CUDA, NCCL and the allocator")
    lines.append(f"total       {total / GIB:8.2f} GiB, of {memory / GIB:.0f} GiB")
    disk, host = stored_bytes(config, model, work.steps)
    if config.offload:
        phases = memory_by_phase(work).values()
        host += max(sum(phase.get(name, 0) for name in IN_HOST_MEMORY) for phase in phases)
    lines.append(f"host memory {host / GIB:8.2f} GiB a rank, a snapshot's copy included")
    lines.append(f"disk        {disk / GIB:8.2f} GiB for snapshots and the result")
    time = f"{work.steps} steps of {work.tokens / work.steps:,.0f} tokens"
    if chip:
        flops = counts.flops_per_token(model, work.length, work.supervised, config.lora)
        flops, seconds = flops * work.tokens, counts.estimated_seconds(work, CHIPS[chip])
        seconds *= work.steps
        if config.objective in PAIRWISE:  # the reference: a third of an epoch
            seconds *= 1 + 1 / 3 / config.epochs
        mfu = flops / (config.gpus * CHIPS[chip].flops * seconds)
        large, unit = (3600, "hours") if seconds >= 3600 else (60, "minutes")
        time += f", {flops:.2e} operations in all: {short_number(seconds / large)} {unit}"
        time += f" at an MFU of {short_number(100 * mfu)}%"
    elif not is_for_gpu(config):
        time += ". Each rank has this machine's memory: --chip plans for a GPU, and says the hours."
    if config.objective == "group":
        time += "\nAll answers are taken to fill --max-length. The time to draw them comes on top."
    if config.gpus > config.step_answers:
        time += f"\n{config.gpus - config.step_answers} ranks have no example: raise --batch-size."
    verdict = "It fits." if total <= memory else f"It does not fit. {suggest(work, memory)}"
    ranks = f"{config.gpus} x {chip or 'this machine'}"
    ranks += f" in {config.replicas} replicas" if config.replicas > 1 else ""
    rows = f"rows of up to {work.row_tokens} {config.dtype} tokens"
    blocks = "blocks stay gathered" if config.stays_gathered else "blocks gathered twice"
    settings = f"{trained}, {ranks}, checkpointing {config.checkpointing}, "
    settings += f"{rows} (--row-tokens {config.row_tokens}), {blocks}"
    return "\n".join([settings, "", "at the peak of a step:", *lines, "", time, verdict])
