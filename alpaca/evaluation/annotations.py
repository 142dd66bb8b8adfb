"""Preferences between two models' answers, in the format of AlpacaEval's annotations.json.

    {"instruction": …, "output_1": …, "output_2": …, "generator_1": "base", "generator_2": "tuned",
     "annotator": "gpt-4.1", "preference": 1.83, "swapped": false}

output_1 is the baseline's answer, output_2 the model's. The preference runs from 1 (output_1 is
better) to 2 (output_2 is better); 1.5, and 0 in old files, is a draw; null, NaN or none at all is
no verdict. We compute with score = preference - 1, from 0 to 1.

`swapped` says that the judge saw output_2 first (the preference is about output_2 all the same).
Judges favour a position, so ours see every pair in both orders, and the mean of the two scores is
one observation. If one of the two has no verdict, the pair has none: the other would say as much
about the position as about the answers. A flip is a winner that changes with the order.

With simulated annotators (annotators.py), `drawn` names the one of the pool `annotator`, and
`flipped` says that the judge preferred the other answer, and the preference was turned round.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alpaca.common.errors import UserError, errors_at
from alpaca.common.json_files import check_shape, json_records
from alpaca.datagen.preferences import parse_preference
from alpaca.evaluation.outputs import Pair, Pairs

ANNOTATIONS = "annotations.json"
Names = tuple[str, str, str]  # model, baseline, annotator
Orders = dict[bool, tuple[tuple[str, str], float]]  # swapped → (baseline's, model's output), score
SHAPE = dict.fromkeys(("generator_2", "generator_1", "instruction", "output_1", "output_2"), str)
SHAPE |= {"annotator": str | None, "swapped": bool | None}


def make_annotation(pairs: Pairs, pair: Pair, annotator: str, preference: float | None) -> dict:
    return {
        "instruction": pair.instruction,
        "output_1": pair.output_1,
        "generator_1": pairs.baseline,
        "dataset": pair.dataset,
        "output_2": pair.output_2,
        "generator_2": pairs.model,
        "annotator": annotator,
        "preference": preference,
    }


@dataclass(frozen=True)
class Comparison:
    """One annotator's scores of a model against a baseline on N instructions."""

    source: Path
    model: str
    baseline: str
    annotator: str
    instructions: list[str]
    scores: np.ndarray  # (N), 0 the baseline is better … 1 the model is, nan no verdict
    lengths: np.ndarray  # (2, N), characters of the baseline's and of the model's answers
    flips: np.ndarray  # (N), 1 the winner changed with the order, 0 it did not, nan unknown

    @property
    def names(self) -> Names:
        return self.model, self.baseline, self.annotator

    def select(self, instructions: list[str]) -> "Comparison":
        place = {text: i for i, text in enumerate(self.instructions)}
        keep = [place[text] for text in instructions]
        arrays = self.scores[keep], self.lengths[:, keep], self.flips[keep]
        return Comparison(self.source, *self.names, instructions, *arrays)


def read_annotations(path: str | Path) -> list[Comparison]:
    """The comparisons in a file, a JSON list or JSONL: one for each model, baseline, annotator."""
    found: dict[Names, dict[str, Orders]] = {}
    for place, record in json_records(path):
        check_shape(record, SHAPE, place)
        names = record["generator_2"], record["generator_1"], record.get("annotator") or ""
        outputs, swapped = (record["output_1"], record["output_2"]), bool(record.get("swapped"))
        orders = found.setdefault(names, {}).setdefault(record["instruction"], {})
        text = f"{place}: {record['instruction'][:60]!r}"
        if swapped in orders:
            raise UserError(f'{text} again in the same order: keep one, or set "swapped": true')
        if any(other != outputs for other, _ in orders.values()):
            raise UserError(f"{text} has other outputs in the other order: keep one pair")
        with errors_at(place):
            orders[swapped] = outputs, parse_preference(record.get("preference"))
    if not found:
        raise UserError(f"{path}: no annotations in it")
    return [merge_orders(Path(path), names, orders) for names, orders in found.items()]


def merge_orders(path: Path, names: Names, annotations: dict[str, Orders]) -> Comparison:
    """One score per instruction. If any instruction was judged in both orders, all must be."""
    orders = max(map(len, annotations.values()))
    scores = np.full((orders, len(annotations)), math.nan)
    for i, by_order in enumerate(annotations.values()):
        if len(by_order) == orders:
            scores[:, i] = [score for _, score in by_order.values()]
    margins = scores - 0.5
    both = ~np.isnan(margins).any(0) & (orders == 2)
    flips = np.where(both, margins[0] * margins[-1] < 0, math.nan)
    outputs = [next(iter(by_order.values()))[0] for by_order in annotations.values()]
    lengths = np.array([[len(text) for text in pair] for pair in outputs], float).T
    return Comparison(path, *names, list(annotations), scores.mean(0), lengths, flips)
