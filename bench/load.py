"""Loading a checkpoint: seconds and peak memory, against transformers' `from_pretrained`.

    python -m bench.load [--runs 5]

A random 1.1B-parameter model in bf16 (2.2 GB) is written to a temporary folder. Each side loads it
in a process of its own, in turn, with the file in the page cache. Imports are not counted. Both
sides map the file and read only what is used, so the time to compare is that to the first logits.
Memory is anonymous memory; pages of the mapped file are reported apart, since the system can drop
them at any time.
"""

import json
import tempfile
import time
from pathlib import Path

import torch

from alpaca.weights.loading import load_model
from bench.measure import PeakMemory, bench_parser, report, run_in_process, run_in_turns
from bench.models import TINYLLAMA, write_random

LABELS = {
    "load": "load, s",
    "first": "load and first logits, s",
    "GB": "peak anonymous memory, GB",
}


def load_once(side: str, folder: str) -> None:
    """Print one side's seconds and peak, as JSON."""
    if side == "transformers":
        from torch import _dynamo  # noqa: F401  which it would import while it loads
        from transformers import AutoModelForCausalLM

        def load():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:

        def load():
            return load_model(folder)

    with PeakMemory() as peak, torch.no_grad():
        start = time.perf_counter()
        model = load()
        loaded = time.perf_counter() - start
        model(torch.ones(1, 1, dtype=torch.int64))
        first = time.perf_counter() - start
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    sizes = {"GB": peak.anonymous / 1e9, "mapped": peak.mapped / 1e9}
    print(json.dumps({"load": loaded, "first": first, **sizes}))


def main() -> None:
    args = bench_parser(__doc__, runs=True, internal=("--side", "--folder")).parse_args()
    if args.side:
        return load_once(args.side, args.folder)
    with tempfile.TemporaryDirectory() as folder:
        write_random(model := Path(folder) / "model", TINYLLAMA)
        size = (model / "model.safetensors").stat().st_size
        sides = {
            side: lambda side=side: run_in_process("bench.load", side=side, folder=model)
            for side in ("ours", "transformers")
        }
        figures = run_in_turns(sides, args.runs)
    ours, peer = figures.values()
    lines = [(label, ours[name], peer[name]) for name, label in LABELS.items()]
    title = f"Load {size / 1e9:.2f} GB of bf16"
    mapped = ", ".join(f"{side} {max(figures[side]['mapped']):.2f} GB" for side in figures)
    note = f"Pages of the mapped file, not counted above: {mapped}."
    report(title, "transformers", lines, ["torch", "transformers"], note)


if __name__ == "__main__":
    main()
