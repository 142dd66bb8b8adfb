"""Estimates the memory and the hours of a run before it starts.

    python fsdp_train.py --model-dir llama-7b --data alpaca_data.json --plan --gpus 8 --chip H100

Weights, gradients and Adam's two moments are 16 bytes a parameter in fp32, divided among the ranks.
With LoRA they are the adapter's; the frozen base is in the dtype that blocks compute in, or in
integers, whole on every rank and dequantized one matrix at a time. A step has its peak in one of

    forward      at its end: every block's activations and a chunk of logits
    recompute    the same activations, and one block computed again (--checkpointing)
    reduce       no activations; the gradients of embedding and head whole, and a copy in fp32

The estimate counts the tensors of model.py and FSDP in eager mode, within 10 % of a real step;
compiled blocks need less, the allocator adds some. The longest row is that of
the run's first thousands of steps. Activations: arXiv:2205.05198.
"""

from dataclasses import dataclass, replace

from alpaca.common.errors import UserError
from alpaca.common.progress import short_number
from alpaca.training import throughput as counts
from alpaca.training.config import TrainConfig
from alpaca.training.throughput import CHIPS, GIB, find_device, flops_per_token, mean_length
from alpaca.weights.checkpoint import DTYPES
from dataset import Examples, pack_rows, shuffle_epoch, step_examples
from model import LOGITS_CHUNK, LlamaConfig

ASSUMED_MFU = 0.45  # the share of a GPU's peak that the hours assume
USABLE = 0.95  # of a GPU's memory: the rest is the allocator's and the driver's
PACKED = 2**27  # bounds the steps that are packed to find the longest row: about a second
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
    def itemsize(self) -> int:
        return DTYPES[self.config.dtype].itemsize


def block_activations(work: Workload) -> float:
    """Bytes a token that autograd stores in one block, if nothing is recomputed."""
    config, size, shapes = work.model, work.itemsize, counts.projection_shapes(work.model)
    width, inner, query = config.hidden_size, config.intermediate_size, shapes["q_proj"][0]
    qkv_and_result = size * (2 * query + 2 * shapes["k_proj"][0])
    attention = qkv_and_result + 4 * config.num_attention_heads  # the softmax's log-sum-exp
    lora = work.config.lora
    if not lora:
        norm = 4 * width + 2 * size * width  # fp32 copy, normalized, and times the weight
        joined = size * query  # documents' results as one row
        return 2 * norm + attention + joined + 4 * size * inner
    # a frozen weight does not need its input: only A and B do
    if lora.dropout:  # each projection's own input, and its mask
        inputs = (size + 1) * sum(shapes[name][1] for name in lora.targets)
    else:
        read = [names[0] for names in SAME_INPUT if {*names} & {*lora.targets}]
        inputs = size * sum(shapes[name][1] for name in read)
    adapter = inputs + size * lora.rank * len(lora.targets)
    return 2 * 4 * width + attention + 3 * size * inner + adapter


def activations(work: Workload) -> float:
    """Bytes that autograd stores of one row, at the end of the forward pass."""
    config, size, width, lora = work.model, work.itemsize, work.model.hidden_size, work.config.lora
    block = size * width  # its input
    if work.config.checkpointing == "none":
        block = block_activations(work)
    elif work.config.checkpointing == "selective":  # results of matrix products and attention
        shapes = counts.projection_shapes(config)
        results = sum(N for N, _ in shapes.values()) + shapes["q_proj"][0]
        block += size * results + 4 * config.num_attention_heads
        if lora:
            block += size * sum(lora.rank + shapes[name][0] for name in lora.targets)
    last = 4 * width + 2 * size * width + 2 * size * width * work.supervised  # norm; head's input
    if lora:
        last = 4 * width + size * width * work.supervised
    return work.row_tokens * (config.num_hidden_layers * block + last)


def frozen_base(work: Workload) -> tuple[float, float]:
    """Bytes of an adapter's base: those a rank always has, and those gathered for a block."""
    config, size, bits = work.model, work.itemsize, work.config.bits
    layers, root = config.num_hidden_layers, counts.root_parameters(config)
    matrices = counts.matrix_parameters(config)
    plain = counts.block_parameters(config) - (matrices if bits < 16 else 0)  # not quantized
    always = size * (layers * plain + root) / work.shards
    sharded = work.shards > 1 or work.config.offload
    gathered = size * (root + 2 * plain) if sharded else 0
    if bits < 16:
        always += layers * matrices * INTEGER_BYTES[bits]
        largest = max(N * K for N, K in counts.projection_shapes(config).values())
        gathered += largest * DEQUANTIZED_BYTES[bits]
    return always, gathered


def memory_by_phase(work: Workload) -> dict[str, dict[str, float]]:
    """Bytes of a rank by category, in each phase of a step."""
    config, size, lora = work.model, work.itemsize, work.config.lora
    if lora:
        trained, (base, gathered) = counts.adapter_parameters(config, lora), frozen_base(work)
        block, table = trained / config.num_hidden_layers, 0  # the head has no gradient
        passing = 3 * size * config.intermediate_size  # gradients of the MLP's activations
    else:
        trained, base, passing = counts.model_parameters(config), 0, 0
        gathered = size * counts.root_parameters(config)
        block, table = counts.block_parameters(config), config.vocab_size * config.hidden_size
    shard = trained / work.shards
    in_chunk = min(work.row_tokens * work.supervised, max(1, LOGITS_CHUNK // config.vocab_size))
    logits = in_chunk * config.vocab_size * (size + 4)  # and their fp32 copy
    always = {"weights": base + 4 * shard, "moments": 8 * shard}
    early = {**always, "gradients": 4 * shard * (work.rows > 1 or lora is not None)}
    gathered += size * 2 * block
    phases = {
        "forward": {
            **early,
            "activations": activations(work),
            "gathered": gathered,
            "logits": logits + table * (4 + size),  # and the head's gradient
        }
    }
    if work.config.checkpointing != "none":
        phases["recompute"] = {
            **early,
            "activations": activations(work)
            + work.row_tokens * (block_activations(work) + passing),
            "gathered": gathered + (size + 4) * block,
            "logits": size * table,
        }
    if lora is None:  # an adapter's gradients are small
        whole = (2 * size + 4) * counts.root_parameters(config)
        phases["reduce"] = {**always, "gradients": 4 * shard, "gathered": whole}
    return phases


def peak_categories(work: Workload) -> dict[str, float]:
    """Bytes on a rank's device by category, in the phase that needs most."""
    phases = [*memory_by_phase(work).values()]
    if work.config.offload:  # weights, gradients and moments are in host memory
        phases = [{k: v for k, v in p.items() if k not in IN_HOST_MEMORY} for p in phases]
    return max(phases, key=lambda phase: sum(phase.values()))


def peak_bytes(work: Workload) -> float:
    """The most that a rank needs on its device."""
    return sum(peak_categories(work).values())


def suggest(work: Workload, limit: float) -> str:
    """The first of a few changes after which it fits."""
    changes: list[tuple[str, dict]] = [("", {})]
    changes += [(" --bits 4", {"bits": 4})] if work.config.lora else []
    counts = [count for count in (2, 4, 8, 16, 32, 64, 128) if count > work.config.gpus]
    changes += [(f" on {count} GPUs", {"gpus": count, "replicas": 1}) for count in counts]
    for text, change in changes:
        config = replace(work.config, checkpointing="full", **change)
        if peak_bytes(replace(work, config=config)) <= limit:
            return f"It would fit with --checkpointing full{text}."
    return "Choose a smaller model, a smaller --row-tokens, or GPUs with more memory."


def measure(config: TrainConfig, model: LlamaConfig, examples: Examples, steps: int) -> Workload:
    """By the packed rows that the run would have, or those of its first steps if it has many."""
    if config.gpus % config.replicas:
        raise UserError(f"--gpus {config.gpus} is not a multiple of --replicas {config.replicas}")
    lengths, count, batch_size = examples.lengths, len(examples), config.batch_size
    epochs, rest = divmod(min(steps * batch_size, round(count * config.epochs)), count)
    tokens = int(lengths[shuffle_epoch(count, config.seed, epochs)[:rest]].sum())
    tokens += int(lengths.sum()) * epochs
    longest, rows = (int(lengths.max()) if epochs else 0), 0
    # The more examples a step has, the less do its rows differ from another step's.
    for step in range(min(steps, PACKED // (batch_size + 64) ** 2 + 1)):
        batch = step_examples(count, batch_size, config.epochs, config.seed, step)
        ranks = pack_rows(lengths[batch], min(config.gpus, batch_size), config.row_tokens)
        longest = max(longest, *(int(lengths[batch[row]].sum()) for own in ranks for row in own))
        rows = max(rows, len(ranks[0]))
    share = float(examples.supervised.sum() / lengths.sum())
    return Workload(config, model, longest, share, rows, steps, tokens, mean_length(lengths))


def report_plan(work: Workload) -> str:
    """What `--plan` prints."""
    config, model, (chip, memory) = work.config, work.model, find_device(work.config.chip)
    trained = f"{short_number(counts.model_parameters(model))} parameters"
    if config.lora:
        base = f"int{config.bits}" if config.bits < 16 else config.dtype
        adapter = short_number(counts.adapter_parameters(model, config.lora))
        trained = f"an adapter of {adapter} parameters on {trained} in {base}"
    categories = {**peak_categories(work), "peak": peak_bytes(work)}
    sizes = [f"{name:<12}{size / GIB:8.2f} GiB a rank" for name, size in categories.items()]
    sizes[-1] += f", of {memory / GIB:.0f} GiB"
    if config.offload:
        phases = memory_by_phase(work).values()
        host = max(sum(phase.get(name, 0) for name in IN_HOST_MEMORY) for phase in phases)
        sizes.append(f"host memory {host / GIB:8.2f} GiB a rank")
    time = f"{work.steps} steps of {work.tokens / work.steps:,.0f} tokens"
    if chip:
        flops = flops_per_token(model, work.length, work.supervised, config.lora) * work.tokens
        hours = flops / (config.gpus * CHIPS[chip].flops * ASSUMED_MFU) / 3600
        time += f", {flops:.2e} operations: {hours:.2f} hours at an MFU of {ASSUMED_MFU:.0%}"
    fits = peak_bytes(work) <= USABLE * memory
    verdict = "It fits." if fits else f"It does not fit. {suggest(work, USABLE * memory)}"
    settings = (
        f"{trained}, {config.gpus} x {chip or 'this machine'}, checkpointing "
        f"{config.checkpointing}, rows of up to {work.row_tokens} {config.dtype} tokens "
        f"(--row-tokens {config.row_tokens})"
    )
    return "\n".join([settings, "", "at the peak of a step:", *sizes, "", time, verdict])
