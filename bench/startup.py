"""From launch to the first step with a 1.1B checkpoint: seconds, and where they go.

    python bench/startup.py

A random bf16 checkpoint of TinyLlama's shape (2.2 GB) is written and `fsdp_train.py` started on
it for one step of a few short examples, on this machine, with a clock beside each of its parts. The
master weights and moments are fp32: have 20 GB of memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PARTS = ["prepare", "build_model", "build_optimizer", "train_step"]
LABELS = {
    "prepare": "reading config, data, tokenizer",
    "build_model": "model built, sharded, weights read",
    "build_optimizer": "moments",
    "train_step": "first step",
}
CLOCKED = """
import json, sys, time
start = float(sys.argv.pop(1))
import fsdp_train
from alpaca.training.process import hard_exit
marks = [("python and imports", time.time() - start)]

def clocked(name, work):
    def run(*given):
        begin = time.time()
        result = work(*given)
        marks.append((name, time.time() - begin))
        if name == "train_step":
            marks.append(("launch to the end of the first step", time.time() - start))
            print(json.dumps(marks), flush=True)
            hard_exit(0)
        return result
    return run

for name in PARTS:
    setattr(fsdp_train, name, clocked(name, getattr(fsdp_train, name)))
fsdp_train.main()
"""


def main() -> None:
    from bench.load import write_random

    with tempfile.TemporaryDirectory() as scratch:
        model, data = Path(scratch) / "model", Path(scratch) / "data.json"
        write_random(model)
        record = {"instruction": "Name the first month.", "output": "January"}
        data.write_text(json.dumps([record] * 8))
        flags = ["--model-dir", model, "--tokenizer", ROOT / "data/tokenizer.model"]
        flags += ["--data", data, "--out", f"{scratch}/run", "--batch-size", 8, "--epochs", 1]
        code = CLOCKED.replace("PARTS", repr(PARTS))
        command = [sys.executable, "-c", code, time.time(), *flags]
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, capture_output=True, text=True
        )
    assert done.stdout, f"exit {done.returncode}: {done.stderr}"
    print("### Start of a training run, 1.1B parameters\n")
    print("| what | s |\n|---|---|")
    for name, seconds in json.loads(done.stdout.splitlines()[-1]):
        print(f"| {LABELS.get(name, name)} | {seconds:.2f} |")
    print()


if __name__ == "__main__":
    main()
