"""One progress line: done/total, rate, time left. A log file gets it every 30 seconds."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, TypeVar

T = TypeVar("T")
LOG_INTERVAL = 30.0  # seconds between lines where no terminal shows them


class Progress:
    """A line that redraws itself: `12/290 tensors  4.1 tensors/s  1:08 left  (extra)`.

    A resumed run passes what is `done` already, which does not count for the rate."""

    def __init__(self, total: float, unit: str, stream: IO[str] | None = None, done: float = 0):
        self.total, self.unit, self.stream = total, unit, stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = self.done_before = done
        self.start, self.width = time.monotonic(), 0
        self.last_shown = -math.inf if self.live else self.start

    def step(self, amount: float = 1, extra: str = "") -> None:
        self.done += amount
        if time.monotonic() - self.last_shown >= (0.1 if self.live else LOG_INTERVAL):
            self.last_shown = time.monotonic()
            self._show(extra, end="\r" if self.live else "\n")

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each a step once it has been dealt with."""
        for item in items:
            yield item
            self.step()

    def close(self, extra: str = "") -> None:
        """Print the last line, which stays, on a terminal and in a log alike."""
        self._show(extra, end="\n")

    def _show(self, extra: str, end: str) -> None:
        seconds = time.monotonic() - self.start
        rate = (self.done - self.done_before) / max(seconds, 1e-9)
        left = f"{duration((self.total - self.done) / rate if rate else math.inf)} left"
        parts = [
            f"{short_number(self.done)}/{short_number(self.total)} {self.unit}",
            f"{short_number(rate)} {self.unit}/s",
            left if self.done < self.total else f"in {duration(seconds)}",
        ]
        line = "  ".join(part for part in (*parts, extra) if part)
        with suppress(BrokenPipeError):  # the reader is gone; the work continues
            print(line.ljust(self.width), end=end, file=self.stream, flush=True)
        self.width = len(line) if self.live else 0


def short_number(number: float) -> str:
    """7, 3.2, 512, 14.3K, 6.7G: as many digits as a person compares."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= max(size, 1e4) - size / 2e4:  # 999,960 is 1.0M, not 1000.0K
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.2g}"


def duration(seconds: float) -> str:
    """0:07, 12:30, 3:05:00, or ? while it is unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
