"""Win rates from annotation files, as a table, as JSON or as a picture.

    alpaca score runs/judged
    alpaca score runs/judged other/annotations.json --common --plot win-rates.svg

The files are AlpacaEval's (annotations.py); published ones are read as they are. Several files must
be about the same instructions; --common restricts them to those that all have. What the columns
mean: win_rate.py.
"""

import argparse
import json
import math
from pathlib import Path

from alpaca.common import charts
from alpaca.common.errors import escape_control
from alpaca.common.files import atomic_file
from alpaca.evaluation.annotations import ANNOTATIONS
from alpaca.evaluation.win_rate import Z, leaderboard


def format_table(rows: list[dict]) -> str:
    """The best by length-controlled rate first. A footer names what is the same in all rows."""
    rows = sorted(rows, key=lambda row: -row["length_controlled_win_rate"])
    lines = [format_cells(row) for row in rows]
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    footer = []
    for name, prefix in (("baseline", "against"), ("judge", "judged by")):
        if len(set(columns[name])) == 1 and (value := columns.pop(name)[0]):
            footer.append(f"{prefix} {escape_control(value)}")
    shown = [[name, *map(escape_control, cells)] for name, cells in columns.items() if any(cells)]
    widths = [max(map(len, column)) for column in shown]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*shown, strict=True)
    ]
    return "\n".join([*text, ", ".join(footer)] if footer else text)


def format_cells(row: dict) -> dict[str, str]:
    return {
        "model": row["model"],
        "baseline": row["baseline"],
        "judge": row["annotator"],
        "win rate": format_rate(row["win_rate"], row["standard_error"]),
        "95 %": f"{row['win_rate_low']:.1f}–{row['win_rate_high']:.1f}",
        "length-controlled": format_rate(
            row["length_controlled_win_rate"], row["length_controlled_standard_error"]
        ),
        "won–lost–drawn": f"{row['n_wins']}–{row['n_losses']}–{row['n_draws']}",
        "n": str(row["n"]),
        "missing": str(row["n_missing"] or ""),
        "length": f"{row['mean_length']:.0f}:{row['baseline_mean_length']:.0f}",
        "flips": "" if row["flip_rate"] is None else f"{100 * row['flip_rate']:.0f} %",
        "sign test": f"{row['sign_test']:.2g}",
        "": row["verdict"],
    }


def format_rate(rate: float, error: float | None) -> str:
    return f"{rate:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def plot_win_rates(rows: list[dict]) -> str:
    """Raw and length-controlled rates of each model with their 95 % intervals, as an SVG."""
    varying = [name for name in ("baseline", "annotator") if len({row[name] for row in rows}) > 1]
    bars = {}
    for row in sorted(rows, key=lambda row: -row["length_controlled_win_rate"]):
        rate, error = row["length_controlled_win_rate"], row["length_controlled_standard_error"]
        reach = Z * error if error is not None else math.nan  # no bar
        bars[", ".join(row[name] for name in ("model", *varying))] = {
            "win rate": (row["win_rate_low"], row["win_rate"], row["win_rate_high"]),
            "length-controlled": (max(rate - reach, 0), rate, min(rate + reach, 100)),
        }
    return charts.interval_chart("Win rates in per cent, with 95 % intervals", bars, 0, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="annotations.json, or folders with one")
    add("--common", action="store_true", help="use only the instructions that all files have")
    add("--json", action="store_true", help="print all columns, in the order of the files")
    add("--plot", type=Path, metavar="FILE", help="SVG of the win rates to write")


def run(args: argparse.Namespace) -> None:
    files = [path / ANNOTATIONS if path.is_dir() else path for path in args.files]
    rows = leaderboard(files, args.common)
    if args.plot:
        with atomic_file(args.plot, "w") as file:
            file.write(plot_win_rates(rows))
    print(json.dumps(rows, indent=2, ensure_ascii=False) if args.json else format_table(rows))
