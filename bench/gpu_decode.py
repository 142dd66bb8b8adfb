"""Decoding a 7B shape on one GPU: tokens a second against transformers, beside what memory allows.

    python bench/gpu_decode.py [--runs 5]

A random LLaMA-7B in bf16 (13.5 GB in a temporary folder) answers one prompt of 64 tokens with 64
new ones, then 32 such prompts at once; ours at 16, 8 and 4 bits too. Every side is a process that
keeps its model in the GPU's memory; they take turns. A token needs every weight but the
embedding's once: the limit is the rate at which this GPU sums 1 GiB, over those bytes.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.weights.quantize import WeightSource, save_quantized  # noqa: E402
from bench.decode import take_turns, weight_bytes  # noqa: E402
from bench.laptop import write  # noqa: E402
from bench.measure import kept, row, table  # noqa: E402

TITLE, MANY = "Decode a 7B on one GPU", 32


def measured(runs: int) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        places = {16: folder / "bf16", 8: folder / "int8", 4: folder / "int4"}
        write(places[16])
        sides = {"memory": ("bandwidth", "", 1)}
        for bits, place in places.items():
            if bits < 16:
                save_quantized(WeightSource(places[16], bits), place)
            for rows in (1, MANY):
                sides[f"ours {bits}, {rows}"] = ("ours", str(place), rows)
        for rows in (1, MANY):
            sides[f"theirs, {rows}"] = ("theirs", str(places[16]), rows)
        found = take_turns(sides, runs, "cuda")
        rate = statistics.median(found["memory"]["GB/s"])
        limits = {bits: rate * 1e9 / weight_bytes(place) for bits, place in places.items()}
    rows = []
    for many in (1, MANY):
        for bits in places:
            what = f"{many} at once, {bits} bits; bf16"
            for figure in ("decode tok/s", "tok/s"):
                pair = (found[name][figure] for name in (f"ours {bits}, {many}", f"theirs, {many}"))
                rows.append(row(f"{what}, {figure}", *pair, True))
    lines = [table(TITLE, "transformers", rows, ["torch", "transformers"])]
    for bits, limit in limits.items():
        share = statistics.median(found[f"ours {bits}, 1"]["decode tok/s"]) / limit
        lines.append(f"{bits} bits, one row: {share:.0%} of the {limit:.0f} tok/s memory allows.")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    args = parser.parse_args()
    print(kept("decode.md", TITLE, lambda: measured(args.runs)))


if __name__ == "__main__":
    main()
