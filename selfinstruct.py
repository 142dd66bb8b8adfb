"""Self-instruct: from a few seed tasks to as many instructions as wanted, written by a teacher.

    python selfinstruct.py generate --out runs/data --num 52000 --teacher gpt-4.1-mini \\
        --price-in 0.4 --price-out 1.6 --budget 100       # the key is in $OPENAI_API_KEY
    python selfinstruct.py generate --out runs/mine --num 500 --teacher my-model \\
        --base-url http://localhost:8000/v1               # any OpenAI-compatible server
    python selfinstruct.py export runs/data --out alpaca_data.json

Alpaca's recipe: show the teacher three seed tasks and ask for 20; parse its answer; drop what a
text model cannot do; drop what has a ROUGE-L above 0.7 with a seed or an earlier instruction.

  - --seed and i determine request i, and answers are filtered in the order of their numbers:
    whatever the order of arrival, the same answers make the same records.
  - DIR/responses.jsonl has every answer as it came, on disk before it is used. The same command
    resumes after a kill, also with a larger --num, and asks only what is missing: at most the
    requests in flight at the kill are asked again. Ctrl-C and SIGTERM wait for these.
  - Several teachers (--teachers FILE, see alpaca/datagen/endpoints.py) share the requests by
    weight. The provenance in a record has its teacher, prompt seeds and time.

Self-Instruct arXiv:2212.10560; Alpaca: crfm.stanford.edu/2023/03/13/alpaca.html.
"""

import argparse
import asyncio
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpaca import CHECKOUT
from alpaca.common.cli import Parser, positive, utf8_text
from alpaca.common.errors import UserError, run_command
from alpaca.common.files import read_text, write_text
from alpaca.common.json_files import json_records
from alpaca.common.run_folder import run_folder
from alpaca.datagen.client import Reply
from alpaca.datagen.endpoints import (
    Endpoint,
    add_server_arguments,
    endpoint_from_args,
    read_teachers,
)
from alpaca.datagen.formats import normalize_all, read_source
from alpaca.datagen.four_stage import SelfInstruct
from alpaca.datagen.generation import RecordStore, Scheduler
from alpaca.datagen.prompts import Task, alpaca_prompt, parse_tasks, reject_reason
from alpaca.datagen.request_log import RequestLog, Teachers, reply_of, run_until_signal
from rougel import Pool, most_similar, tokenize, tokenize_unicode

MAX_ROUGE_L = 0.7  # with the most similar earlier instruction
PROMPT_SEEDS = 3
SEEDS, PROMPT = CHECKOUT / "data/seed_tasks.jsonl", CHECKOUT / "data/prompt.txt"
OPTIONS = {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0, "stop": ["\n20", "20."]}


def judge_answer(entry: dict, recipe, store: RecordStore, limit: float) -> list[dict]:
    """Parse an answer, filter its tasks, and keep at most `limit` of them. Returns the tasks' lines
    for records.jsonl and, with the reason in `why`, rejected.jsonl."""
    reply, lines = reply_of(entry), []
    for number, task in enumerate(recipe.parse(reply) if reply else []):
        item = f"{entry['id']}.{number}"
        if item in store.decided:  # by an earlier run
            continue
        if limit <= 0:
            break
        line: dict[str, Any] = {"item": item, "instruction": task.instruction}
        line |= {"input": task.input, "output": task.output}
        if reason := task.reason or reject_reason(task.instruction, store.any_script):
            line["why"] = reason
        else:
            scores = store.pool.scores(task.instruction)  # ROUGE-L with the seeds and all kept
            nearest = {store.pool.texts[i]: score for i, score in most_similar(scores, 10)}
            text, highest = next(iter(nearest.items()))
            if highest > MAX_ROUGE_L:
                line |= {"similar_to": text, "similarity": highest, "why": "similar"}
            else:
                line["most_similar_instructions"] = nearest
                line["avg_similarity_score"] = float(scores.mean())
                line["provenance"] = entry["provenance"]
                limit -= 1
        store.decide(line)
        lines.append(line)
    return lines


async def generate(recipe, store: RecordStore, scheduler: Scheduler) -> None:
    """Alpaca's loop: seeds → prompt → teacher → parse → filters → ROUGE-L ≤ 0.7 → keep.

    The scheduler sends the teachers recipe.prompt(0), recipe.prompt(1), …, many at once, and hands
    out their answers in this order. `recipe` is an Alpaca or a SelfInstruct (four_stage.py)."""
    async with scheduler:
        async for entry in scheduler.answers():
            limit = math.inf if recipe.whole_answers else scheduler.missing()
            lines = await asyncio.to_thread(judge_answer, entry, recipe, store, limit)
            scheduler.finish(lines)


class Alpaca:
    """Alpaca's recipe: three seeds in the prompt, and one request brings whole tasks."""

    window = 256  # most requests between the next to be judged and the newest
    expected_tasks = 16  # in the first answer
    whole_answers = False  # whether all tasks of the last answer are used

    def __init__(self, seeds: list[dict], header: str, language: str, seed: int, request: dict):
        self.seeds, self.seed = seeds, seed
        self.header, self.options = header.replace("{language}", language), OPTIONS | request

    def prompt(self, number: int, accepted: list) -> tuple[str, dict, list[str]]:
        """Three seed tasks, the request's options, and the ids of the three."""
        examples = random.Random(f"{self.seed} {number}").sample(self.seeds, PROMPT_SEEDS)
        return alpaca_prompt(self.header, examples), self.options, [s["id"] for s in examples]

    def parse(self, reply: Reply) -> list[Task]:
        return parse_tasks(reply.text, reply.truncated)

    async def complete(self, lines: list[dict], ask: Callable) -> list[dict]:
        return lines  # nothing more to ask


def read_seeds(path: Path) -> list[dict]:
    seeds = []
    for number, (place, raw, cases) in enumerate(normalize_all(json_records(path)), 1):
        if "instruction" not in cases[0]:
            raise UserError(f"{place}: it has no instruction")
        instances = [{"input": case["input"], "output": case["output"]} for case in cases]
        seed = {"instruction": cases[0]["instruction"], "instances": instances}
        seed["id"] = str(raw.get("id", f"seed_{number}"))
        seed["is_classification"] = raw.get("is_classification") is True
        seeds.append(seed)
    if len(seeds) < PROMPT_SEEDS:
        raise UserError(f"{path}: {len(seeds)} seeds; every prompt takes {PROMPT_SEEDS}")
    return seeds


def endpoints_from_args(args: argparse.Namespace) -> list[Endpoint]:
    if args.teachers:
        return read_teachers(args.teachers, args, licence=args.licence)
    if len(args.teacher) > 1 or args.teacher[0].startswith("model="):
        raise UserError("--teacher is the name of one model: --teachers FILE describes several")
    return [endpoint_from_args(args, args.teacher[0], licence=args.licence)]


def generate_command(args: argparse.Namespace) -> None:
    endpoints, seeds = endpoints_from_args(args), read_seeds(args.seeds)
    header = read_text(args.prompt)
    recipe = RECIPES[args.pipeline](seeds, header, args.language, args.seed, args.request)
    texts = {"seeds.json": json.dumps(seeds, ensure_ascii=False, indent=1), "prompt.txt": header}
    settings = {"pipeline": args.pipeline, "seed": args.seed, "language": args.language}
    for name, text in texts.items():
        settings[f"{name} (SHA-256)"] = hashlib.sha256(text.encode()).hexdigest()
    with run_folder(args.out, settings, "generating"):  # refused with other settings
        for name, text in texts.items():  # the folder has everything that it was made from
            write_text(args.out / name, text)
        any_script = args.language.lower() != "english"
        pool = Pool((s["instruction"] for s in seeds), tokenize_unicode if any_script else tokenize)
        store = RecordStore(args.out, pool, any_script)
        log = RequestLog(args.out / "responses.jsonl")
        scheduler = Scheduler(recipe, store, Teachers(log, endpoints, args), args.num)
        run_until_signal(generate(recipe, store, scheduler))
    print(f"{store.count:,} records in {store.records}, ${log.spent:.2f} spent")
    if store.count < args.num:
        print(f"The budget of ${args.budget:g} does not allow another request: raise it to resume.")


def export_command(args: argparse.Namespace) -> None:
    exported = [case for _, cases in read_source(args.folder) for case in cases]
    if not exported:
        raise UserError(f"{args.folder} has no records yet: generate some first")
    write_text(args.out, json.dumps(exported, ensure_ascii=False, indent=4))
    print(f"{len(exported):,} records in {args.out}")


RECIPES = {"alpaca": Alpaca, "self-instruct": SelfInstruct}


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--out", type=Path, required=True, help="folder of the run; an existing run is resumed")
    add("--num", type=positive(int), default=52_000, help="records wanted (default: 52000)")
    recipes = "Alpaca's single request, or the paper's four stages (default: alpaca)"
    add("--pipeline", choices=RECIPES, default="alpaca", help=recipes)
    add("--seeds", type=Path, default=SEEDS, help="seed tasks (default: data/seed_tasks.jsonl)")
    add("--prompt", type=Path, default=PROMPT, help="for the teacher (default: data/prompt.txt)")
    language = "of the tasks; any but English allows every script (default: English)"
    add("--language", type=utf8_text, default="English", help=language)
    add("--seed", type=int, default=0, help="determines prompts and teachers (default: 0)")
    group = parser.add_argument_group("teacher")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--teacher", action="append", metavar="MODEL", help="model to ask, at --base-url")
    several = "JSON list of teachers with weights, prices and servers of their own"
    add("--teachers", type=Path, metavar="FILE", help=several)
    group.add_argument("--licence", default="", help="of the answers, noted in every record")
    add_server_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("generate", help="ask teachers until there are enough records")
    add_generate_arguments(verb)
    verb.set_defaults(command=generate_command)
    verb = verbs.add_parser("export", help="write the records as Alpaca's JSON list")
    verb.add_argument("folder", type=Path, help="--out of the run")
    verb.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    verb.set_defaults(command=export_command)


def main() -> None:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    run_command(main)
