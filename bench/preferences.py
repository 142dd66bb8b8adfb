"""Learning from preferences: useful tokens a second and peak memory, against TRL's DPOTrainer.

    python -m bench.preferences [--runs 5] [--steps 9]

DPO on pairs of random tokens: a prompt and two answers, the examples of bench/train.py twice. The
model has 15.2M parameters and random weights; a step has 8 pairs, on the CPU, in the same dtype.

The time is that of a whole run of one epoch: the reference's log-probabilities, the steps with
their first ones, clipping, AdamW, logging. TRL is measured at its defaults (gradient checkpointing,
a second model for the reference) and at its best (no checkpointing, log-probabilities computed
beforehand); both pad. Padding does not count as tokens on either side.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

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
from bench.train import as_examples, examples

PAIRS = 8  # in a step


def random_pairs(count: int) -> list[list[tuple[list[int], list[int]]]]:
    """(chosen, rejected), each as (ids, labels): the same prompt and answers of two lengths."""
    found = []
    for (ids, labels), (other, _) in zip(examples(count), examples(2 * count)[count:], strict=True):
        prompt, answer = ids[: len(ids) // 2], other[len(other) // 2 :]
        rejected = prompt + answer, [-100] * len(prompt) + answer
        found.append([(ids, labels), (rejected[0][:512], rejected[1][:512])])
    return found


def ours(dtype: str, steps: int) -> tuple[int, float]:
    """(tokens, seconds) of a run."""
    import fsdp_train
    from alpaca.training.config import TrainConfig
    from alpaca.training.job import Job
    from alpaca.training.parallel import process_group
    from alpaca.training.process import StopSignal, keep_freed_memory
    from alpaca.training.run_dir import RunDir
    from dataset import Examples
    from model import LlamaConfig
    from tokenizer import load_tokenizer

    keep_freed_memory()
    plain = as_examples([answer for pair in random_pairs(PAIRS * steps) for answer in pair])
    data = Examples(
        plain.ids, plain.labels, plain.starts, plain.origins, {}, np.ones(PAIRS * steps)
    )
    tokenizer, shape, started = ROOT / "data/tokenizer.model", LlamaConfig(**SMALL), []
    make = fsdp_train.make_objectives
    with tempfile.TemporaryDirectory() as folder:
        write_random(base := Path(folder) / "base", SMALL, "fp32")
        config = TrainConfig(
            model_dir=base,
            out=Path(folder) / "run",
            objective="dpo",
            epochs=1,
            batch_size=PAIRS,
            row_tokens=4096,
            dtype=dtype,
            checkpointing="none",
            save_every=0,
            learning_rate=1e-6,
        )
        job = Job(config, shape, load_tokenizer(tokenizer), data, None, [], steps)
        with (
            process_group("cpu", 1) as (mesh, device),
            StopSignal() as stop,
            RunDir(config.out, {}, False, False) as run,
            mock.patch.object(fsdp_train, "save_result"),
            mock.patch.object(
                fsdp_train,
                "make_objectives",
                lambda *given: (started.append(time.perf_counter()), make(*given))[1],
            ),
        ):
            fsdp_train.train(job, run, mesh, device, stop)
            seconds = time.perf_counter() - started[0]
    return sum(record["tokens"] for record in run.records), seconds


def trl(dtype: str, steps: int, best: bool) -> tuple[int, float]:
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    pairs, started = random_pairs(PAIRS * steps), []
    prompts = [sum(label < 0 for label in labels) for (_, labels), _ in pairs]
    data = [
        {
            "prompt_ids": chosen[0][:n],
            "chosen_ids": chosen[0][n:],
            "rejected_ids": rejected[0][n:],
        }
        for n, (chosen, rejected) in zip(prompts, pairs, strict=True)
    ]

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *given):
            started.append(time.perf_counter())
            return super()._precompute_ref_logps(*given)

    torch.manual_seed(0)
    options: dict = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny-llama")
        tokenizer.pad_token = tokenizer.eos_token
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
        trainer = Tokenized(
            model,
            None if best else copy.deepcopy(model),
            args=DPOConfig(
                folder,
                per_device_train_batch_size=PAIRS,
                num_train_epochs=1,
                max_length=512,
                use_cpu=True,
                bf16=dtype == "bf16",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **(options if best else {}),
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(data),
        )
        started.append(time.perf_counter())
        trainer.train()
        seconds = time.perf_counter() - started[0]
    return sum(len(ids) for pair in pairs for ids, _ in pair), seconds


SIDES: dict[str, Callable] = {
    "ours": ours,
    "TRL": lambda dtype, steps: trl(dtype, steps, False),
    "TRL, at its best": lambda dtype, steps: trl(dtype, steps, True),
}


def main() -> None:
    parser = bench_parser(__doc__, runs=5, internal=("--side",))
    parser.add_argument("--steps", type=int, default=9, help="of each run (default: 9)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="only this one (default: both)")
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(2)
        with PeakMemory() as peak:
            tokens, seconds = SIDES[args.side](args.dtype, args.steps)
        print(json.dumps({"rate": tokens / seconds, "GB": peak.anonymous / 1e9}))
        return
    for dtype in [args.dtype] if args.dtype else ("fp32", "bf16"):
        flags = {"dtype": dtype, "steps": args.steps}
        sides = {
            side: lambda side=side, flags=flags: run_in_process(
                "bench.preferences", side=side, **flags
            )
            for side in SIDES
        }
        figures = run_in_turns(sides, args.runs, warm_up=0)
        us, *peers = figures
        lines = []
        for peer in peers:
            a, b = figures[us], figures[peer]
            lines.append(table_line(f"useful tokens/s, {peer}", a["rate"], b["rate"], True))
            lines.append(table_line(f"peak anonymous memory, GB, {peer}", a["GB"], b["GB"]))
        packages = ["torch", "transformers", "trl"]
        print(table(f"DPO of 15M parameters in {dtype}", "TRL", lines, packages))


if __name__ == "__main__":
    main()
