"""Commands run as people run them: in this process, or in one of their own that is killed."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from alpaca.common.errors import run_command

ROOT = Path(__file__).parent.parent.parent
FORKS = multiprocessing.get_context("forkserver")


def our_modules() -> list[Path]:
    """The modules of the product, and not a script that a reader tries out there."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "alpaca/*.py"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    names = [n for n in listed.stdout.split() if "/" not in n or n.startswith("alpaca/")]
    return [ROOT / name for name in names] or [*ROOT.glob("*.py"), *ROOT.glob("alpaca/**/*.py")]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


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
    run_command(importlib.import_module(module).main)


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """One line on stderr that says all of `words`, exit code 2."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert err.count("\n") == 1 and out == "", (out, err)
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
