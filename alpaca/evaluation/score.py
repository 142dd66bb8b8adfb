"""Win rates from annotation files, as a table, as JSON or as a picture.

    alpaca score runs/judged
    alpaca score runs/judged other/annotations.json --plot win-rates.svg
    alpaca score published/*.json --lc-file df_gamed.csv

The files are AlpacaEval's (annotations.py); published ones are read as they are. Several files are
scored on the instructions that all of them have. What the columns mean: win_rate.py.

The length-controlled rate comes from a joint fit of all models, or as in AlpacaEval 2 from a file:
df_gamed.csv of https://huggingface.co/datasets/tatsu-lab/alpaca_eval, which is about AlpacaEval's
805 instructions. With its instruction_difficulty.csv the rates, called noreg, were 2.2 points from
the published ones on average, 13.7 at most. A model alone has no such rate without a file: fitted
without the instructions' difficulties, it was further off (5.5 points) than the raw rate is (4.8).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from alpaca.common import charts
from alpaca.common.errors import escape_control
from alpaca.common.files import write_text
from alpaca.evaluation.annotations import ANNOTATIONS
from alpaca.evaluation.win_rate import Z, leaderboard


def sort_rows(rows: list[dict]) -> list[dict]:
    """The best first, by length-controlled rate if every model has one."""
    rates = ("length_controlled_win_rate", "win_rate")
    name = next(name for name in rates if all(row[name] is not None for row in rows))
    return sorted(rows, key=lambda row: -row[name])


def format_table(rows: list[dict]) -> str:
    """A footer names what is the same in all rows."""
    rows = sort_rows(rows)
    lines = [format_cells(row) for row in rows]
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    footer = []
    prefixes = {"baseline": "against", "judge": "judged by", "length control": "length control:"}
    for name, prefix in prefixes.items():
        if len(set(columns[name])) == 1 and (value := columns.pop(name)[0]):
            footer.append(f"{prefix} {escape_control(value)}")
    shown = [[name, *cells] for name, cells in columns.items() if any(cells)]
    lines = [align_columns([*zip(*shown, strict=True)])]
    if footer:
        lines.append(", ".join(footer))
    if any(row["length_control"] is None for row in rows):
        lines.append(
            "no length-controlled rate for one model alone: `alpaca score` takes more, or --lc-file"
        )
    return "\n".join(lines)


def align_columns(lines: Sequence[Sequence[str]]) -> str:
    lines = [list(map(escape_control, line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


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
        "length control": row["length_control"] or "",
        "won–lost–drawn": f"{row['n_wins']}–{row['n_losses']}–{row['n_draws']}",
        "n": str(row["n"]),
        "missing": str(row["n_missing"] or ""),
        "length": f"{row['mean_length']:.0f}:{row['baseline_mean_length']:.0f}",
        "flips": "" if row["flip_rate"] is None else f"{100 * row['flip_rate']:.0f} %",
        "sign test": f"{row['sign_test']:.2g}",
        "": row["verdict"],
    }


def format_rate(rate: float | None, error: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def plot_win_rates(rows: list[dict]) -> str:
    """Raw and length-controlled rates of each model with their 95 % intervals, as an SVG."""
    varying = [name for name in ("baseline", "annotator") if len({row[name] for row in rows}) > 1]
    bars = {}
    for row in sort_rows(rows):
        kinds = {"win rate": (row["win_rate_low"], row["win_rate"], row["win_rate_high"])}
        rate, error = row["length_controlled_win_rate"], row["length_controlled_standard_error"]
        if rate is not None:
            reach = Z * error if error is not None else math.nan  # no bar
            kinds["length-controlled"] = max(rate - reach, 0), rate, min(rate + reach, 100)
        bars[", ".join(row[name] for name in ("model", *varying))] = kinds
    return charts.interval_chart("Win rates in per cent, with 95 % intervals", bars, 0, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="annotations.json, or folders with one")
    add("--lc-file", type=Path, metavar="CSV", help="AlpacaEval's file for length control")
    add("--json", action="store_true", help="print all columns, in the order of the files")
    add("--plot", type=Path, metavar="FILE", help="SVG of the win rates to write")


def run(args: argparse.Namespace) -> None:
    files = [path / ANNOTATIONS if path.is_dir() else path for path in args.files]
    rows = leaderboard(files, args.lc_file)
    if args.plot:
        write_text(args.plot, plot_win_rates(rows))
    print(json.dumps(rows, indent=2, ensure_ascii=False) if args.json else format_table(rows))
