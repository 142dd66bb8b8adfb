"""What every benchmark shares: peak memory, alternated runs, one table."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"  # tables of machines that not everybody has


def memory() -> dict[str, int]:
    """Bytes of this process in memory: its own (anonymous), and pages of files it has mapped."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class PeakMemory:
    """Highest `memory()` inside a `with` block, beyond what there was at its start."""

    def __enter__(self) -> "PeakMemory":
        self.start = memory()
        self.anonymous = self.mapped = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while True:
            now = memory()
            self.anonymous = max(self.anonymous, now["RssAnon"] - self.start["RssAnon"])
            self.mapped = max(self.mapped, now["RssFile"] - self.start["RssFile"])
            if self.stop.wait(0.002):
                return


def alternate(
    sides: dict[str, Callable[[], dict]], runs: int, warm_up: int = 1
) -> dict[str, dict[str, list]]:
    """Run the sides in turn, a b a b …, the first `warm_up` times without counting."""
    found: dict[str, dict[str, list]] = {name: {} for name in sides}
    for turn in range(warm_up + runs):
        for name, side in sides.items():
            for figure, value in side().items():
                if turn >= warm_up:
                    found[name].setdefault(figure, []).append(value)
    return found


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def row(what: str, ours: list[float], peer: list[float], more_is_better: bool = False) -> str:
    """A line of the table; the ratio is how many times better ours is, turn by turn."""
    pairs = list(zip(ours, peer, strict=True))
    ratios = sorted(a / b if more_is_better else b / a for a, b in pairs)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    middle = [number(statistics.median(side)) for side in (ours, peer)]
    return (
        f"| {what} | {middle[0]} | {middle[1]} | **{statistics.median(ratios):.2f}×** | {spread} |"
    )


def table(title: str, peer: str, rows: list[str], packages: list[str]) -> str:
    lines = [
        f"### {title}",
        "",
        f"| what | ours | {peer} | ratio | spread |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *rows, "", stamp(packages), ""])


def gpu() -> str | None:
    import torch  # only here: some scripts measure what importing it takes

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def stamp(packages: list[str]) -> str:
    """When, on what and with which versions."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    machine = f"{gpu()}, {machine}" if gpu() else machine
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{time.strftime('%Y-%m-%d')}; {machine}; {versions}"


def kept(file: str, title: str, measured: Callable[[], str]) -> str:
    """A table that needs a GPU: measured where there is one and kept in bench/results/, elsewhere
    as it was kept."""
    if gpu():
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / file).write_text(measured())
    elif not (RESULTS / file).exists():
        return f"### {title}\n\nNot yet measured.\n"
    return (RESULTS / file).read_text()
