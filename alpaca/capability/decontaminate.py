"""Find training records that overlap an evaluation set, and write the data without them.

    alpaca decontaminate data/sample_train.json --against data/sample_heldout.json
    alpaca decontaminate alpaca_data.json dolly.jsonl --out clean.json \\
        --against gsm8k.jsonl mmlu/test/*.csv hellaswag_val.jsonl

Both are read in any of the published forms (alpaca/datagen/formats.py). A set needs no answers, and
may also be a benchmark (tasks.py), whose questions are compared alone and with their choices, or a
folder with a model's answers. All pairs of twins are listed (overlap.py says what they are). --out
is a JSON list of all other records, each as it was in its file; a conversation or a record with
several instances goes as a whole. Of DATA given as FILE:WEIGHT, all records are compared.
"""

import argparse
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from alpaca.capability.tasks import ExamQuestion, find_form, read_tasks
from alpaca.common.errors import UserError
from alpaca.common.files import refuse_existing
from alpaca.common.json_files import json_records
from alpaca.datagen.curate import printable
from alpaca.datagen.formats import Reading, load_placed, normalize_all, parse_weight
from alpaca.datagen.overlap import Twin, find_twins, questions_of
from alpaca.evaluation.outputs import OUTPUTS, save_json

ALL_REPLIES = Reading(oasst="all")  # of OpenAssistant's trees: training may use any


class PlacedText(NamedTuple):
    place: str  # "set.jsonl, line 3"
    text: str


def is_benchmark(path: Path) -> bool:
    """Its first record says so."""
    with suppress(UserError):
        first = None if ".csv" in path.suffixes else next(json_records(path), ("", None))[1]
        return ".csv" in path.suffixes or bool(find_form(first, ""))
    return False


def exam_texts(question: ExamQuestion) -> list[str]:
    """A question of a benchmark alone, and with its choices: data may have it either way."""
    prompt = re.sub(r"^(Question|Q): |\n(Answer|A):$", "", question.options[0][0])
    answers = dict.fromkeys(answer for _, answer in question.options)
    if question.task in ("mmlu", "gsm8k", "safety"):  # in the prompt, or none
        answers = {}
    return list(dict.fromkeys((prompt.partition("\nA. ")[0], " ".join((prompt, *answers)))))


def read_set(path: Path) -> list[PlacedText]:
    """The questions of an evaluation set or data file, in the order of its records."""
    path = path / OUTPUTS if path.is_dir() else path
    if is_benchmark(path):
        asked = read_tasks([path])
        return [PlacedText(each.place, text) for each in asked for text in exam_texts(each)]
    records = (
        (place, {**raw, "output": ""} if isinstance(raw, dict) else raw)  # needs no answers
        for place, raw in json_records(path)
    )
    found = normalize_all(records, ALL_REPLIES)
    questions = [PlacedText(place, questions_of(c)[0]) for place, _, cases in found for c in cases]
    if not questions:
        raise UserError(f"{path}: no questions in it")
    return questions


def describe_twin(twin: Twin, record: PlacedText, item: PlacedText) -> str:
    """Three lines: where they are and how much they have in common, then both texts."""
    places = f"{printable(record.place, 120)} and {printable(item.place, 120)}"
    common = {
        "equal": "equal",
        "contained": f"the record has {twin.score:.0%} of the item's 8-grams",
        "similar": f"ROUGE-L {twin.score:.2f}",
    }[twin.kind]
    return f"{places}: {common}\n    {printable(record.text)}\n    {printable(item.text)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA", help="training data, as for fsdp_train.py --data")
    add("--against", nargs="+", type=Path, required=True, metavar="SET", help="evaluation sets")
    add("--out", type=Path, help="JSON file to write: the data without the records listed")


def run(args: argparse.Namespace) -> None:
    if args.out:
        refuse_existing(args.out)
    files = dict.fromkeys(parse_weight(spec)[0] for spec in args.data)
    placed = [record for file in files for record in load_placed(file, ALL_REPLIES)]
    records = [case for *_, case in placed]
    items = [question for path in args.against for question in read_set(path)]
    raw = {place: record for place, record, _ in placed}
    pairs: dict[tuple[str, str], Twin] = {}
    for twin in find_twins(records, [item.text for item in items]):
        pairs.setdefault((placed[twin.record][0], items[twin.item].place), twin)
    for twin in pairs.values():
        record = PlacedText(placed[twin.record][0], questions_of(records[twin.record])[0])
        print(describe_twin(twin, record, items[twin.item]))
    kinds = Counter(twin.kind for twin in pairs.values())
    counts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
    overlapping, hit = ({pair[i] for pair in pairs} for i in (0, 1))
    total = len({item.place for item in items})
    text = f"{len(overlapping):,} of {len(raw):,} records overlap {len(hit):,} of {total:,} items"
    print(f"{text}; twins: {counts}" if pairs else text)
    if args.out:
        clean = [record for place, record in raw.items() if place not in overlapping]
        save_json(args.out, clean)
        print(f"wrote {args.out}: {len(clean):,} records")
