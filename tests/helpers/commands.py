"""Commands run as people run them: in this process, or in one of their own that is killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from alpaca.__main__ import VERBS, main

ROOT = Path(__file__).parent.parent.parent
FORKS = multiprocessing.get_context("forkserver")


def our_modules() -> list[Path]:
    """The product's modules, without scripts that a reader tries out at the root."""
    words = ["git", "ls-files", "*.py"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [n for n in listed.stdout.split() if "/" not in n or n.startswith("alpaca/")]
    files = [ROOT / name for name in names] or [*ROOT.glob("*.py"), *ROOT.glob("alpaca/**/*.py")]
    return [file for file in files if file.exists()]


def module_name(file: Path) -> str:
    """`alpaca.common.files` for alpaca/common/files.py, `alpaca.common` for its __init__.py."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in our_modules()}


def begin(verb: str, *args) -> multiprocessing.Process:
    """`alpaca VERB …` in a process of its own, to be killed. It is forked from one that has the
    verb's module imported, which takes seconds, and has not computed anything."""
    FORKS.set_forkserver_preload(["alpaca.__main__", VERBS[verb][0]])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        process = FORKS.Process(target=run_as_command, args=(verb, *map(str, args)))
        process.start()
    return process


def run_as_command(*words: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a background
    sys.argv = ["alpaca", *words]
    main()


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """One line on stderr that says all of `words`, exit code 2."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert err.count("\n") == 1 and len(err) < 550 and out == "", (out, err)
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
