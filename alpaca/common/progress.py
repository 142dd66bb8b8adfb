"""One progress line: done/total, rate, time left; nearly silent when piped into a file."""

import math
import sys
import time
from contextlib import suppress
from typing import IO

QUIET_SECONDS = 30.0  # how often a progress line appears where nobody watches it move


class Progress:
    """A line that redraws itself: `12/290 tensors  4.1 tensors/s  1:08 left  (more)`.

    Work that goes on from an earlier run has `done` some of it already."""

    def __init__(self, total: float, unit: str, stream: IO[str] | None = None, done: float = 0):
        self.total, self.unit, self.stream = total, unit, stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = self.before = done
        self.start, self.width = time.monotonic(), 0
        self.shown = -math.inf if self.live else self.start

    def step(self, amount: float = 1, more: str = "") -> None:
        self.done += amount
        if time.monotonic() - self.shown >= (0.1 if self.live else QUIET_SECONDS):
            self.shown = time.monotonic()
            self._show(more, end="\r" if self.live else "\n")

    def close(self, more: str = "") -> None:
        """The last line stays, on a terminal and in a log alike."""
        self._show(more, end="\n")

    def _show(self, more: str, end: str) -> None:
        seconds = time.monotonic() - self.start
        rate = (self.done - self.before) / max(seconds, 1e-9)
        left = f"{clock((self.total - self.done) / rate if rate else math.inf)} left"
        parts = [
            f"{human(self.done)}/{human(self.total)} {self.unit}",
            f"{human(rate)} {self.unit}/s",
            left if self.done < self.total else f"in {clock(seconds)}",
        ]
        line = "  ".join(part for part in (*parts, more) if part)
        with suppress(BrokenPipeError):  # nobody watches any more; the work goes on
            print(line.ljust(self.width), end=end, file=self.stream, flush=True)
        self.width = len(line) if self.live else 0


def human(number: float) -> str:
    """7, 3.2, 512, 14.3K, 6.7G: few enough figures for a person to compare."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= max(size, 1e4) - size / 2e4:  # 999,960 reads 1.0M, not 1000.0K
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.2g}"


def clock(seconds: float) -> str:
    """0:07, 12:30, 3:05:00, or ? when nobody can know yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
