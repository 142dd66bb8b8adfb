"""Fine-tuning a 7B on one GPU with fsdp_train.py: tokens a second, MFU, memory.

    python -m bench.gpu_train [--steps 12]
    python -m bench.gpu_train --steps 5 --model-dir data/tiny-llama    # a dry run, on any machine

A random LLaMA-7B in bf16 (13.5 GB in a temporary folder) is trained on synthetic records of about
Alpaca's lengths in batches of 128: all weights, an adapter, an adapter with a 4-bit base. The
figures are medians over the steps in metrics.jsonl, without the first ones, in which blocks are
compiled. The last column is the time for 52,002 examples of 108 tokens and three epochs.
"""

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from alpaca.datagen.formats import load_records
from bench.measure import ROOT, bench_parser, gpu_table, stamp
from bench.models import write_random

TITLE = "Fine-tune a 7B on one GPU"
BATCH, WARM_UP, ALPACA_TOKENS = 128, 4, 52_002 * 108 * 3
SETUPS = {
    "all weights": [],
    "adapter, base in bf16": ["--lora"],
    "adapter, base in 4 bits": ["--lora", "--bits", "4"],
}


def write_records(file: Path, count: int) -> None:
    """Instructions and answers have as many words as each other; their number is log-normal."""
    rng = random.Random(0)
    words = [record["output"] for record in load_records(ROOT / "data/sample_train.json")]
    lengths = [min(int(rng.lognormvariate(2.5, 0.9)) + 1, 100) for _ in range(count)]
    texts = [[" ".join(rng.choices(words, k=length)) for _ in range(2)] for length in lengths]
    file.write_text(json.dumps([{"instruction": a, "input": "", "output": b} for a, b in texts]))


def train(model: Path, records: Path, out: Path, steps: int, flags: list[str]) -> list[dict]:
    """The figures of a run's steps."""
    command = [sys.executable, ROOT / "fsdp_train.py", "--model-dir", model, "--data", records]
    command += ["--tokenizer", ROOT / "data/tokenizer.model", "--out", out, "--sample-answers", "0"]
    command += ["--max-steps", str(steps), "--batch-size", str(BATCH), "--save-every", "0", *flags]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=sys.stderr)
    figures = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [step for step in figures if "tokens_per_s" in step][WARM_UP:]


def measure(steps: int, model: Path | None) -> str:
    head = "| trained | tokens/s | MFU | peak memory, GiB | Alpaca's 3 epochs, h |"
    lines = [f"### {TITLE}", "", head, "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_records(records := folder / "records.json", BATCH * steps)
        if model is None:
            write_random(model := folder / "7B", "7B")
        for setup, flags in SETUPS.items():
            figures = train(model, records, folder / "runs" / setup, steps, flags)
            rate, memory, mfu = (
                statistics.median(step.get(name, math.nan) for step in figures)
                for name in ("tokens_per_s", "memory_GiB", "mfu")
            )
            hours = ALPACA_TOKENS / rate / 3600
            lines.append(f"| {setup} | {rate:,.0f} | {mfu:.0%} | {memory:.1f} | {hours:.2f} |")
    return "\n".join([*lines, "", stamp(["torch"]), ""])


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="of each run (default: 12)")
    parser.add_argument("--model-dir", type=Path, help="train this model instead, even on a CPU")
    args = parser.parse_args()
    if args.model_dir:
        return print(measure(args.steps, args.model_dir.absolute()))
    print(gpu_table("train.md", TITLE, lambda: measure(args.steps, None)))


if __name__ == "__main__":
    main()
