"""Training: useful tokens a second and peak memory, against Hugging Face's Trainer.

    python bench/train.py [--runs 3] [--steps 9]

The model has 15.2M parameters (width 288, 6 layers, vocabulary 32,000, tied), random weights. The
examples have the lengths of Alpaca's: log-normal, median 87 tokens, mean about 108, none above 512;
half of each is prompt. Batches of 16 examples, all of it on the CPU.

Trainer pads a batch to its longest example, as Alpaca's train.py has it do; its second column also
groups examples of similar length. Ours is `fsdp_train.train`, the whole loop: packing, FSDP, the
loss on supervised tokens, clipping, AdamW, logging. Padding does not count as tokens on either
side. Each side runs in a process of its own, in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from bench.measure import PeakMemory, alternate, row, table  # noqa: E402

BATCH, WARM_UP = 16, 3  # steps that do not count: allocators and kernels settle
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def examples(count: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels), random but for their lengths."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(87), 0.66, count).astype(int), 8, 512)
    made = [random.integers(3, 32000, length).tolist() for length in lengths]
    return [(ids, [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]) for ids in made]


def ours(dtype: str, steps: int, lora: bool = False) -> list[float]:
    """Useful tokens a second, step by step; of the whole model or of an adapter (bench/lora.py)."""
    import fsdp_train
    from alpaca.training.config import TrainConfig
    from alpaca.training.parallel import process_group
    from alpaca.training.process import StopSignal, keep_freed_memory
    from alpaca.training.run_dir import RunDir
    from alpaca.weights.lora import LoraConfig
    from alpaca.weights.writer import save_model
    from dataset import Examples
    from model import Llama, LlamaConfig
    from tokenizer import Tokenizer

    keep_freed_memory()
    pairs = examples(BATCH * steps)
    ids, labels = (
        np.array([token for pair in pairs for token in pair[side]], np.int32) for side in (0, 1)
    )
    starts = np.cumsum([0, *(len(pair[0]) for pair in pairs)])
    data = Examples(ids, labels, starts, [""] * len(pairs), {})
    tokenizer = ROOT / "data/tokenizer.model"
    with tempfile.TemporaryDirectory() as scratch:
        model_config, start = LlamaConfig(**SHAPE), {"preset": "tiny"}
        if lora:
            save_model(Llama(model_config), model_config, f"{scratch}/base")
            start = {"lora": LoraConfig(), "model_dir": Path(scratch) / "base"}
        config = TrainConfig(
            **start,
            tokenizer=tokenizer,
            out=Path(scratch) / "run",
            epochs=1,
            batch_size=BATCH,
            dtype=dtype,
            checkpointing="none",
            save_every=0,
        )
        job = fsdp_train.Job(config, model_config, Tokenizer(tokenizer), data, None, [], steps)
        with process_group("cpu", 1) as (mesh, device), StopSignal() as stop:
            run = RunDir(config.out, {}, False, False)
            fsdp_train.train(job, run, mesh, device, stop)
        return [record["tokens_per_s"] for record in run.records]


def trainer(dtype: str, steps: int, grouped: bool, adapt=lambda model: model) -> list[float]:
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    config = LlamaConfig(**SHAPE)
    torch.manual_seed(0)
    model = adapt(LlamaForCausalLM(config))
    data = [{"input_ids": i, "labels": j, "length": len(i)} for i, j in examples(BATCH * steps)]
    tokens, rates = [], []

    def pad(batch: list[dict]) -> dict:
        longest = max(len(example["input_ids"]) for example in batch)
        tokens.append(sum(len(example["input_ids"]) for example in batch))
        fill = {"input_ids": 0, "labels": -100}
        padded = {
            name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in batch])
            for name, value in fill.items()
        }
        lengths = torch.tensor([[len(example["input_ids"])] for example in batch])
        return {**padded, "attention_mask": (torch.arange(longest) < lengths).long()}

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            rates.append(tokens[state.global_step - 1] / (time.perf_counter() - self.start))

    with tempfile.TemporaryDirectory() as scratch:
        strategy = {"train_sampling_strategy": "group_by_length"} if grouped else {}
        arguments = TrainingArguments(
            scratch,
            use_cpu=True,
            bf16=dtype == "bf16",
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=2e-5,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **strategy,
        )
        Trainer(
            model, arguments, train_dataset=data, data_collator=pad, callbacks=[Watch()]
        ).train()
    return rates


def once(work: Callable[[], list[float]], steps: int) -> None:
    """Print one side's median rate and peak, as JSON."""
    import torch

    torch.set_num_threads(2)
    with PeakMemory() as peak:
        rates = work()
    assert len(rates) == steps, rates
    found = {"rate": statistics.median(rates[WARM_UP:]), "GB": peak.anonymous / 1e9}
    print(json.dumps(found))


def in_own_process(file: str, side: str, dtype: str, steps: int) -> dict:
    command = [sys.executable, file, "--side", side, "--dtype", dtype, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    file: str, doc: str, title: str, sides: dict[str, Callable], packages: list[str]
) -> None:
    """A benchmark's main: sides are functions of a dtype and a number of steps, ours first."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=9, help="of each run (default: 9)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="(default: one after the other)")
    args = parser.parse_args()
    if args.side:
        return once(lambda: sides[args.side](args.dtype, args.steps), args.steps)
    for dtype in [args.dtype] if args.dtype else ("fp32", "bf16"):
        found = alternate(
            {
                side: lambda side=side, dtype=dtype: in_own_process(file, side, dtype, args.steps)
                for side in sides
            },
            args.runs,
            warm_up=0,  # each run leaves its first steps out by itself
        )
        us, *peers = sides
        rows = []
        for peer in peers:
            a, b = found[us], found[peer]
            rows.append(row(f"useful tokens/s, {peer}", a["rate"], b["rate"], more_is_better=True))
            rows.append(row(f"peak anonymous memory, GB, {peer}", a["GB"], b["GB"]))
        print(table(f"{title} in {dtype}", packages[1], rows, packages))


if __name__ == "__main__":
    compare(
        __file__,
        __doc__,
        "Train 15M parameters",
        {
            "ours": ours,
            "Trainer": lambda dtype, steps: trainer(dtype, steps, False),
            "Trainer, grouped": lambda dtype, steps: trainer(dtype, steps, True),
        },
        ["torch", "transformers", "accelerate"],
    )
