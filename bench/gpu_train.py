"""Fine-tuning a 7B shape on one GPU, by the commands that do it: tokens a second, MFU, memory.

    python bench/gpu_train.py [--steps 12]

A random LLaMA-7B in bf16 (13.5 GB in a temporary folder) learns made-up records of about Alpaca's
lengths in batches of 128: all weights, an adapter, an adapter beside a base of 4 bits. A line is
the median of what metrics.jsonl has, without the first steps, in which blocks are compiled. Hours
are what 52,002 examples of 108 tokens take in three epochs at that rate.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.datagen.formats import load_records  # noqa: E402
from bench.laptop import write  # noqa: E402
from bench.measure import kept, stamp  # noqa: E402

TITLE, WARM_UP, TOKENS = "Fine-tune a 7B on one GPU", 4, 52_002 * 108 * 3
WAYS = {
    "all weights": [],
    "adapter, base of bf16": ["--lora"],
    "adapter, base of 4 bits": ["--lora", "--bits", "4"],
}


def write_records(file: Path, count: int) -> None:
    """As many words asked as answered, their number log-normal."""
    draw = random.Random(0)
    words = [record["output"] for record in load_records(ROOT / "data/sample_train.json")]
    lengths = [min(int(draw.lognormvariate(2.5, 0.9)) + 1, 100) for _ in range(count)]
    texts = [[" ".join(draw.choices(words, k=length)) for _ in range(2)] for length in lengths]
    file.write_text(json.dumps([{"instruction": a, "input": "", "output": b} for a, b in texts]))


def trained(model: Path, records: Path, out: Path, steps: int, way: list[str]) -> list[dict]:
    """The figures of a run's steps."""
    command = [sys.executable, ROOT / "fsdp_train.py", "--model-dir", model, "--data", records]
    command += ["--tokenizer", ROOT / "data/tokenizer.model", "--out", out, "--sample-answers", "0"]
    command += ["--max-steps", str(steps), "--save-every", "0", *way]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=sys.stderr)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "tokens_per_s" in line][WARM_UP:]


def measured(steps: int, model: Path | None) -> str:
    heads = "| what | tokens/s | MFU | peak memory, GiB | Alpaca's 3 epochs, h |"
    lines = [f"### {TITLE}", "", heads, "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_records(folder / "records.json", 128 * steps)
        if model is None:
            write(model := folder / "7B")
        for number, (what, way) in enumerate(WAYS.items()):
            found = trained(model, folder / "records.json", folder / str(number), steps, way)
            rate, memory = (
                statistics.median(line[name] for line in found)
                for name in ("tokens_per_s", "memory_GiB")
            )
            mfu = statistics.median(line.get("mfu", math.nan) for line in found)
            hours = TOKENS / rate / 3600
            lines.append(f"| {what} | {rate:,.0f} | {mfu:.0%} | {memory:.1f} | {hours:.2f} |")
    return "\n".join([*lines, "", stamp(["torch"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of each run (default: 12)")
    parser.add_argument("--model-dir", type=Path, help="another model, on any machine: a dry run")
    args = parser.parse_args()
    if args.model_dir:
        return print(measured(args.steps, args.model_dir))
    print(kept("train.md", TITLE, lambda: measured(args.steps, None)))


if __name__ == "__main__":
    main()
