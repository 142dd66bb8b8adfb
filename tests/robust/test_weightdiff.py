"""Runs of weightdiff.py that are killed, and its memory for 1.1 billion parameters."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.commands import ROOT
from helpers.diffs import add_noise, contents, write_model

import weightdiff
from alpaca.common.errors import run_command


def start(*args) -> int:
    """Run weightdiff.py in a fork of this process, which has done the imports, and give its pid."""
    if child := os.fork():
        return child
    code = 3
    try:
        sys.argv = ["weightdiff.py", *map(str, args)]
        run_command(weightdiff.main)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["make", "recover"])
def test_killed_runs_leave_nothing_and_the_next_is_complete(tmp_path, verb, kills):
    shape = {"vocab_size": 4000, "hidden_size": 768, "intermediate_size": 2048}  # 40 MB
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 12}
    base = write_model(tmp_path / "base", dtype=torch.bfloat16, **shape)
    tuned = write_model(tmp_path / "tuned", None, torch.bfloat16, add_noise, **shape)
    weightdiff.make_exact_diff(base, tuned, tmp_path / "quiet")
    if verb == "make":
        output, expected = tmp_path / "diff", tmp_path / "quiet"
        args = ["make", "--base", base, "--tuned", tuned, "--diff", output]
    else:
        output, expected = tmp_path / "out", tuned
        args = ["recover", "--base", base, "--diff", tmp_path / "quiet", "--tuned", output]
    begun = time.monotonic()
    assert os.waitpid(start(*args), 0)[1] == 0
    seconds, rng, killed = time.monotonic() - begun, random.Random(1), 0
    while killed < kills:  # a run that was quicker than its kill is checked, and not counted
        if output.exists():
            assert contents(output) == contents(expected)
            shutil.rmtree(output)
        pid = start(*args)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert output.exists() or os.waitpid(start(*args), 0)[1] == 0
    assert contents(output) == contents(expected)
    assert not list(tmp_path.glob("*.partial"))


SCRIPT = """
from pathlib import Path
import sys
import weightdiff
from bench.measure import PeakMemory
base, tuned, diff, out = (Path(sys.argv[1]) / name for name in ("base", "tuned", "diff", "out"))
with PeakMemory() as making:
    weightdiff.make_exact_diff(base, tuned, diff)
with PeakMemory() as recovering:
    weightdiff.recover_exact_diff(base, diff, out)
print(making.anonymous, recovering.anonymous)
"""


@pytest.mark.slow
def test_memory_of_1_1_billion_parameters(tmp_path):
    """Anonymous memory, in a process of its own, beyond what the imports take."""
    sys.path.insert(0, str(ROOT))
    from bench.weightdiff import write_pair

    write_pair(tmp_path)
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(int(memory) < 600e6 for memory in done.stdout.split()), done.stdout
