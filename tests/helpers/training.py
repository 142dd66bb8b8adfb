"""fsdp_train.py in processes of its own, and what it leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys

from helpers.commands import ROOT

LINE = "the red fox and a small dog went home over the old bridge in the evening rain"
WORDS = LINE.split()
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "held_out_loss")


def write_records(path, count: int, seed: int = 0):
    """Ragged examples: from a word to a few dozen."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    records = [
        {"instruction": words(8), "input": draw.choice(["", words(20)]), "output": words(40)}
        for _ in range(count)
    ]
    path.write_text(json.dumps(records))
    return path


def flags(base, out, **changes) -> list[str]:
    """A run of 5 steps of 16 in fp32; `flag=None` leaves a flag out, True sets it bare."""
    chosen = {
        "model_dir": base / "model",
        "data": base / "records.json",
        "out": out,
        "device": "cpu",
        "epochs": 2,
        "batch_size": 16,
        "lr": 1e-3,
        "max_length": 128,
        "row_tokens": 4096,
        "checkpointing": "none",
        "dtype": "fp32",
        "save_dtype": "fp32",
        "save_every": 0,
    }
    words = []
    for name, value in {**chosen, **changes}.items():
        flag = "--" + name.replace("_", "-")
        words += [] if value is None else [flag] if value is True else [flag, str(value)]
    return words


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def launch(words: list[str], ranks: int = 1, **how) -> subprocess.Popen:
    """The command as people type it; `ranks` > 1 goes through torchrun."""
    start = [sys.executable, ROOT / "fsdp_train.py"]
    if ranks > 1:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*run, "--nproc-per-node", str(ranks), ROOT / "fsdp_train.py"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **how}
    return subprocess.Popen([*start, *words], cwd=ROOT, text=True, start_new_session=True, **how)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def figures(out) -> list[dict]:
    """What does not depend on how fast the machine was."""
    return [{k: r[k] for k in EXACT if k in r} for r in metrics(out)]
