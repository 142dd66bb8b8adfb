"""A user's error is one line and exit code 2; a bug keeps its traceback."""

import shlex
import subprocess
import sys
import types

import pytest
from helpers.commands import ROOT, assert_refused

from alpaca.common.errors import UserError, join_names


def failing(error):
    def main():
        raise error

    return types.SimpleNamespace(__name__="tool", main=main)


def test_user_error_is_one_line_and_exit_2(command, tmp_path):
    assert_refused(command(failing(UserError("line 3:\n  no field"))), "tool.py: error: line 3: no")

    tool = types.SimpleNamespace(__name__="tool", main=(tmp_path / "absent").read_bytes)
    assert_refused(command(tool), f"{tmp_path}/absent: No such file or directory")


def test_long_error_keeps_its_beginning_and_its_end(command):
    error = UserError("config.json: " + 99_999 * "\x1b" + " is not a name")
    assert_refused(command(failing(error)), r"config.json: \x1b\x1b", r"\x1b is not a name")


def test_bug_keeps_its_traceback(command):
    for bug in (AssertionError("a bug"), ValueError("numpy's, not the user's")):
        with pytest.raises(type(bug)):
            command(failing(bug))


def test_user_error_traceback_on_request(command, monkeypatch):
    monkeypatch.setenv("ALPACA_TRACEBACK", "1")
    with pytest.raises(UserError):
        command(failing(UserError("x")))


def test_ctrl_c_is_130_and_other_ranks_are_silent(command, monkeypatch):
    assert command(failing(KeyboardInterrupt())) == (130, "", "tool.py: interrupted\n")
    monkeypatch.setenv("RANK", "3")
    assert command(failing(UserError("every rank meets this"))) == (2, "", "")


def test_closed_pipe_is_no_error():
    program = "from alpaca.common import errors\n"
    program += "errors.run_command(lambda: [print('x' * 999) for _ in range(9999)])"
    run = subprocess.run(
        f"{sys.executable} -c {shlex.quote(program)} | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (141, "")


def test_join_names_cuts_a_long_list():
    assert join_names("abc") == "a, b, c"
    assert join_names("abcdefghij") == "a, b, c and 7 more"
    assert join_names(["x" * 199]) == "x" * 119 + "…"
