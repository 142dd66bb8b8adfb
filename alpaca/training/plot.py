"""The losses of training runs as a picture and as a table, also while they train.

    alpaca plot runs/tiny
    alpaca plot runs/alpaca runs/dpo --out losses.svg --csv losses.csv

A step's loss depends on its examples, so a line is the mean over a step and its neighbours, a 25th
of the run on either side; the picture of one run has the single steps, too. Held-out values are
points: between two of them, nothing was measured. Losses that differ by more than a factor of 20
get a logarithmic scale. With --objective group, rewards are plotted.
"""

import argparse
import csv
import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from alpaca.common.charts import Series, line_chart
from alpaca.common.errors import UserError
from alpaca.common.files import atomic_file, refuse_same
from alpaca.common.json_files import check_shape, read_log

METRICS = "metrics.jsonl"
NUMBER = int | float
STEP = ("loss", "tokens", "tokens_per_s")  # in the record of every step
Metrics = list[dict[str, Any]]


def read_metrics(file: Path) -> Metrics:
    """The records of steps, and those of held-out figures."""
    records = list(read_log(file))
    for record in records:
        names = (*STEP, *record) if "loss" in record else record
        check_shape(record, dict.fromkeys(names, NUMBER) | {"step": int}, str(file))
    return records


def series(records: Metrics, figure: str) -> Series:
    return [(r["step"], r[figure]) for r in records if figure in r]


def smoothed(points: Series) -> Series:
    """Each y as the mean over its neighbours; near the start, over as few as lie before it."""
    y, most = np.array([b for _, b in points]), len(points) // 25
    spans = (slice(i - min(i, most), i + min(i, most) + 1) for i in range(len(y)))
    return [(a, float(y[span].mean())) for (a, _), span in zip(points, spans, strict=True)]


def round_starts(records: Metrics) -> dict[str, float]:
    """The steps after which a new round through the examples begins, ten of them at most."""
    steps = [record for record in records if record.get("epoch", 0) > 0]
    if not steps:  # logged by an older version
        return {}
    length, rounds = steps[0]["step"] / steps[0]["epoch"], math.ceil(steps[-1]["epoch"])
    every = math.ceil(rounds / 10)
    return {f"epoch {n + 1}": n * length for n in range(every, rounds, every)}


def plot_run(records: Metrics, figure: str) -> str:
    """The steps as they are, too; the learning rate; ticks where rounds begin."""
    steps = series(records, figure)
    return line_chart(
        figure.capitalize(),
        "step",
        lines={"training": smoothed(steps)},
        points={"held out": series(records, f"held_out_{figure}")},
        thin={"training": steps},
        ticks=round_starts(records),
        strip={"learning rate": series(records, "lr")},
    )


def compare_runs(runs: dict[str, Metrics], figure: str) -> str:
    lines = {name: smoothed(series(records, figure)) for name, records in runs.items()}
    points = {name: series(records, f"held_out_{figure}") for name, records in runs.items()}
    return line_chart(f"{figure.capitalize()}, held out as points", "step", lines, points)


def write_csv(file: IO, runs: dict[str, Metrics]) -> None:
    """A line for every step of every run."""
    lines: dict[tuple, dict] = {}
    for name, records in runs.items():
        for record in records:
            lines.setdefault((name, record["step"]), {"run": name}).update(record)
    names = dict.fromkeys(name for each in lines.values() for name in each)
    writer = csv.DictWriter(file, [*names], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folders of training runs")
    out = Path("losses.svg")
    add("--out", type=Path, default=out, metavar="FILE", help=f"SVG to write (default: {out})")
    add("--csv", type=Path, metavar="FILE", help="also write all figures of all steps as CSV")


def run(args: argparse.Namespace) -> None:
    refuse_same("--out", args.out, "--csv", args.csv)
    above, runs = os.path.commonpath([folder.resolve().parent for folder in args.runs]), {}
    for folder in args.runs:
        runs[os.path.relpath(folder.resolve(), above)] = records = read_metrics(folder / METRICS)
        if not series(records, "loss"):
            raise UserError(f"{folder}: no step in a {METRICS}: give folders of training runs")
    rewards = all(series(records, "reward") for records in runs.values())
    figure = "reward" if rewards else "loss"
    first, *others = runs.values()
    picture = compare_runs(runs, figure) if others else plot_run(first, figure)
    with atomic_file(args.out, "w") as file:
        file.write(picture)
        if args.csv:  # both or, after an error, neither
            with atomic_file(args.csv, "w") as table:
                write_csv(table, runs)
    print("wrote", *(out for out in (args.out, args.csv) if out))
