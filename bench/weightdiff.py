"""Weight diffs: making and recovering one, against the way Alpaca published.

    python bench/weightdiff.py [--runs 3]

A random 1.1B-parameter base in bf16 (2.2 GB) and the same with every weight changed a little. Ours
makes the exact diff, with SHA-256 digests of base, diff and result and all of it on disk (fsync)
at the end. Theirs is what Alpaca's script does: both models in fp32 through transformers, one
state dict added to the other, `save_pretrained`. Each side runs in a process of its own, in turn,
with the files in the page cache; imports are not counted. A third side leaves out digests and
fsync, to see what they cost.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import weightdiff  # noqa: E402
from alpaca.weights import bitdiff  # noqa: E402
from alpaca.weights.checkpoint import stored_tensors  # noqa: E402
from alpaca.weights.writer import save_model  # noqa: E402
from bench.load import SHAPE  # noqa: E402
from bench.measure import PeakMemory, alternate, row, table  # noqa: E402
from model import Llama  # noqa: E402


def write_pair(folder: Path) -> None:
    """A base and what fine-tuning could have made of it, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    save_model(Llama(SHAPE), SHAPE, folder / "base")
    torch.set_default_dtype(torch.float32)
    tuned = (
        (name, stored.read() + 1e-4 * torch.randn(stored.shape, dtype=torch.bfloat16))
        for name, stored in stored_tensors(folder / "base").items()
    )
    save_model(tuned, SHAPE, folder / "tuned")


class NoDigest:
    """In place of SHA-256, to see what that costs."""

    def __init__(self, content: bytes = b""):
        pass

    def update(self, content) -> None:
        pass

    def hexdigest(self) -> str:
        return Anything()


class Anything(str):
    """Equal to every digest."""

    __eq__ = lambda self, other: True  # noqa: E731
    __ne__ = lambda self, other: False  # noqa: E731
    __hash__ = str.__hash__


def ours(verb: str, folder: Path) -> None:
    base, diff = folder / "base", folder / "diff-ours"
    if verb == "make":
        weightdiff.make_exact_diff(base, folder / "tuned", diff)
    else:
        weightdiff.recover_exact_diff(base, diff, folder / "out-ours")


def theirs(verb: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    other, out = ("tuned", "diff-theirs") if verb == "make" else ("diff-theirs", "out-theirs")
    sign = -1 if verb == "make" else 1
    raw, model = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("base", other)
    )
    known, weights = raw.state_dict(), model.state_dict()
    for name in weights:
        weights[name].add_(sign * known[name])
    model.save_pretrained(folder / out)


def once(side: str, verb: str, folder: Path) -> None:
    if side == "bare":
        bitdiff.hashlib = SimpleNamespace(sha256=NoDigest)
        os.fsync = os.fdatasync = lambda handle: None
    if side == "theirs":
        import transformers  # noqa: F401
    with PeakMemory() as memory:
        start = time.perf_counter()
        (theirs if side == "theirs" else ours)(verb, folder)
        taken = time.perf_counter() - start
    print(json.dumps({"s": taken, "GB": memory.anonymous / 1e9}))


def in_own_process(side: str, verb: str, folder: Path) -> dict:
    made = "diff" if verb == "make" else "out"
    made = folder / f"{made}-{'theirs' if side == 'theirs' else 'ours'}"
    shutil.rmtree(made, ignore_errors=True)
    os.sync()  # what others have left to write is not our time
    command = [sys.executable, __file__, "--side", side, "--verb", verb, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if side == "bare":
        shutil.rmtree(made)  # whose diff has no digests
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each (default: 3)")
    for hidden in ("--side", "--verb"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return once(args.side, args.verb, args.folder)
    rows, bare = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pair(folder)
        for verb in ("make", "recover"):
            sides = {
                side: lambda s=side, v=verb: in_own_process(s, v, folder)
                for side in ("bare", "ours", "theirs")
            }
            found = alternate(sides, args.runs)
            for what, figure in (("s", "s"), ("peak anonymous memory, GB", "GB")):
                rows.append(row(f"{verb}, {what}", found["ours"][figure], found["theirs"][figure]))
            bare[verb] = sorted(found["bare"]["s"])[args.runs // 2]
        sizes = {
            side: sum(f.stat().st_size for f in (folder / f"diff-{side}").rglob("*.safetensors"))
            / 1e9
            for side in ("ours", "theirs")
        }
    print(table("Weight diff of 1.1B parameters", "transformers", rows, ["torch", "transformers"]))
    print(
        f"Without digests and fsync ours makes it in {bare['make']:.2f} s and recovers in "
        f"{bare['recover']:.2f} s. The diff is {sizes['ours']:.2f} GB, theirs "
        f"{sizes['theirs']:.2f} GB.\n"
    )


if __name__ == "__main__":
    main()
