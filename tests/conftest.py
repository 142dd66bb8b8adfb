"""Fixtures of all tests, and the table of distances that `make verify` ends with."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they save

import pytest
import torch
from helpers.parity import DISTANCES

import alpaca.__main__
from alpaca.common.errors import run_command
from alpaca.common.files import INPUTS
from alpaca.inference.engine import Engine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """A test's folder is its tier: tests/robust, tests/parity and tests/real mark theirs."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in ("robust", "parity", "real"):
            item.add_marker(folder)


@pytest.fixture(autouse=True)
def clean_state(monkeypatch):
    """Every test starts from the same seed and leaves no dtype or process group behind. The
    memory of this process is measured by some tests: it must not keep what others have freed."""
    monkeypatch.setattr("alpaca.weights.loading.keep_freed_memory", lambda **_: None)
    torch.manual_seed(0)
    INPUTS.clear()
    yield
    torch.set_default_dtype(torch.float32)
    assert torch.is_grad_enabled(), "this test turned gradients off for all that follow"
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_terminal_summary(terminalreporter, config):
    if DISTANCES and config.option.markexpr == "parity":
        terminalreporter.section("how far apart")
        terminalreporter.write_line(f"{'':64}{'largest':>10}{'allowed':>10}{'compared':>10}")
        for what, (largest, allowed, count) in DISTANCES.items():
            terminalreporter.write_line(f"{what:64}{largest:10.2g}{allowed:10.2g}{count:10}")


@pytest.fixture
def asked(monkeypatch):
    """The prompts that an engine gets."""
    prompts, add = [], Engine.add

    def record(self, prompt, *rest):
        prompts.append(prompt)
        return add(self, prompt, *rest)

    monkeypatch.setattr(Engine, "add", record)
    return prompts


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a module's command line in this process: command(module, *args) -> (code, out, err)."""

    def invoke(module, *args) -> tuple[int, str, str]:
        name, main = "alpaca", alpaca.__main__.main
        if isinstance(module, str):  # a verb
            args = module, *args
        else:
            name, main = module.__name__ + ".py", module.main
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        INPUTS.clear()  # of another command, which had a process to itself
        code = 0
        try:
            run_command(main)
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return invoke
