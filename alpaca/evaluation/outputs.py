"""A set of instructions, a model's answers to it, and the answers of two models side by side.

    read_items(path)                the instructions of a set, or the answers in a file
    answered_here, answered_there   by a model folder, by any OpenAI-compatible server
    paired(model, baseline)         what each of two answered to the same instruction

A set is a JSON list or JSONL in any form that dataset.py reads: self-instruct's user-oriented one,
AlpacaEval's, ours. Answers are written as AlpacaEval's model_outputs.json, in which an instruction
is one text, its input behind it. That text is what tells instructions apart.

  - Every answer is on disk when it is made; what is there is not asked again.
  - Answer i is drawn from --seed + i: it does not depend on those made beside it, nor on a kill.
  - The longest prompts come first, those alike in length together: their rows are full at the same
    time, and what memory does not suffice for shows at once.
  - What got no answer is not in the file, and said. An empty answer is an answer.

Shown by tests/test_evaluate.py: test_killed_at_several_points_it_ends_in_the_same_file.
"""

import argparse
import asyncio
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, notice
from alpaca.common.files import append_jsonl, atomic_file, json_records, read_log
from alpaca.common.progress import Progress
from alpaca.datagen.formats import normalize_record, string_field
from alpaca.datagen.request_log import RequestLog, Teachers, ask_all, endpoint_from_args
from alpaca.inference import generate
from alpaca.inference.engine import Engine
from dataset import format_prompt

OUTPUTS, ANNOTATIONS = "model_outputs.json", "annotations.json"


class Item(NamedTuple):
    instruction: str
    input: str
    output: str  # a reference in a set, the answer in a file of answers
    generator: str
    dataset: str

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


class Made(NamedTuple):
    output: str
    cut: bool  # by the limit of tokens


def read_items(path: Path, answered: bool = False) -> list[Item]:
    """In the order of the file, each question once; one with two answers is refused."""
    path = path / OUTPUTS if path.is_dir() else path
    found: dict[str, Item] = {}
    twice = 0
    for place, raw in json_records(path):
        try:
            if isinstance(raw, dict) and not answered and "instances" not in raw:
                raw = {**raw, "output": ""}
            for case in normalize_record(raw):
                if "instruction" not in case:
                    raise UserError("it has no instruction")
                names = (string_field(raw, name, path.stem) for name in ("generator", "dataset"))
                item = Item(*case.values(), *names)
                same = found.setdefault(item.question, item)
                if answered and same.output != item.output:
                    raise UserError(f"{same.question[:60]!r} was answered before: keep one answer")
                if answered and same.generator != next(iter(found.values())).generator:
                    raise UserError(f"by {same.generator!r}, others are not: one model a file")
                twice += same is not item
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not found:
        raise UserError(f"{path}: no instructions in it")
    if twice:
        notice(f"{path}: {twice} are there before, and count once")
    return list(found.values())


def digest(items: Any) -> str:
    """Tells one set, or one model's answers to it, from another."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def stamp(folder: Path, out: Path) -> str:
    """Changes when a model is trained anew in the same place. Answers, in `out`, may lie there."""
    folder = folder.resolve()
    files = [f for f in folder.rglob("*") if f.is_file() and out not in f.parents]
    facts = [f.stat() for f in files]
    latest = max((fact.st_mtime_ns for fact in facts), default=0)
    written = datetime.fromtimestamp(latest // 10**9).isoformat(" ")
    size = sum(fact.st_size for fact in facts)
    return f"{folder}, {size} bytes, written {written}.{latest % 10**9:09}"


# ---------------------------------------------------------------- two models side by side


class Pair(NamedTuple):
    instruction: str  # with its input
    output_1: str  # the baseline's
    output_2: str  # the model's
    dataset: str


class Pairs(NamedTuple):
    model: str
    baseline: str
    all: list[Pair]


def paired(model: Path, baseline: Path, common: bool = False) -> Pairs:
    """`common`: what both have answered, where one has answered more than the other."""
    ours, theirs = (
        {item.question: item for item in read_items(path, answered=True)}
        for path in (model, baseline)
    )
    odd = ours.keys() ^ theirs.keys()
    both = [question for question in ours if question in theirs]
    if odd and not (common and both):
        where = model if min(odd) in ours else baseline
        raise UserError(
            f"{model} answers other instructions than {baseline}: {len(odd)} are in one of them "
            f"only ({min(odd)[:60]!r} in {where}): name two that answer the same"
            + (", or --common compares what both answer" if both else "")
        )
    names = (ours[both[0]].generator, theirs[both[0]].generator)
    if names[0] == names[1]:
        raise UserError(
            f"{model} and {baseline} are both by {names[0]!r}: the result would not tell who won; "
            '"generator" has the name, `answers --name` gives one'
        )
    if odd:
        notice(f"{len(odd)} that only one of them answers are left out")
    return Pairs(
        *names, [Pair(q, theirs[q].output, ours[q].output, theirs[q].dataset) for q in both]
    )


def annotation(pairs: Pairs, pair: Pair, annotator: str, preference: float | None) -> dict:
    """As AlpacaEval writes them; without a preference where there is no verdict."""
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


# ---------------------------------------------------------------- asking


def answered_here(items: dict[str, Item], args: argparse.Namespace, log: Path) -> dict[str, Made]:
    """By the model that the flags name, as `alpaca generate` would."""
    made = {}
    for number, line in enumerate(read_log(log), 1):
        if line.keys() != {"id", "output", "cut"}:
            raise UserError(f"{log}, line {number}: no answer as they are stored here")
        made[line["id"]] = Made(line["output"], line["cut"])
    left = [id for id in items if id not in made]
    if not left:
        return made
    engine = generate.ready(args)
    waiting = queued(engine, {id: items[id] for id in left}, args)
    progress = Progress(len(made) + len(waiting), "answers", done=len(made))
    while waiting:
        for sequence in engine.step():
            if sequence.finish_reason:
                sequence.check()
                cut = sequence.finish_reason == "length"
                id, one = waiting.pop(sequence), Made(sequence.text, cut)
                append_jsonl(log, {"id": id, **one._asdict()})
                made[id] = one
                progress.step()
    progress.close()
    return made


def queued(engine: Engine, items: dict[str, Item], args: argparse.Namespace) -> dict:
    """Sequence → id of what the model has room for."""
    encoded = {
        id: generate.question(item.instruction, item.input, engine.tokenizer)
        for id, item in items.items()
    }
    found: dict = {}
    for id in sorted(items, key=lambda id: -len(encoded[id])):
        way = generate.sampling(args, args.seed + int(id))
        try:
            found[engine.add(encoded[id], way)] = id
        except ValueError as mistake:
            notice(f"{items[id].question[:60]!r} is left out: {mistake}")
    return found


def answered_there(items: dict[str, Item], args: argparse.Namespace, log: Path) -> dict[str, Made]:
    """By a server: a chat gets the instruction as a user would say it, what only completes a text
    gets Alpaca's prompt."""
    endpoint = endpoint_from_args(args, "--model", args.model)
    options = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
    options |= {"top_p": args.top_p if args.top_p < 1 else None, "stop": args.stop or None}
    options |= args.request
    made: dict[str, Made] = {}

    async def one(teachers: Teachers, id: str, item: Item) -> None:
        chat = endpoint.kind == "chat"
        text = item.question if chat else format_prompt(item.instruction, item.input)
        if reply := await teachers.ask_until(id, lambda reply: reply, 1, text, options):
            made[id] = Made(reply.text, reply.cut)

    answers = RequestLog(log)
    if not asyncio.run(ask_all(answers, endpoint, args, items, one, "answers")):
        notice(f"the budget of ${args.budget:g} has no room for more: a larger one goes on")
    notice(f"${answers.spent:.4f} spent")
    return made


def write_outputs(file: Path, items: dict[str, Item], made: dict[str, Made], name: str) -> None:
    """In the order of the set; what has no answer is left out."""
    lines = [
        {
            "instruction": item.question,
            "output": made[id].output,
            "generator": name,
            "dataset": item.dataset,
        }
        for id, item in items.items()
        if id in made
    ]
    write_json(file, lines)


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
