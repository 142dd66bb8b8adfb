"""From launch to the end of the first training step with a 1.1B model: seconds of each part.

    python -m bench.startup

A random bf16 checkpoint (2.2 GB) is written, and `fsdp_train.py` is run on it for one step of a few
short examples on the CPU, with a clock around each of its parts. Weights and moments are fp32: 20
GB of memory are needed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import ROOT, bench_parser, stamp, store
from bench.models import TINYLLAMA, write_random

PARTS = {  # functions of fsdp_train
    "prepare": "reading config, data, tokenizer",
    "build_model": "building and sharding the model, reading weights",
    "build_optimizer": "optimizer's moments",
    "train_step": "first step",
}
TIMED_RUN = """
import json, sys, time
start, parts = float(sys.argv.pop(1)), json.loads(sys.argv.pop(1))
import fsdp_train
from alpaca.training.process import hard_exit
times = [("python and imports", time.time() - start)]

def timed(name, function):
    def run(*args):
        begin = time.time()
        result = function(*args)
        times.append((parts[name], time.time() - begin))
        if name == "train_step":
            times.append(("launch to the end of the first step", time.time() - start))
            print(json.dumps(times), flush=True)
            hard_exit(0)
        return result
    return run

for name in parts:
    setattr(fsdp_train, name, timed(name, getattr(fsdp_train, name)))
fsdp_train.main()
"""


def main() -> None:
    bench_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, data = Path(scratch) / "model", Path(scratch) / "data.json"
        write_random(model, TINYLLAMA)
        record = {"instruction": "Name the first month.", "output": "January"}
        data.write_text(json.dumps([record] * 8))
        flags = ["--model-dir", model, "--tokenizer", ROOT / "data/tokenizer.model"]
        flags += ["--data", data, "--out", f"{scratch}/run", "--batch-size", 8, "--epochs", 1]
        command = [sys.executable, "-c", TIMED_RUN, time.time(), json.dumps(PARTS), *flags]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, f"exit {done.returncode}: {done.stderr}"
    lines = ["### Start of a training run, 1.1B parameters", "", "| part | s |", "|---|---|"]
    for name, seconds in json.loads(done.stdout.splitlines()[-1]):
        lines.append(f"| {name} | {seconds:.2f} |")
    store("\n".join([*lines, "", stamp(["torch"]), ""]))


if __name__ == "__main__":
    main()
