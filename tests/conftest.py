"""What the tests share: tiny models that can tell right from wrong, and a way to run a command.

`initializer_range` 0.2 is what makes parity tests able to fail: with the usual 0.02 a wrong rotary
layout moves a tiny model's logits by 0.003, with 0.2 by several units.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import console
from model import Llama, LlamaConfig

ROOT = Path(__file__).parent.parent
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def clean_state():
    """Every test starts from the same seed and leaves no dtype or process group behind."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def our_modules() -> list[Path]:
    """The modules at the top of the repository, and not a script that a reader tries out there."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = [name for name in listed.stdout.split() if "/" not in name]
    return [ROOT / name for name in names] or sorted(ROOT.glob("*.py"))


def small_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **changes})


def small_model(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(small_config(**changes))


def random_ids(*shape: int, vocab_size: int = 128) -> torch.Tensor:
    return torch.randint(vocab_size, shape)


def hf_model(config: LlamaConfig, dtype: torch.dtype = torch.float32):
    """A Hugging Face model of the same shape with random weights."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    fields = {k: v for k, v in vars(config).items() if k != "rope_theta"}
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(HFConfig(**fields, rope_parameters=rope, pad_token_id=None))
    with torch.no_grad():  # norms start at 1, where a wrong product with the weight would not show
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


DISTANCES: dict[str, tuple[float, float, int]] = {}  # what → largest, allowed, how many compared


def apart(what: str, distance: float, allowed: float) -> None:
    """How far this project is from outside software: an assertion, and a line of `make verify`."""
    largest, _, count = DISTANCES.get(what, (0.0, 0.0, 0))
    DISTANCES[what] = max(largest, distance), allowed, count + 1
    assert distance <= allowed, f"{what}: {distance} apart, {allowed} allowed"


def pytest_terminal_summary(terminalreporter, config):
    if DISTANCES and config.option.markexpr == "outside":
        terminalreporter.section("how far apart")
        terminalreporter.write_line(f"{'':64}{'largest':>10}{'allowed':>10}{'compared':>10}")
        for what, (largest, allowed, count) in DISTANCES.items():
            terminalreporter.write_line(f"{what:64}{largest:10.2g}{allowed:10.2g}{count:10}")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a module's command line in this process: command(module, *args) -> (code, out, err)."""

    def invoke(module, *args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        code = 0
        try:
            console.run(module.main)
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return invoke


FORKS = multiprocessing.get_context("forkserver")


def begin(module: str, *args) -> multiprocessing.Process:
    """A command in a process of its own, to be killed. It is forked from one that has the module
    imported, which takes seconds, and has not computed anything."""
    FORKS.set_forkserver_preload([module])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        process = FORKS.Process(target=run_as_command, args=(module, *map(str, args)))
        process.start()
    return process


def run_as_command(module: str, *args: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a background
    sys.argv = [f"{module}.py", *args]
    console.run(importlib.import_module(module).main)


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """One line on stderr that says all of `words`, exit code 2."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert err.count("\n") == 1 and out == "", (out, err)
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
