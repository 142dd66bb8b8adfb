"""Draw several answers to each instruction: what best-of, expert iteration and preferences need.

    alpaca samples --data data/sample_train.json --n 4 --temperature 1 --out runs/samples.jsonl
    alpaca samples --model-dir alpaca-7b --bits 4 --data alpaca_data.json:0.1 --n 16 \\
        --temperature 0.7 --top-p 0.9 --out runs/samples-7b.jsonl

--data takes files and weights as fsdp_train.py does. A line of --out is a record, whose `output`
stays the reference, with `outputs`: the n answers to its question, which for a conversation is all
before its last answer. A prompt that is too long for the model has no answers.

Answer j to record i has a seed of its own, made of --seed, i and j. It depends neither on the
answers decoded beside it nor on n. A record is on disk as soon as all its answers are there; the
same command resumes.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from alpaca.common.cli import positive
from alpaca.common.errors import UserError, join_names, notice
from alpaca.common.files import lock_output
from alpaca.common.json_files import append_jsonl, read_log
from alpaca.common.progress import Progress
from alpaca.datagen.formats import load_mixture
from alpaca.evaluation.answers import identify_model
from alpaca.inference.answer import answer_in_order, engine_from_args
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import (
    SamplingParams,
    add_sampling_arguments,
    derive_seed,
    sampling_from_args,
)
from alpaca.weights.loading import add_model_arguments
from dataset import question_ids


def settings_from_args(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """What the answers depend on; it is stored with each of them."""
    name, files = identify_model(args)
    settings = {"generator": name, "n": args.n, "model": str(args.model_dir.absolute())}
    settings |= {"bits": args.bits, "files": files}
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


def requests(
    engine: Engine, records: list[dict], params: SamplingParams, n: int, done: int
) -> Iterator[tuple[list[int], list[SamplingParams]]]:
    """The prompt of each of records[done:], and the parameters of its answers."""
    for i, record in enumerate(records[done:], done):
        ids = question_ids(record, engine.tokenizer)
        if too_long := len(ids) >= engine.max_length:
            notice(f"record {i + 1} gets no answers: its prompt is too long for the model")
        seeds = [derive_seed(params.seed, i, j) for j in range(0 if too_long else n)]
        yield ids, [replace(params, seed=seed) for seed in seeds]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("samples").add_argument
    add("--data", nargs="+", required=True, metavar="FILE[:WEIGHT]", help="records to answer")
    add("--out", type=Path, required=True, help="JSONL file to append to; it is resumed")
    add("--n", type=positive(int, 10_000), default=4, help="answers to each (default: 4)")
    add("--name", help="name of the model in --out (default: its folder's)")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    params = sampling_from_args(args)
    if params.temperature == 0 and args.n > 1:
        raise UserError("all answers would be equal: give a --temperature above 0, such as 1")
    records = load_mixture(args.data, args.seed)[0]
    if any("text" in record for record in records):
        raise UserError("--data has records of plain text: they ask nothing; remove them")
    settings = settings_from_args(args, params)
    with lock_output(args.out):
        done = count_answered(args.out, records, settings)
        engine = engine_from_args(args, args.max_batch_size)
        progress = Progress(len(records), "records", done=done)
        answers = answer_in_order(engine, requests(engine, records, params, args.n, done))
        for record, sequences in zip(records[done:], answers, strict=True):
            outputs = [sequence.text for sequence in sequences]
            append_jsonl(args.out, {**record, "outputs": outputs, **settings})
            progress.step()
        progress.close(str(args.out))
