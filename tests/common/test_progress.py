"""One progress line, on a terminal, in a log and when nobody reads it."""

import io
import shlex
import subprocess
import sys
import time

from helpers.commands import ROOT

from alpaca.common import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_rare_in_a_log(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen, log = Terminal(), io.StringIO()
    shown, logged = progress.Progress(200, "steps", screen), progress.Progress(200, "steps", log)
    for _ in range(200):
        now[0] += 1
        shown.step(extra="loss 1.5")
        logged.step()
    shown.close()
    logged.close()
    assert screen.getvalue().count("\n") == 1 and screen.getvalue().count("\r") == 200
    assert "50/200 steps  1 steps/s  2:30 left  loss 1.5" in screen.getvalue()
    lines = log.getvalue().splitlines()
    assert len(lines) == 7 and lines[0].startswith("30/200 steps")
    assert lines[-1] == "200/200 steps  1 steps/s  in 3:20"


def test_numbers_and_durations_are_short():
    pairs = {0: "0", 7: "7", 0.123: "0.12", 3.25: "3.2", 512.6: "513", 9999: "9999"}
    for number, text in {
        **pairs,
        14300: "14.3K",
        999999: "1.0M",
        6.7e9: "6.7G",
        2e12: "2.0T",
    }.items():
        assert progress.short_number(number) == text
    for seconds, text in {7: "0:07", 750: "12:30", 11100: "3:05:00", float("inf"): "?"}.items():
        assert progress.duration(seconds) == text


def test_closed_stderr_does_not_stop_the_work(tmp_path):
    program = f"""
from alpaca.common import errors, progress
progress.LOG_INTERVAL = 0
def main():
    bar = progress.Progress(999, "steps")
    for _ in range(999): bar.step()
    errors.notice("nearly")
    open({str(tmp_path / "done")!r}, "w").close()
errors.run_command(main)"""
    run = subprocess.run(
        f"{sys.executable} -c {shlex.quote(program)} 2>&1 | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and (tmp_path / "done").exists()
