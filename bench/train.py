"""Training: useful tokens a second and peak memory, against Hugging Face's Trainer.

    python -m bench.train [--runs 3] [--steps 9]

The model has 15.2M parameters (width 288, 6 layers, vocabulary 32,000, tied) and random weights.
The examples have the lengths of Alpaca's: log-normal, median 87 tokens, mean about 108, at most
512; half of each is prompt. Batches of 16 examples, on the CPU.

Trainer pads a batch to its longest example, as in Alpaca's train.py; its second entry also groups
examples of similar length. Ours is `fsdp_train.train`, the whole loop: packing, FSDP, the loss on
supervised tokens, clipping, AdamW, logging. Padding does not count as tokens on either side. Each
side runs in a process of its own, in turn.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.measure import (
    ROOT,
    PeakMemory,
    bench_parser,
    run_in_process,
    run_in_turns,
    table,
    table_line,
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
    from alpaca.common.memory import keep_freed_memory
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
            RunDir(config.out, {}, False, False) as run,
        ):
            fsdp_train.train(job, run, mesh, device, stop)
        return run.records


def ours(dtype: str, steps: int, **settings) -> list[float]:
    """Tokens a second of each step."""
    records = run_ours(dtype, steps, as_examples(examples(BATCH * steps)), **settings)
    return [record["tokens_per_s"] for record in records]


def trainer(dtype: str, steps: int, grouped: bool, adapt=lambda model: model) -> list[float]:
    """Trainer's tokens a second of each step; `adapt` changes the model first (bench/lora.py)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model, options = adapt(LlamaForCausalLM(LlamaConfig(**SMALL))), {}
    if grouped:
        options["train_sampling_strategy"] = "group_by_length"
    options |= {"use_cpu": True, "bf16": dtype == "bf16"}
    tokens, seconds = run_trainer(model, examples(BATCH * steps), pad, BATCH, **options)
    return (tokens / seconds).tolist()


def pad(batch: list[dict]) -> dict:
    """To the longest example of the batch, as in Alpaca's train.py."""
    longest = max(len(example["input_ids"]) for example in batch)
    padded = {
        name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in batch])
        for name, value in {"input_ids": 0, "labels": -100}.items()
    }
    lengths = torch.tensor([[len(example["input_ids"])] for example in batch])
    return {**padded, "attention_mask": (torch.arange(longest) < lengths).long()}


def pack(batch: list[dict]) -> dict:
    """One row. transformers finds the documents by their positions, and masks one from another."""
    labels = [[-100, *example["labels"][1:]] for example in batch]
    row = {
        "input_ids": [example["input_ids"] for example in batch],
        "labels": labels,
        "position_ids": [range(len(each)) for each in labels],
    }
    return {name: torch.tensor([[x for each in v for x in each]]) for name, v in row.items()}


def run_trainer(
    model, pairs: list, collate: Callable, batch: int, micro: int = 0, **options
) -> tuple[np.ndarray, np.ndarray]:
    """Each step's tokens, without padding, and its seconds, from the end of the one before;
    `micro` examples at a time (0: the whole batch)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = [{"input_ids": i, "labels": j, "length": len(i)} for i, j in pairs]
    micro, tokens, times = micro or batch, [], []

    def count_and_collate(examples: list[dict]) -> dict:
        tokens.append(sum(example["length"] for example in examples))
        return collate(examples)

    class Timer(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            num_train_epochs=1,
            learning_rate=2e-5,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        Trainer(
            model,
            arguments,
            train_dataset=data,
            data_collator=count_and_collate,
            callbacks=[Timer()],
        ).train()
    of_steps = np.reshape(tokens, (len(times) - 1, -1)).sum(1)  # collated in the order of steps
    return of_steps, np.diff(times)


def measure_once(work: Callable[[], list[float]], steps: int) -> None:
    """Print one side's median rate and peak memory, as JSON."""
    torch.set_num_threads(2)
    with PeakMemory() as peak:
        rates = work()
    assert len(rates) == steps, rates
    print(json.dumps({"rate": statistics.median(rates[WARM_UP:]), "GB": peak.anonymous / 1e9}))


def compare(
    module: str, doc: str, title: str, sides: dict[str, Callable], packages: list[str]
) -> None:
    """The benchmark's command. `sides` take a dtype and a number of steps; ours is the first."""
    parser = bench_parser(doc, runs=3, internal=("--side",))
    parser.add_argument("--steps", type=int, default=9, help="of each run (default: 9)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="only this one (default: both)")
    args = parser.parse_args()
    if args.side:
        return measure_once(lambda: sides[args.side](args.dtype, args.steps), args.steps)
    for dtype in [args.dtype] if args.dtype else ("fp32", "bf16"):
        flags = {"dtype": dtype, "steps": args.steps}
        processes = {
            side: lambda side=side, flags=flags: run_in_process(module, side=side, **flags)
            for side in sides
        }
        figures = run_in_turns(processes, args.runs, warm_up=0)  # a run drops its own first steps
        us, *peers = figures
        lines = []
        for peer in peers:
            a, b = figures[us], figures[peer]
            lines.append(table_line(f"useful tokens/s, {peer}", a["rate"], b["rate"], True))
            lines.append(table_line(f"peak anonymous memory, GB, {peer}", a["GB"], b["GB"]))
        print(table(f"{title} in {dtype}", packages[1], lines, packages))


if __name__ == "__main__":
    compare(
        "bench.train",
        __doc__,
        "Train 15M parameters",
        {
            "ours": ours,
            "Trainer": lambda dtype, steps: trainer(dtype, steps, False),
            "Trainer, grouped": lambda dtype, steps: trainer(dtype, steps, True),
        },
        ["torch", "transformers", "accelerate"],
    )
