"""What differs between operating systems, simulated: Linux's limits, macOS, no fcntl at all."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers.commands import ROOT

from alpaca.common import system


@pytest.mark.parametrize(
    ("allowed", "raised", "files"),
    [
        ((256, 4096), (1024, 4096), 1024),
        ((100, 100), (100, 100), 100),
        ((4096, 4096), None, 4096),
        ((256, -1), (1024, -1), 1024),
        ((-1, -1), None, 1024),
    ],
)
def test_open_files_are_raised_as_far_as_allowed(monkeypatch, allowed, raised, files):
    changes = []
    monkeypatch.setattr(system.resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(system.resource, "getrlimit", lambda kind: allowed)
    monkeypatch.setattr(system.resource, "setrlimit", lambda kind, new: changes.append(new))
    assert system.max_open_files(1024) == files
    assert changes == ([raised] if raised else [])


def test_memory_is_in_bytes_on_every_system(monkeypatch):
    assert 2**20 < system.available_memory() < system.host_memory()
    monkeypatch.setattr(system.Path, "read_text", mock.Mock(side_effect=OSError))  # as on macOS
    assert system.available_memory() == system.host_memory()
    assert 2**24 < system.peak_host_memory() < 2**36
    monkeypatch.setattr(sys, "platform", "darwin")
    usage = SimpleNamespace(ru_maxrss=2**30)  # bytes there, KiB on Linux
    monkeypatch.setattr(system.resource, "getrusage", lambda _: usage)
    assert system.peak_host_memory() == 2**30


WITHOUT = """
import os, sys
sys.modules |= dict.fromkeys(("fcntl", "resource"))  # an import of None raises ImportError
del os.posix_fadvise, os.sched_getaffinity
sys.argv = sys.argv[1:]
"""


def run_without(code: str, *words) -> str:
    """Run code where Linux's and Unix's own modules are missing."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.robust  # starts torch several times
def test_commands_run_without_unix_modules(tmp_path):
    helps = "from alpaca.__main__ import VERBS, load_verb\nfor verb in VERBS: load_verb(verb)\n"
    helps += "import selfinstruct, weightdiff, fsdp_train\nassert sys.modules['fcntl'] is None"
    run_without(helps)
    verb = "from alpaca.__main__ import main; main()"
    assert "usage: alpaca generate" in run_without(verb, "alpaca", "generate", "--help")
    train = "import fsdp_train; from alpaca.training.process import run_rank\n"
    train += "run_rank(fsdp_train.main)"
    run = tmp_path / "run"
    words = ("--out", run, "--max-steps", 2, "--sample-answers", 1, "--save-every", 1)
    assert f"wrote {run}/model" in run_without(train, "fsdp_train.py", *words)
    answer = ("--model-dir", run / "model", "Name a color.", "--max-new-tokens", 3)
    assert run_without(verb, "alpaca", "generate", *answer).strip()
    made = ("make", "--base", "data/tiny-llama", "--tuned", run / "model", "--diff")
    diff = "import weightdiff\nfrom alpaca.common.errors import run_command\n"
    run_without(diff + "run_command(weightdiff.main)", "weightdiff.py", *made, tmp_path / "diff")
