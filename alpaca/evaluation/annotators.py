"""Simulated annotators: a pool of judges, from which one is drawn for each comparison.

    alpaca judge runs/eval/mine runs/eval/base --out runs/judged --judge gpt-4.1 \\
        --annotators data/annotators.json --flip 0.25 --single-order

People disagree with each other, and with themselves. AlpacaFarm (arXiv:2305.14387) simulates this
with 13 prompts, of which one is drawn at random for each comparison, and by flipping 25 % of the
verdicts. Without --single-order, annotators and flips are drawn for each of a pair's two orders,
and one flip turns two equal verdicts into a draw.

The pool is a JSON list; what an entry leaves out comes from the flags:

    [{"name": "plain", "weight": 2},
     {"name": "brief", "question": "Which answer says it in fewer words?", "temperature": 1},
     {"name": "other", "model": "my-model", "base_url": "http://localhost:8000/v1"}]

The fields are name, question, temperature, and those of endpoints.py. The question replaces the
first paragraph of the judge's; the texts between marks and the form of the reply stay.

Annotator and flip of a comparison follow from the seed and its number: a resumed run draws the
same. The annotators are asked one after the other.
"""

import argparse
import random
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, replace_surrogates
from alpaca.common.json_files import check_shape, json_records
from alpaca.datagen.endpoints import Endpoint, endpoint_from_args, parse_endpoint

OWN_FIELDS = {"name": str, "question": str | None, "temperature": int | float | None}


class Annotator(NamedTuple):
    name: str
    endpoint: Endpoint
    question: str = ""  # in place of the judge's
    temperature: float | None = None  # in place of the flags'

    def settings(self) -> list[Any]:
        """What its verdicts depend on."""
        own = self.endpoint
        of_endpoint = [own.model, own.base_url, own.kind, own.weight]
        return [self.name, self.question, self.temperature, *of_endpoint]


def read_annotators(args: argparse.Namespace) -> list[Annotator]:
    """The annotators of a file, or the one that --judge names."""
    if not args.annotators:
        if not args.judge:
            raise UserError("--judge names the model that judges, --annotators a file with several")
        return [Annotator(args.judge, endpoint_from_args(args, args.judge))]
    pool: dict[str, Annotator] = {}
    for place, entry in json_records(args.annotators):
        if not args.judge and isinstance(entry, dict) and "model" not in entry:
            raise UserError(f"{place} names no model: give --judge, or add one")
        endpoint = parse_endpoint(entry, place, args, OWN_FIELDS, model=args.judge)
        check_shape(entry, OWN_FIELDS, place)
        name, question = (replace_surrogates(entry.get(key) or "") for key in ("name", "question"))
        if not name or name in pool:
            raise UserError(f"{place}: name {name!r}: each annotator needs a name of its own")
        pool[name] = Annotator(name, endpoint, question, entry.get("temperature"))
    if not pool:
        raise UserError(f"{args.annotators}: no annotators in it")
    return list(pool.values())


def draw_annotator(
    id: str, pool: list[Annotator], args: argparse.Namespace
) -> tuple[Annotator, bool]:
    """The annotator of a comparison, and whether its verdict is flipped."""
    rng = random.Random(f"{args.seed} {id} annotator")
    (annotator,) = rng.choices(pool, [one.endpoint.weight for one in pool])
    return annotator, rng.random() < args.flip
