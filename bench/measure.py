"""What the benchmarks share: command line, runs in turn, peak memory, a machine's limits, tables.

python -m bench.measure     # the lowest median of every ratio in bench/results: what to quote
"""

import json
import os
import platform
import re
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
RESULTS = ROOT / "bench/results"  # a file a day
TURNS = 5  # a comparison of fewer is printed, but not stored
INTRODUCTION = """The sides of a comparison ran in turn on the same machine; their columns hold
medians. The ratio says how many times better ours was, that is, how much faster, or how much
smaller where memory is compared: the median over all turns, and beside it their range.
"""
Figures = dict[str, dict[str, list[float]]]  # side → figure → one value for each run


# ---------------------------------------------------------------- command line and processes


def bench_parser(doc: str | None, runs: bool = False, internal: tuple[str, ...] = ()) -> Parser:
    """A parser with --runs, and with internal flags for the processes that a benchmark starts."""
    parser = Parser(description=doc)
    if runs:
        help = f"measured runs of each side (default: {TURNS}; the table of fewer is not stored)"
        parser.add_argument("--runs", type=int, default=TURNS, help=help)
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


# ---------------------------------------------------------------- what the machine can do


def fastest(work: Callable, device: str) -> float:
    """Seconds of the fastest run within a second, of at least three."""
    import torch  # only here: some scripts measure how long importing it takes

    times, end = [], time.perf_counter() + 1
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_rate(device: str = "cpu", count: int = 0) -> float:
    """GB/s at which a sum reads `count` fp32 numbers (0: 1 GiB of them, 4 on a GPU)."""
    import torch

    numbers = torch.ones(count or 1 << (30 if device == "cuda" else 28), device=device)
    return numbers.nbytes / fastest(numbers.sum, device) / 1e9


def matmul_rate(dtype: str, device: str = "cpu") -> float:
    """GFLOP/s of a product of two square matrices."""
    import torch

    size = 8192 if device == "cuda" else 1024
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a, b = torch.randn(2, size, size, device=device, dtype=kind)
    return 2 * size**3 / fastest(lambda: a @ b, device) / 1e9


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


def report(title: str, peer: str, lines: list[tuple], packages: list[str], *notes: str) -> None:
    """Print the table of a comparison, whose lines are arguments of `table_line`; store it if it
    has enough turns."""
    turns = min(len(ours) for _, ours, *_ in lines)
    head = f"| measured | ours | {peer} | ratio | range of {turns} turns |"
    text = [f"### {title}", "", head, "|---|---|---|---|---|", *(table_line(*x) for x in lines)]
    text += ["", stamp(packages), *(f"\n{note}" for note in notes), ""]
    (store if turns >= TURNS else print)("\n".join(text))


def gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def stamp(packages: list[str]) -> str:
    """The date, the machine and the versions."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if name := gpu():
        machine = f"{name}, {machine}"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{time.strftime('%Y-%m-%d')}; {machine}; {versions}"


def tables_in(text: str) -> dict[str, str]:
    """Title → table."""
    parts = text.split("### ")[1:]
    return {part.partition("\n")[0]: f"### {part.rstrip()}\n" for part in parts}


def store(text: str, folder: Path = RESULTS) -> None:
    """Print a table, and keep it in DATE.md, in place of an earlier one of the day."""
    print(text, flush=True)
    file = folder / f"{time.strftime('%Y-%m-%d')}.md"
    tables = tables_in(file.read_text()) if file.exists() else {}
    file.write_text("\n".join([INTRODUCTION, *(tables | tables_in(text)).values()]))


def lowest(folder: Path = RESULTS) -> dict[tuple[str, str], tuple[float, str]]:
    """(title, what was measured) → the lowest median ratio of all days, and its file's name."""
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for file in sorted(folder.glob("*.md")):
        for title, table in tables_in(file.read_text()).items():
            for measured, ratio in re.findall(r"(?m)^\| (.+?) \|.*\*\*([\d.]+)×\*\*", table):
                median = float(ratio), file.stem
                found[title, measured] = min(median, found.get((title, measured), median))
    return found


# ---------------------------------------------------------------- GPU


def gpu_parser(doc: str | None, parts: list[str]) -> Parser:
    """The flags that the benchmarks of a GPU share."""
    parser = bench_parser(doc, internal=("--side", "--seconds"))
    add = parser.add_argument
    add("--only", nargs="+", choices=parts, default=parts, help="parts to run (default: all)")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, of any size")
    add("--preset", default="7B", help="size of the random model (default: 7B)")
    add("--minutes", type=float, default=9.5, help="limit of each part (default: 9.5)")
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


if __name__ == "__main__":
    for (title, measured), (ratio, day) in lowest().items():
        print(f"{ratio:8.2f}×  {day}  {title}: {measured}")
