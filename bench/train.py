"""Training: useful tokens a second and peak memory, against Hugging Face's Trainer and TRL.

    python -m bench.train [--runs 5] [--steps 9]

The model has 15.2M parameters (width 288, 6 layers, vocabulary 32,000, tied) and random weights.
The examples have the lengths of Alpaca's: log-normal, median 87 tokens, mean about 108, at most
512; half of each is prompt. Batches of 16 examples, on the CPU; padding does not count as tokens.
Ours is `fsdp_train.train`, the whole loop: packing, FSDP, the loss, clipping, AdamW, logging.

- Trainer pads a batch to its longest example, as in Alpaca's train.py.
- Grouped: its batches of similar lengths (group_by_length), as they are in a large data set. Of our
  few examples it would sort no more than two batches at a time, and 45 % would still be padding.
- Packed: transformers' DataCollatorWithFlattening, 4 examples in a row. Positions that begin again
  at 0 keep attention (SDPA with a mask) inside each; but with the default use_cache=True, that mask
  is left out without a warning, and logits of this model move by 2.
- TRL: SFTTrainer packs rows of 512 tokens, 4 a step, one at a time; attention as above, and it sets
  use_cache=False. Checkpointing is off. (Rows of 1,728 are slower, and so is its default, 1,024.)

Each side runs in a process of its own, in turn.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench.measure import (
    ROOT,
    Figures,
    PeakMemory,
    bench_parser,
    matmul_rate,
    report,
    run_in_process,
    run_in_turns,
)
from bench.models import SMALL, write_random

BATCH, WARM_UP = 16, 3  # the first steps, in which allocators and kernels settle, do not count


def examples(count: int, vocab_size: int = 32000) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of random tokens."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(87), 0.66, count).astype(int), 8, 512)
    texts = [random.integers(3, vocab_size, length).tolist() for length in lengths]
    return [(ids, [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]) for ids in texts]


def as_examples(pairs: list[tuple[list[int], list[int]]]):
    from dataset import Examples

    ids, labels = (
        np.array([token for pair in pairs for token in pair[side]], np.int32) for side in (0, 1)
    )
    starts = np.cumsum([0, *(len(pair[0]) for pair in pairs)])
    return Examples(ids, labels, starts, [""] * len(pairs), {})


def run_ours(dtype: str, steps: int, data, **settings) -> list[dict]:
    """The log of a whole run that starts from random weights."""
    import fsdp_train
    from alpaca.common.system import keep_freed_memory
    from alpaca.training.config import TrainConfig
    from alpaca.training.parallel import process_group
    from alpaca.training.process import StopSignal
    from alpaca.training.run_dir import RunDir
    from model import LlamaConfig
    from tokenizer import load_tokenizer

    keep_freed_memory()
    tokenizer = ROOT / "data/tokenizer.model"
    with tempfile.TemporaryDirectory() as folder:
        write_random(base := Path(folder) / "base", SMALL, "fp32")
        config = TrainConfig(
            model_dir=base,
            tokenizer=tokenizer,
            out=Path(folder) / "run",
            epochs=1,
            batch_size=len(data) // steps,
            row_tokens=4096,
            dtype=dtype,
            checkpointing="none",
            save_every=0,
            **settings,
        )
        model_config = LlamaConfig(**SMALL)
        job = fsdp_train.Job(config, model_config, load_tokenizer(tokenizer), data, None, [], steps)
        with (
            process_group("cpu", 1) as (mesh, device),
            StopSignal() as stop,
            RunDir(config.out, {}, quiet=False) as run,
        ):
            fsdp_train.train(job, run, mesh, device, stop)
        return run.records


def steady(tokens, seconds, computed) -> dict[str, float]:
    """Useful tokens a second, and padding's share of all tokens, after the first steps."""
    assert len(tokens) > WARM_UP, f"--steps must exceed {WARM_UP}, which do not count"
    useful, spent, padded = (float(sum(each[WARM_UP:])) for each in (tokens, seconds, computed))
    return {"rate": useful / spent, "padding": 1 - useful / padded}


def ours(dtype: str, steps: int, **settings) -> dict[str, float]:
    import fsdp_train
    from alpaca.training.run_dir import step_seconds

    computed, packed_rows = [], fsdp_train.packed_rows

    def count_and_pack(*batch):
        rows = [*packed_rows(*batch)]
        computed.append(sum(row.inputs["ids"].numel() for row in rows))
        return rows

    with mock.patch.object(fsdp_train, "packed_rows", count_and_pack):
        records = run_ours(dtype, steps, as_examples(examples(BATCH * steps)), **settings)
    return steady([r["tokens"] for r in records], [step_seconds(r) for r in records], computed)


def grouped(steps: int) -> list[tuple[list[int], list[int]]]:
    """Examples in the order of Trainer's group_by_length, which sorts 50 batches at a time if there
    are at least 200: the longest ones to warm up with, then some at equal distances."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    pairs = examples(200 * BATCH)
    order = list(LengthGroupedSampler(BATCH, lengths=[len(ids) for ids, _ in pairs]))
    middles = np.linspace(0, 50, 2 * (steps - WARM_UP) + 1)[1::2].astype(int).tolist()
    starts = [BATCH * batch for batch in [*range(WARM_UP), *middles]]
    return [pairs[i] for start in starts for i in order[start : start + BATCH]]


def trainer(dtype: str, steps: int, how: str, adapt=lambda model: model) -> dict[str, float]:
    """`how`: padded, grouped, packed or trl; `adapt` changes the model first (bench/lora.py)."""
    from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = adapt(LlamaForCausalLM(LlamaConfig(**SMALL, use_cache=False)))
    count = BATCH * steps * (2 if how == "trl" else 1)  # its steps have about 20 examples
    pairs = grouped(steps) if how == "grouped" else examples(count)
    collate = {"packed": DataCollatorWithFlattening(), "trl": None}.get(how, pad)
    batch, micro = {"packed": (BATCH, 4), "trl": (4, 1)}.get(how, (BATCH, BATCH))
    options: dict = {"train_sampling_strategy": "sequential"} if how == "grouped" else {}
    options |= {"max_steps": steps, "use_cpu": True, "bf16": dtype == "bf16"}
    return steady(*run_trainer(model, pairs, collate, batch, micro, **options))


def pad(batch: list[dict]) -> dict:
    """To the longest example of the batch, as in Alpaca's train.py."""
    longest = max(len(example["input_ids"]) for example in batch)
    padded = {
        name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in batch])
        for name, value in {"input_ids": 0, "labels": -100}.items()
    }
    lengths = torch.tensor([[len(example["input_ids"])] for example in batch])
    return {**padded, "attention_mask": (torch.arange(longest) < lengths).long()}


def run_trainer(model, pairs: list, collate: Callable | None, batch: int, micro: int, **options):
    """Each step's tokens, without padding; its seconds, from the end of the one before; and its
    tokens with padding. `micro` examples at a time; without `collate`, packed rows of TRL's."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    counts, times = [], []

    class Timer(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": batch // micro,
            "num_train_epochs": 1,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **options,
        }
        if collate:
            runner = Trainer(model, TrainingArguments(**options), collate, data)
        else:
            from datasets import Dataset
            from transformers import AutoTokenizer
            from trl import SFTConfig, SFTTrainer

            tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny-llama")
            config = SFTConfig(
                packing=True, max_length=512, gradient_checkpointing=False, **options
            )
            data = Dataset.from_list(data)
            runner = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        make_batch = runner.data_collator

        def count_and_collate(rows: list[dict]) -> dict:
            made = make_batch(rows)
            counts.append((sum(len(row["input_ids"]) for row in rows), made["input_ids"].numel()))
            return made

        runner.data_collator = count_and_collate
        runner.add_callback(Timer())
        runner.train()
    counts = counts[: (len(times) - 1) * (batch // micro)]  # in the order of steps; some are ahead
    useful, computed = np.reshape(counts, (len(times) - 1, -1, 2)).sum(1).T
    return useful, np.diff(times), computed


def measure_once(work: Callable[[], dict[str, float]]) -> None:
    """Print one side's figures and peak memory, as JSON."""
    torch.set_num_threads(2)
    with PeakMemory() as peak:
        figures = work()
    print(json.dumps({**figures, "GB": peak.anonymous / 1e9}))


def percentages(title: str, figures: Figures, figure: str, factor: float = 1) -> str:
    medians = {side: statistics.median(found[figure]) for side, found in figures.items()}
    return f"{title}: {', '.join(f'{side} {factor * m:.0%}' for side, m in medians.items())}."


def compare(
    module: str, doc: str, title: str, sides: dict, packages: list[str], flops: int = 6
) -> None:
    """The benchmark's command. `sides` take a dtype and a number of steps; ours is the first.
    `flops` is a token's, for each parameter."""
    from alpaca.training.throughput import model_parameters
    from alpaca.weights.quantized_linear import multiplies_bf16
    from model import LlamaConfig

    parser = bench_parser(doc, runs=True, internal=("--side",))
    parser.add_argument("--steps", type=int, default=9, help="of each run (default: 9)")
    help = "only this one (default: fp32, and bf16 if the CPU multiplies it)"
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help=help)
    args = parser.parse_args()
    sides = {**sides, "matmul": lambda dtype, _: {"rate": matmul_rate(dtype)}}
    if args.side:
        return measure_once(lambda: sides[args.side](args.dtype, args.steps))
    dtypes = ("fp32", "bf16") if multiplies_bf16() else ("fp32",)
    for dtype in [args.dtype] if args.dtype else dtypes:
        flags = {"dtype": dtype, "steps": args.steps}
        processes = {
            side: lambda side=side, flags=flags: run_in_process(module, side=side, **flags)
            for side in sides
        }
        figures = run_in_turns(processes, args.runs, warm_up=0)  # a run drops its own first steps
        limit = statistics.median(figures.pop("matmul")["rate"])
        us, *peers = figures
        lines = []
        for peer in peers:
            a, b = figures[us], figures[peer]
            lines.append((f"useful tokens/s, {peer}", a["rate"], b["rate"], True))
            lines.append((f"peak anonymous memory, GB, {peer}", a["GB"], b["GB"]))
        share = flops * model_parameters(LlamaConfig(**SMALL)) / 1e9 / limit
        rates = f"Of {limit:,.0f} GFLOP/s, a matrix product's rate, at {flops}·N FLOP a token"
        notes = [percentages(rates, figures, "rate", share)]
        if "padding" in figures[us]:
            notes.insert(0, percentages("Padding", figures, "padding"))
        report(f"{title} in {dtype}", packages[1], lines, packages, *notes)


if __name__ == "__main__":
    compare(
        "bench.train",
        __doc__,
        "Train 15M parameters",
        {
            "ours": ours,
            "Trainer": lambda dtype, steps: trainer(dtype, steps, "padded"),
            "Trainer, grouped": lambda dtype, steps: trainer(dtype, steps, "grouped"),
            "Trainer, packed": lambda dtype, steps: trainer(dtype, steps, "packed"),
            "TRL, packed": lambda dtype, steps: trainer(dtype, steps, "trl"),
        },
        ["torch", "transformers", "accelerate", "trl"],
    )
