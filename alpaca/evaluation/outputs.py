"""Evaluation sets, a model's answers to a set, and two models' answers side by side.

    read_items("data/eval_instructions.jsonl")         the instructions of a set
    read_items("runs/eval/tiny", answered=True)        a model's answers: its model_outputs.json
    pair_outputs("runs/eval/tiny", "runs/eval/base")   what both answered to each instruction

A set is a JSON list or JSONL in any format that alpaca/datagen/formats.py reads: the 252
user-oriented instructions of Self-Instruct (arXiv:2212.10560), AlpacaEval's set, ours. Answers are
stored in AlpacaEval's format, in which an instruction and its input are one text with a blank line
between them. That text identifies the instruction.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, errors_at, notice
from alpaca.common.files import write_text
from alpaca.common.json_files import json_records
from alpaca.datagen.formats import normalize_record, string_field

OUTPUTS = "model_outputs.json"


class Item(NamedTuple):
    instruction: str
    input: str
    output: str  # the model's answer, or a reference answer in a set
    generator: str  # the name of the model
    dataset: str

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


def read_items(path: Path, answered: bool = False) -> list[Item]:
    """The items of a file, or of the model_outputs.json in a folder, in order and without repeats.
    `answered`: outputs are one model's answers, so none may be missing or differ."""
    path = path / OUTPUTS if path.is_dir() else path
    items: dict[str, Item] = {}
    repeats = 0
    for place, record in json_records(path):
        with errors_at(place):
            for item in parse_items(record, path.stem, answered):
                first = items.setdefault(item.question, item)
                if answered and item.output != first.output:
                    raise UserError(f"a second answer to {item.question[:60]!r}: keep one")
                names = next(iter(items.values())).generator, item.generator
                if answered and names[0] != names[1]:
                    raise UserError(f"answers of {names[0]!r} and of {names[1]!r}: keep one model")
                repeats += item is not first
    if not items:
        raise UserError(f"{path}: no instructions in it")
    if repeats:
        notice(f"{path}: {repeats} repeated instructions skipped")
    return list(items.values())


def parse_items(record: Any, file_name: str, answered: bool) -> list[Item]:
    """A record may hold several inputs for its instruction, as Self-Instruct's do."""
    if isinstance(record, dict) and not answered and "instances" not in record:
        record = {**record, "output": ""}  # a set needs no reference answers
    cases = normalize_record(record)
    if "instruction" not in cases[0]:
        raise UserError("no instruction in it")
    names = [string_field(record, name, file_name) for name in ("generator", "dataset")]
    return [Item(*case.values(), *names) for case in cases]


class Pair(NamedTuple):
    instruction: str  # with its input
    output_1: str  # the baseline's
    output_2: str  # the model's
    dataset: str


class Pairs(NamedTuple):
    model: str
    baseline: str
    all: list[Pair]


def pair_outputs(model: Path, baseline: Path, common: bool = False) -> Pairs:
    """Both models' answers to each instruction. `common` leaves out what only one has answered."""
    ours, theirs = (
        {item.question: item for item in read_items(path, answered=True)}
        for path in (model, baseline)
    )
    shared = [question for question in ours if question in theirs]
    unpaired = ours.keys() ^ theirs.keys()
    if unpaired and not (common and shared):
        first = min(unpaired)
        raise UserError(
            f"{model} and {baseline} answer different instructions: {len(unpaired)} are in one of "
            f"them only, such as {first[:60]!r} in {model if first in ours else baseline}"
            + ("; --common compares those that both answer" if shared else "")
        )
    if unpaired:
        notice(f"{len(unpaired)} instructions that only one of them answers are left out")
    names = ours[shared[0]].generator, theirs[shared[0]].generator
    if names[0] == names[1]:
        raise UserError(
            f"{model} and {baseline} are both by {names[0]!r}, so the result could not say which "
            'one won: change "generator" in one of them, or give `alpaca answers` a --name'
        )
    pairs = [Pair(q, theirs[q].output, ours[q].output, theirs[q].dataset) for q in shared]
    return Pairs(*names, pairs)


def add_pair_arguments(parser) -> None:
    """The arguments of every command that compares two models; for `pair_outputs`."""
    add = parser.add_argument
    add("model", type=Path, help="model_outputs.json of the model, or a folder with one")
    add("baseline", type=Path, help="the same for the model it is compared with")
    add("--common", action="store_true", help="compare only the instructions that both answer")


def digest(content: Any) -> str:
    """Identifies a set, or a model's answers to it."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))
