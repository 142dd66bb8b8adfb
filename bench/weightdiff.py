"""Making a weight diff and recovering a model from it, against the way Alpaca did it.

    python -m bench.weightdiff [--runs 5]

A random 1.1B-parameter base in bf16 (2.2 GB) and the same with every weight changed a little. Ours
makes the exact diff, with SHA-256 digests of base, diff and result, and all of it on disk (fsync)
at the end. The peer does what Alpaca's script does: both models in fp32 through transformers, one
state dict added to the other, `save_pretrained`. Each side runs in a process of its own, in turn,
with the files in the page cache; imports are not counted. A third side is ours without digests and
fsync, to see what they cost.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import weightdiff
from alpaca.weights import bitdiff
from alpaca.weights.checkpoint import read_config, stored_tensors
from alpaca.weights.writer import save_model
from bench.measure import PeakMemory, bench_parser, report, run_in_process, run_in_turns
from bench.models import TINYLLAMA, write_random

SIDES = ("ours without digests", "ours", "transformers")


def write_pair(folder: Path) -> None:
    """A base in bf16, and a model as fine-tuning could have made it."""
    base = folder / "base"
    write_random(base, TINYLLAMA)
    tuned = (
        (name, stored.read() + 1e-4 * torch.randn(stored.shape, dtype=torch.bfloat16))
        for name, stored in stored_tensors(base).items()
    )
    save_model(tuned, read_config(base), folder / "tuned")


class AnyDigest(str):
    """Equal to every digest."""

    __eq__ = lambda self, other: True  # noqa: E731
    __ne__ = lambda self, other: False  # noqa: E731
    __hash__ = str.__hash__


class NoHash:
    """In place of SHA-256, to see what that costs."""

    def update(self, content) -> None:
        pass

    def hexdigest(self) -> str:
        return AnyDigest()


def run_ours(verb: str, base: Path, diff: Path, tuned: Path) -> None:
    sys.argv = ["weightdiff", verb, f"--base={base}", f"--diff={diff}", f"--tuned={tuned}"]
    weightdiff.main()


def run_peer(verb: str, base: Path, diff: Path, tuned: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, sign, out = (tuned, -1, diff) if verb == "make" else (diff, 1, tuned)
    model, base_model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (source, base)
    )
    weights, base_weights = model.state_dict(), base_model.state_dict()
    for name in weights:
        weights[name].add_(sign * base_weights[name])
    model.save_pretrained(out)


def paths(side: str, verb: str, folder: Path) -> tuple[Path, Path, Path]:
    """Base, diff and tuned model; `make` writes the second, `recover` the third."""
    owner = "transformers" if side == "transformers" else "ours"
    tuned = folder / ("tuned" if verb == "make" else f"recovered-{owner}")
    return folder / "base", folder / f"diff-{owner}", tuned


def run_once(side: str, verb: str, folder: Path) -> None:
    """Print one side's seconds and peak memory, as JSON."""
    if side == "ours without digests":
        bitdiff.hashlib = SimpleNamespace(sha256=NoHash)
        os.fsync = os.fdatasync = lambda handle: None
    if side == "transformers":
        import transformers  # noqa: F401
    run = run_peer if side == "transformers" else run_ours
    with PeakMemory() as memory:
        start = time.perf_counter()
        run(verb, *paths(side, verb, folder))
        seconds = time.perf_counter() - start
    print(json.dumps({"s": seconds, "GB": memory.anonymous / 1e9}))


def run_side(side: str, verb: str, folder: Path) -> dict:
    _, diff, tuned = paths(side, verb, folder)
    result = diff if verb == "make" else tuned
    shutil.rmtree(result, ignore_errors=True)
    os.sync()  # so that other sides' pending writes do not count
    figures = run_in_process("bench.weightdiff", side=side, verb=verb, folder=folder)
    if side == "ours without digests":
        shutil.rmtree(result)
    return figures


def main() -> None:
    internal = ("--side", "--verb", "--folder")
    args = bench_parser(__doc__, runs=True, internal=internal).parse_args()
    if args.side:
        return run_once(args.side, args.verb, Path(args.folder))
    lines, bare = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pair(folder)
        for verb in ("make", "recover"):
            sides = {side: lambda s=side, v=verb: run_side(s, v, folder) for side in SIDES}
            without, ours, peer = run_in_turns(sides, args.runs).values()
            lines.append((f"{verb}, s", ours["s"], peer["s"]))
            lines.append((f"{verb}, peak anonymous memory, GB", ours["GB"], peer["GB"]))
            bare[verb] = statistics.median(without["s"])
        ours, peer = (
            sum(file.stat().st_size for file in diff.rglob("*") if file.is_file()) / 1e9
            for diff in (folder / "diff-ours", folder / "diff-transformers")
        )
    note = (
        f"Without digests and fsync, ours makes the diff in {bare['make']:.2f} s and recovers the "
        f"model in {bare['recover']:.2f} s. The diff has {ours:.2f} GB, theirs {peer:.2f} GB."
    )
    title = "Weight diff of 1.1B parameters"
    report(title, "transformers", lines, ["torch", "transformers"], note)


if __name__ == "__main__":
    main()
