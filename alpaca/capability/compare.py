"""Style beside capability: what do people and judges prefer, and what do the models know?

    alpaca compare runs/eval/* runs/judged runs/blind runs/known runs/mmlu --out compare.html

Models fine-tuned on a better model's answers win comparisons by their style, and know no more than
before ("The False Promise of Imitating Proprietary LLMs", arXiv:2305.15717). This page shows both
sides. It reads, as files or as folders that hold them,

    annotations.json      win rates: `alpaca judge`, `alpaca blind`, AlpacaEval's own files
    results.json          accuracies and refusals: `alpaca benchmark`
    model_outputs.json    answers: `alpaca answers`

and groups them by the model's name. What was not measured is blank. Intervals are Wilson's, 95 %.
The score of an instruction is the mean of a file's annotators, as `alpaca blind` counts raters.

The mean accuracy is over the benchmarks that all models in the picture have; its interval combines
theirs (the distance to a bound is the root of the sum of squares, divided by their number). Of the
answers, distinct-n (arXiv:1510.03055) is the share of different ones among all runs of n words, in
all answers together: it falls with the amount of text. An answer repeats itself if any four words
come again in the same order.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from alpaca.common import charts
from alpaca.common.errors import UserError, join_names, notice
from alpaca.common.files import read_text, write_text
from alpaca.common.json_files import check_shape, json_records, read_json
from alpaca.datagen.overlap import grams
from alpaca.evaluation.annotations import ANNOTATIONS, read_annotations
from alpaca.evaluation.outputs import OUTPUTS, read_items
from alpaca.evaluation.score import align_columns
from alpaca.evaluation.win_rate import wilson
from rougel import tokenize_unicode

FILES = ANNOTATIONS, "results.json", OUTPUTS
BOUNDS = "accuracy_low", "accuracy", "accuracy_high"
ACCURACY = {"task": str, "subject": str, "n": int} | dict.fromkeys(BOUNDS, int | float)
RATES = "rate_low", "rate", "rate_high"
REFUSAL_ROW = {"name": str, "n": int} | dict.fromkeys(RATES, int | float)
REPEATED = 4  # words
STYLE, CAPABILITY, TEXT = range(3)


class Measure(NamedTuple):
    kind: int
    about: str  # the baseline of a win rate, the name of a benchmark
    text: str


Found = tuple[Measure, str, Any, set[str]]  # measure, model, value, instructions if they matter
Measures = dict[Measure, dict[str, Any]]  # measure → model → value
Interval = tuple[float, float, float]  # low, middle, high, in per cent

# ---------------------------------------------------------------- reading


def read_measures(paths: Iterable[Path]) -> Measures:
    """Style first, then capability, then text. Figures of different instructions may stand beside
    each other, with a notice."""
    measures: Measures = defaultdict(dict)
    asked: dict[Measure, tuple[Path, set[str]]] = {}  # of the first file
    for path in find_files(paths):
        for measure, model, value, instructions in read_file(path):
            if model in measures[measure]:
                raise UserError(
                    f"{path}: {measure.text} of {model} a second time: leave out one of its files, "
                    "or answer with another --name"
                )
            measures[measure][model] = value
            first, others = asked.setdefault(measure, (path, instructions))
            if apart := len(others ^ instructions):
                notice(f"{path} and {first}: {apart} instructions are in one only ({measure.text})")
    return dict(sorted(measures.items(), key=lambda item: item[0].kind))


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        files = [path / name for name in FILES if (path / name).exists()]
        if path.is_dir() and not files:
            raise UserError(f"{path}: none of {', '.join(FILES)} is in it")
        yield from files or [path]


def read_file(path: Path) -> Iterator[Found]:
    """The fields of its first record say what a file holds."""
    try:
        record = json.loads(read_text(path))
    except (ValueError, RecursionError):  # JSONL, or damaged
        record = next(json_records(path), ("", None))[1]
    record = record[0] if isinstance(record, list) and record else record
    for field, read in (("generator_2", win_rates), ("results", accuracies), ("output", answers)):
        if isinstance(record, dict) and field in record:
            return read(path)
    raise UserError(f"{path}: neither annotations, nor results of a benchmark, nor answers")


def win_rates(path: Path) -> Iterator[Found]:
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    annotators: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for one in read_annotations(path):
        for text, score in zip(one.instructions, one.scores.tolist(), strict=True):
            if not math.isnan(score):
                scores[one.model, one.baseline][text].append(score)
                annotators[one.model, one.baseline][one.annotator] = None
    if not scores:
        raise UserError(f"{path}: no preference in it is a number: judge it again")
    for (model, baseline), by_text in scores.items():
        wins, n = sum(map(mean, by_text.values())), len(by_text)
        low, high = wilson(wins, n)
        judges = f"win rate against {baseline} ({join_names(annotators[model, baseline])})"
        measure = Measure(STYLE, baseline, judges.removesuffix(" ()"))
        yield measure, model, (100 * low, 100 * wins / n, 100 * high), {*by_text}


def accuracies(path: Path) -> Iterator[Found]:
    found = read_json(path, {"generator": str, "shots": int, "results": [ACCURACY]})
    for row in found["results"]:
        if not row["subject"]:  # of the whole benchmark
            text = f"{row['task']}, {found['shots']} shots, {row['n']:,} questions"
            measure = Measure(CAPABILITY, row["task"], text)
            yield measure, found["generator"], percentages(row, BOUNDS, path), set()
    check_shape(refusals := found.get("refusals", []), [REFUSAL_ROW], f"{path}: refusals")
    for row in refusals:  # no accuracy: declining everything is no capability
        measure = Measure(TEXT, "", f"{row['name']}, in % of {row['n']}")
        yield measure, found["generator"], percentages(row, RATES, path), set()


def percentages(row: dict[str, Any], names: Iterable[str], path: Path) -> tuple[float, ...]:
    for name in names:
        if not 0 <= row[name] <= 100:
            raise UserError(f"{path}: {name} is {row[name]:g}, 0 to 100 was expected")
    return tuple(row[name] for name in names)


def answers(path: Path) -> Iterator[Found]:
    items = read_items(path, answered=True)
    asked = {item.question for item in items}
    yield Measure(TEXT, "", "answers"), items[0].generator, len(items), asked
    for name, value in describe_answers([item.output for item in items]).items():
        yield Measure(TEXT, "", name), items[0].generator, value, set()


def describe_answers(texts: list[str]) -> dict[str, float]:
    words = [tokenize_unicode(text) for text in texts]
    repeating = [any(k > 1 for k in Counter(grams(answer, REPEATED)).values()) for answer in words]
    return {
        "mean length in characters": float(mean(map(len, texts))),
        "distinct-1 in %": distinct(words, 1),
        "distinct-2 in %": distinct(words, 2),
        f"answers with {REPEATED} words twice, in %": 100.0 * mean(repeating),
    }


def distinct(answers: list[list[str]], n: int) -> float:
    all_of_them = [gram for words in answers for gram in grams(words, n)]
    return 100 * len(set(all_of_them)) / max(len(all_of_them), 1)


# ---------------------------------------------------------------- the page


def table_lines(measures: Measures) -> list[list[str]]:
    """A line for each measure, a column for each model."""
    models = list(dict.fromkeys(model for values in measures.values() for model in values))
    lines = [["", *models]]
    for measure, values in measures.items():
        cells = {model: format_value(value) for model, value in values.items()}
        if measure.kind == STYLE:
            cells.setdefault(measure.about, "baseline")
        lines.append([measure.text, *(cells.get(model, "") for model in models)])
    return lines


def format_value(value: Interval | float) -> str:
    if isinstance(value, tuple):
        return "{1:.1f} ({0:.1f}–{2:.1f})".format(*value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def mean_interval(intervals: list[Interval]) -> Interval:
    """Of independent figures. Distances to the bounds add up as standard errors do."""
    middle = mean(middle for _, middle, _ in intervals)
    down = math.hypot(*(middle - low for low, middle, _ in intervals)) / len(intervals)
    up = math.hypot(*(high - middle for _, middle, high in intervals)) / len(intervals)
    return middle - down, middle, middle + up


def plot_measures(measures: Measures) -> str:
    """Style above capability as an SVG, for the win rate that most models with accuracies have; ""
    if there is none. The baseline's win rate is 50 % by definition."""
    known = {each: values for each, values in measures.items() if each.kind == CAPABILITY}
    able = dict.fromkeys(model for values in known.values() for model in values)
    placed: dict[str, dict[str, Interval]] = {}
    for judges, rates in measures.items():
        if judges.kind == STYLE and able.keys() & rates.keys():
            rates = {judges.about: (50.0, 50.0, 50.0)} | rates
            placed[judges.text] = {model: rates[model] for model in able if model in rates}
    judges, rates = max(placed.items(), key=lambda item: len(item[1]), default=("", {}))
    known = {each: values for each, values in known.items() if rates.keys() <= values.keys()}
    if not rates or not known:
        return ""
    x_label = "mean accuracy on " + join_names([benchmark.about for benchmark in known], 5)
    points = {m: (mean_interval([a[m] for a in known.values()]), rates[m]) for m in rates}
    title = "Win rate (up) and mean accuracy (right), in %"
    return charts.scatter_chart(title, x_label, judges, points)


def render_page(lines: list[list[str]], figure: str) -> str:
    head, *rest = [[charts.clean(cell) for cell in line] for line in lines]
    rows = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    for name, *cells in rest:
        rows.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    figure = figure or "<p>No picture: no benchmark was run on all models with a win rate.</p>"
    table = "\n".join(["<table>", *rows, "</table>"])
    note = "<p>In brackets: 95 % intervals. What was not measured is blank.</p>"
    return charts.html_page("Style beside capability", f"{figure}\n{table}\n{note}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="RESULT", help="folders or files of results")
    add("--out", type=Path, metavar="FILE", help="page to write, with a picture")


def run(args: argparse.Namespace) -> None:
    measures = read_measures(args.results)
    lines = table_lines(measures)
    if args.out:
        write_text(args.out, render_page(lines, plot_measures(measures)))
    print(align_columns(lines))
