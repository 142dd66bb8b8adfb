"""Loading a checkpoint: seconds and peak memory, against transformers' `from_pretrained`.

    python bench/load.py [--runs 5]

A random 1.1B-parameter model in bf16 (2.2 GB) is written to a temporary folder, and each side loads
it in a process of its own, in turn, the file in the page cache. Imports are not counted. Both sides
map the file and read nothing until it is used, so the honest figure is the time to the first
token's logits. Memory is anonymous memory, sampled; pages of the mapped file stand apart, since the
system can drop them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from alpaca.weights.loading import load_model  # noqa: E402
from alpaca.weights.writer import save_model  # noqa: E402
from bench.measure import PeakMemory, alternate, row, table  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

SHAPE = LlamaConfig(32000, 2048, 5632, 22, 32, 4)  # TinyLlama's: 1.1B parameters


def write_random(folder: Path) -> int:
    torch.set_default_dtype(torch.bfloat16)
    model = Llama(SHAPE)
    save_model(model, SHAPE, folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load_once(side: str, folder: str) -> None:
    """Print one side's seconds and peak, as JSON."""
    if side == "transformers":
        from torch import _dynamo  # noqa: F401  which it loads on the way; imports are not counted
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


def in_own_process(side: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="counted runs of each side (default: 5)"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return load_once(args.side, args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        size = write_random(folder)
        sides = {
            side: lambda side=side: in_own_process(side, folder)
            for side in ("ours", "transformers")
        }
        found = alternate(sides, args.runs)
    rows = [
        row(what, found["ours"][figure], found["transformers"][figure])
        for what, figure in (
            ("load, s", "load"),
            ("load and first logits, s", "first"),
            ("peak anonymous memory, GB", "GB"),
        )
    ]
    print(
        table(f"Load {size / 1e9:.2f} GB of bf16", "transformers", rows, ["torch", "transformers"])
    )
    mapped = ", ".join(f"{side} {max(found[side]['mapped']):.2f} GB" for side in found)
    print(f"Pages of the mapped file beside that: {mapped}.")


if __name__ == "__main__":
    main()
