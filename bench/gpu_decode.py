"""Decoding a 7B on one GPU: tokens a second against transformers, and the memory's limit.

    python -m bench.gpu_decode [--runs 5]

A random LLaMA-7B in bf16 (13.5 GB in a temporary folder) answers one prompt of 64 tokens with 64
new ones, then 32 such prompts at once; ours with 8 and 4 bits too. Sides and limit are those of
bench/decode.py, in the GPU's memory.
"""

import statistics
import tempfile
from pathlib import Path

from bench.decode import bytes_per_token, run_loaded_in_turns, write_quantized
from bench.measure import bench_parser, gpu_table, table, table_line
from bench.models import write_random

TITLE, BATCH_SIZES = "Decode a 7B on one GPU", (1, 32)


def measure(runs: int) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        write_random(plain := Path(scratch) / "bf16", "7B")
        folders = write_quantized(plain)
        sides = {"memory": ("bandwidth", "", 1)}
        for size in BATCH_SIZES:
            for bits, folder in folders.items():
                sides[f"ours {bits}, {size}"] = ("ours", folder, size)
            sides[f"transformers, {size}"] = ("transformers", plain, size)
        figures = run_loaded_in_turns(sides, runs, "cuda")
        rate = statistics.median(figures["memory"]["GB/s"])
        limits = {bits: rate * 1e9 / bytes_per_token(f) for bits, f in folders.items()}
    lines = []
    for size in BATCH_SIZES:
        for bits in limits:
            ours, peer = figures[f"ours {bits}, {size}"], figures[f"transformers, {size}"]
            for figure in ("decode tok/s", "tok/s"):
                label = f"{size} at once, {bits} bits against bf16, {figure}"
                lines.append(table_line(label, ours[figure], peer[figure], True))
    text = [table(TITLE, "transformers", lines, ["torch", "transformers"])]
    for bits, limit in limits.items():
        share = statistics.median(figures[f"ours {bits}, 1"]["decode tok/s"]) / limit
        text.append(f"{bits} bits, one sequence: {share:.0%} of the memory's {limit:.0f} tok/s.")
    return "\n".join([*text, ""])


def main() -> None:
    args = bench_parser(__doc__, runs=5).parse_args()
    print(gpu_table("decode.md", TITLE, lambda: measure(args.runs)))


if __name__ == "__main__":
    main()
