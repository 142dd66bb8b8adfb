"""What the benchmarks share: their command line, peak memory, runs in turn, and tables.

Run by itself, it prints the introduction of bench/RESULTS.md.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from argparse import SUPPRESS
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from alpaca.common.cli import Parser

ROOT = Path(__file__).parent.parent
GPU_RESULTS = ROOT / "bench/results"  # tables that need a GPU, in files of their own
INTRODUCTION = """## Measurements

`make bench` writes this file. The sides of a comparison run in turn on the same machine; their
columns hold medians. The ratio says how many times better ours is, that is, how much faster, or how
much smaller where memory is compared: the median over all turns, and beside it their range.
"""
Figures = dict[str, dict[str, list[float]]]  # side → figure → one value for each run


# ---------------------------------------------------------------- command line and processes


def bench_parser(doc: str | None, runs: int = 0, internal: tuple[str, ...] = ()) -> Parser:
    """A parser with --runs, and with internal flags for the processes that a benchmark starts."""
    parser = Parser(description=doc)
    if runs:
        help = f"measured runs of each side (default: {runs})"
        parser.add_argument("--runs", type=int, default=runs, help=help)
    for flag in internal:
        parser.add_argument(flag, help=SUPPRESS)
    return parser


def module_command(module: str, **flags) -> list[str]:
    """`python -m module --flag=value …`, to be run in ROOT."""
    pairs = (f"--{name.replace('_', '-')}={value}" for name, value in flags.items())
    return [sys.executable, "-m", module, *pairs]


def run_in_process(module: str, timeout: float | None = None, **flags) -> dict:
    """The figures that a benchmark prints as JSON when it is run with internal flags."""
    command = module_command(module, **flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_in_turns(sides: dict[str, Callable[[], dict]], runs: int, warm_up: int = 1) -> Figures:
    """Run the sides in turn, a b a b …, and drop the figures of the first `warm_up` turns."""
    figures: Figures = {name: {} for name in sides}
    for turn in range(warm_up + runs):
        for name, side in sides.items():
            for figure, value in side().items():
                if turn >= warm_up:
                    figures[name].setdefault(figure, []).append(value)
    return figures


# ---------------------------------------------------------------- memory


def memory() -> dict[str, int]:
    """Bytes of this process in memory: its own (anonymous), and pages of files it has mapped."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class PeakMemory:
    """The highest `memory()` inside a `with` block, less what it was at the start."""

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


# ---------------------------------------------------------------- tables


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table_line(
    label: str, ours: list[float], peer: list[float], more_is_better: bool = False
) -> str:
    """A line of the table; its ratios are taken turn by turn."""
    pairs = zip(ours, peer, strict=True)
    ratios = sorted(a / b if more_is_better else b / a for a, b in pairs)
    medians = " | ".join(number(statistics.median(side)) for side in (ours, peer))
    ratio = f"**{statistics.median(ratios):.2f}×**"
    return f"| {label} | {medians} | {ratio} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"


def table(title: str, peer: str, lines: list[str], packages: list[str]) -> str:
    head = f"### {title}\n\n| measured | ours | {peer} | ratio | range |\n|---|---|---|---|---|"
    return "\n".join([head, *lines, "", stamp(packages), ""])


def gpu() -> str | None:
    import torch  # only here: some scripts measure how long importing it takes

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def stamp(packages: list[str]) -> str:
    """The date, the machine and the versions."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if name := gpu():
        machine = f"{name}, {machine}"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{time.strftime('%Y-%m-%d')}; {machine}; {versions}"


def store(folder: Path, name: str, text: str) -> None:
    """Print a table, and keep it as DATE-NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{time.strftime('%Y-%m-%d')}-{name}.md").write_text(text)
    print(text)


def stored(names: list[str], title: str) -> str:
    """The newest table of each name, for a machine without a GPU."""
    print("No GPU: nothing is measured; these are the newest tables.", file=sys.stderr)
    found = [sorted(GPU_RESULTS.glob(f"*-{name}.md"))[-1:] for name in names]
    tables = [file.read_text() for files in found for file in files]
    return "\n".join(tables) or f"### {title}\n\nNot measured yet.\n"


def gpu_parser(doc: str | None, parts: list[str]) -> Parser:
    """The flags that the benchmarks of a GPU share."""
    parser = bench_parser(doc, internal=("--side", "--seconds"))
    add = parser.add_argument
    add("--only", nargs="+", choices=parts, default=parts, help="parts to run (default: all)")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, of any size")
    add("--preset", default="7B", help="size of the random model (default: 7B)")
    add("--minutes", type=float, default=9.5, help="limit of each part (default: 9.5)")
    add("--out", type=Path, default=GPU_RESULTS, help="folder of the tables")
    return parser


def run_sides(module: str, sides: list[str], minutes: float, **flags) -> tuple[dict, list[str]]:
    """Run each side in a process of its own, as long as there is time: the figures of those that
    succeeded, and a line on each of the others."""
    end, figures, notes = time.monotonic() + 60 * minutes, {}, []
    for side in sides:
        left = end - time.monotonic()
        try:
            figures[side] = run_in_process(module, left, side=side, seconds=left, **flags)
        except subprocess.TimeoutExpired:
            notes.append(f"{side}: not measured, {minutes} minutes were over.")
        except SystemExit as failed:
            notes.append(f"{side}: not measured: {str(failed).splitlines()[-1]}")
            print(failed, file=sys.stderr)
    return figures, notes


def machine_rates(device: str) -> tuple[float, float]:
    """FLOP/s of a product of random bf16 matrices, and bytes/s, read and written, of a copy."""
    import torch

    size, count = (8192, 2**32) if device == "cuda" else (512, 2**26)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    source = torch.ones(count, device=device, dtype=torch.int8)
    target = torch.empty_like(source)

    def seconds(work: Callable) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return 2 * size**3 / seconds(lambda: a @ b), 2 * count / seconds(lambda: target.copy_(source))


if __name__ == "__main__":
    print(INTRODUCTION)
