"""Answers to many prompts: in order, batched, and resumable.

done = count_answered("samples.jsonl", records, settings)     # of an earlier run
for sequences in answer_in_order(engine, [(ids, [params, …]), …]): …   # several of each prompt
"""

import argparse
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, join_names
from alpaca.common.json_files import check_shape, json_records, read_log
from alpaca.inference.engine import Engine
from alpaca.inference.prefix_tree import PREFIX_MEMORY
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence
from alpaca.weights.loading import load_from_args


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


def count_answered(out: Path, records: list[dict], settings: dict[str, Any]) -> int:
    """How many records have answers in `out`; those must come first and have these settings."""
    count = 0
    for count, line in enumerate(read_log(out), 1):
        if count > len(records):
            raise UserError(f"{out}, line {count}: more answers than records: use another --out")
        if {**records[count - 1], "outputs": line.get("outputs"), **settings} != line:
            changed = [name for name, value in settings.items() if line.get(name) != value]
            what = f"from a run that differs in {join_names(changed or ['instruction'])}"
            raise UserError(f"{out}, line {count}: {what}: use another --out")
    return count


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
