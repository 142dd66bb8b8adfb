"""Answers to a file of instructions: in order, batched, and resumable.

    questions = read_questions("questions.jsonl")
    done = count_answered("answers.jsonl", questions, settings)   # of an earlier run
    for answer in answer_questions(engine, questions, params, done): …
    for sequences in answer_in_order(engine, [(ids, [params, …]), …]): …   # several of each prompt

Answer i is sampled with seed `params.seed` + i, so it is the same in any batch and after a resume.
"""

import argparse
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, join_names
from alpaca.common.json_files import check_shape, json_records, read_log
from alpaca.inference.engine import Engine
from alpaca.inference.prefix_tree import PREFIX_MEMORY
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence
from alpaca.weights.loading import load_from_args
from dataset import encode_prompt


def engine_from_args(args: argparse.Namespace, max_batch_size: int) -> Engine:
    model, tokenizer = load_from_args(args)
    return Engine(
        model, tokenizer, max_batch_size, compile=args.compile, prefix_memory=PREFIX_MEMORY
    )


def read_questions(path: Path) -> list[dict[str, str]]:
    """Instruction and input of each record of a JSON or JSONL file; other fields are ignored."""
    questions = []
    for place, record in json_records(path):
        check_shape(record, {"instruction": str, "input": str | None}, place)
        questions.append({"instruction": record["instruction"], "input": record.get("input") or ""})
    if not questions:
        raise UserError(f"{path}: no instructions in it")
    return questions


def settings_from_args(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """What the answers depend on; it is stored with each of them."""
    settings = {"model": str(args.model_dir.absolute()), "bits": args.bits}
    settings["sampling"] = vars(params) | {"stop": list(params.stop)}  # JSON has no tuples
    if args.adapter:
        settings["adapter"] = str(args.adapter.absolute())
    if args.template:
        settings["template"] = args.template
    return settings


def count_answered(
    out: Path, questions: list[dict], settings: dict[str, Any], field: str = "output"
) -> int:
    """How many questions have an answer in `out`; those must come first and have these settings."""
    count = 0
    for count, line in enumerate(read_log(out), 1):
        if count > len(questions):
            raise UserError(f"{out}, line {count}: more answers than questions: use another --out")
        if {**questions[count - 1], field: line.get(field), **settings} != line:
            changed = [name for name, value in settings.items() if line.get(name) != value]
            what = f"from a run that differs in {join_names(changed or ['instruction'])}"
            raise UserError(f"{out}, line {count}: {what}: use another --out")
    return count


def answer_questions(
    engine: Engine, questions: list[dict[str, str]], params: SamplingParams, done: int = 0
) -> Iterator[str]:
    """The answers to questions[done:], in order."""
    sequences = []
    for i, question in enumerate(questions[done:], done):
        try:
            ids = encode_prompt(**question, tokenizer=engine.tokenizer)
            sequences.append(engine.add(ids, replace(params, seed=params.seed + i)))
        except UserError as error:
            raise UserError(f"instruction {i + 1}: {error}") from None
    for sequence in sequences:
        engine.finish([sequence])  # the others of the batch advance too
        yield sequence.text


def answer_in_order(
    engine: Engine, requests: Iterable[tuple[list[int], list[SamplingParams]]]
) -> Iterator[list[Sequence]]:
    """For each (prompt, params of its answers) the finished answers. Few requests wait at once."""
    pending, requests = deque[list[Sequence]](), iter(requests)
    while True:
        while len(engine.waiting) < engine.max_batch_size and (new := next(requests, None)):
            pending.append([engine.add(new[0], params) for params in new[1]])
        if not pending:
            return
        if any(sequence.finish_reason is None for sequence in pending[0]):
            engine.step()
        else:
            yield engine.finish(pending.popleft())  # finished: only checks them
