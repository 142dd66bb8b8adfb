"""Self-instruct: from a few seed tasks to as many instructions as wanted, written by a teacher.

    python selfinstruct.py generate --out runs/data --num 52000 --teacher gpt-4.1-mini \\
        --price-in 0.4 --price-out 1.6 --budget 100       # the key is in $OPENAI_API_KEY
    python selfinstruct.py generate --out runs/mine --num 500 --teacher my-model \\
        --base-url http://localhost:8000/v1               # any OpenAI-compatible server
    python selfinstruct.py export runs/data --out alpaca_data.json
    python selfinstruct.py report runs/data               # by teacher: kept, tokens, dollars
    python selfinstruct.py reparse runs/data              # parse the answers anew, at no cost

The recipe is Alpaca's: three of the seeds in a prompt that asks for 20 tasks, its filters, and
nothing that has a ROUGE-L above 0.7 with a seed or with what was kept before. Worth knowing:

  - Request number i follows from --seed and i (in the paper's pipeline from what requests long
    before it brought, too), and answers are judged in the order of their numbers: however they
    arrive, the same answers make the same records.
  - DIR/responses.jsonl holds every answer as it came, on disk before anything is made of it. What
    is asked again after a kill is only what is not there. records.jsonl and rejected.jsonl follow
    from it; start the same command again and it goes on, with a larger --num too.
  - Several --teacher share the work by weight; a record tells its teacher, prompt seeds and time.

Self-Instruct arXiv:2212.10560; Alpaca: crfm.stanford.edu/2023/03/13/alpaca.html.

Shown by tests/test_selfinstruct.py:
test_the_same_answers_make_the_same_records_however_they_arrive.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import random
import shutil
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path

import numpy as np

from alpaca.common.cli import Parser, positive, run_subcommand
from alpaca.common.errors import UserError, join_names, run_command
from alpaca.common.files import (
    append_jsonl,
    atomic_file,
    claim_run_folder,
    fsync_path,
    json_records,
    read_json,
    read_log,
)
from alpaca.common.progress import Progress
from alpaca.datagen import batch, four_stage
from alpaca.datagen.client import Client, Endpoint, RefusedError, Reply, parse_reply
from alpaca.datagen.formats import normalize_record
from alpaca.datagen.prompts import Task, alpaca_prompt, parse_tasks, reject_reason
from alpaca.datagen.request_log import (
    BudgetExceeded,
    RequestLog,
    Teachers,
    add_server_arguments,
    endpoints_from_args,
)
from rougel import Pool, most_similar, tokenize, tokenize_unicode

HERE = Path(__file__).parent
ALIKE = 0.7  # the highest ROUGE-L that is still new
PROMPT_SEEDS = 3
SEEDS, PROMPT = HERE / "data/seed_tasks.jsonl", HERE / "data/prompt.txt"
BARREN = 50  # answers in a row without a new instruction, after which a run stops
OPTIONS = {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0, "stop": ["\n20", "20."]}


class Alpaca:
    """One request brings whole tasks."""

    lag = 256  # requests at most between the one that is judged next and the newest
    brings = 16  # what the first answer is expected to bring
    exact = True  # a task is complete at once: the last answer is used as far as it is needed

    def __init__(self, seeds: list[dict], header: str, language: str, seed: int, options: dict):
        self.seeds, self.seed = seeds, seed
        self.header = header.replace("{language}", language)
        self.options = OPTIONS | options

    def request(self, number: int, kept: list[tuple[int, str]]) -> tuple[str, dict, list[str]]:
        """Prompt, options, and the ids of the seeds in the prompt."""
        chosen = random.Random(f"{self.seed} {number}").sample(self.seeds, PROMPT_SEEDS)
        return alpaca_prompt(self.header, chosen), self.options, [seed["id"] for seed in chosen]

    def tasks(self, reply: Reply) -> list[Task]:
        return parse_tasks(reply.text, reply.cut)

    async def complete(self, judged: list[dict], ask) -> list[dict | None]:
        return list(judged)  # nothing more to ask


PIPELINES = {"alpaca": Alpaca, "self-instruct": four_stage.SelfInstruct}


class Folder:
    """What a run has on disk, and in memory the pool that a new instruction is compared with."""

    def __init__(self, path: Path, pool: Pool, any_script: bool = False, suffix: str = ""):
        self.path, self.pool, self.any_script = path, pool, any_script
        self.records = path / f"records.jsonl{suffix}"
        self.rejected = path / f"rejected.jsonl{suffix}"
        self.decided: set[str] = set()
        self.kept: list[tuple[int, str]] = []  # number of the request, instruction
        self.count = 0
        found = [*read_log(self.records), *read_log(self.rejected)]
        for line in sorted(found, key=lambda line: [int(part) for part in line["item"].split(".")]):
            self.decided.add(line["item"])
            self.count += "why" not in line
            if "why" not in line or line["why"].startswith(four_stage.LATER):
                self.keep(line)

    def keep(self, line: dict) -> None:
        self.pool.add(line["instruction"])
        self.kept.append((int(line["item"].split(".")[0]), line["instruction"]))

    def judge(self, entry: dict, pipeline: Alpaca, room: float) -> list[dict]:
        """The tasks of a response that were not judged before, kept or with a `why` not. Kept ones
        join the pool; `room` is how many there is still a use for."""
        judged = []
        tasks = pipeline.tasks(parse_reply(entry["response"])) if "response" in entry else []
        for number, task in enumerate(tasks):
            item = f"{entry['id']}.{number}"
            if item in self.decided:
                continue
            if room <= 0:
                break
            line = {"item": item, "instruction": task.instruction}
            line |= {"input": task.input, "output": task.output}
            why = (
                task.why or reject_reason(task.instruction, self.any_script) or self.likeness(line)
            )
            line |= {"why": why} if why else {"provenance": entry["provenance"]}
            self.decided.add(item)
            judged.append(line)
            if not why:
                self.keep(line)
                room -= 1
        return judged

    def likeness(self, line: dict) -> str:
        """Adds what the instruction is most like; says "similar" if that is too much."""
        scores = self.pool.scores(line["instruction"])
        nearest = [(self.pool.texts[place], score) for place, score in most_similar(scores, 10)]
        if nearest and nearest[0][1] > ALIKE:
            line["similar_to"], line["similarity"] = nearest[0]
            return "similar"
        line["most_similar_instructions"] = dict(nearest)
        line["avg_similarity_score"] = float(np.mean(scores)) if len(scores) else 0.0
        return ""

    def write(self, judged: list[dict]) -> None:
        """Rejected ones first: a kill in between leaves what will be judged the same again."""
        kept = [line for line in judged if "why" not in line]
        if dropped := [line for line in judged if "why" in line]:
            append_jsonl(self.rejected, *dropped)
        if kept:
            append_jsonl(self.records, *kept)
        self.count += len(kept)


class Generation:
    """Answers come as they like; they are judged and written in the order of their numbers."""

    def __init__(self, args, folder: Folder, pipeline: Alpaca, teachers: Teachers):
        self.args, self.folder, self.pipeline, self.teachers = args, folder, pipeline, teachers
        self.asked: deque[asyncio.Task] = deque()  # answers to come
        self.finishing: deque[tuple[list[dict], asyncio.Task]] = deque()  # judged, and complete
        self.following = self.seen = self.barren = 0  # next request; judged; without gain since
        self.progress = Progress(args.num, "records", done=folder.count)

    async def run(self) -> None:
        try:
            while self.folder.count < self.args.num:
                if self.room() > 0:
                    await self.ask()
                    await self.judge()
                else:
                    await self.write()
                while self.finishing and self.finishing[0][1].done():
                    await self.write()
        except BudgetExceeded:
            with suppress(BudgetExceeded):
                while self.finishing:
                    await self.write()
        finally:
            await self.teachers.stop([*self.asked, *(task for _, task in self.finishing)])
            self.progress.close(self.teachers.line())

    def room(self) -> int:
        """For how many more instructions there is a use."""
        coming = (line for judged, _ in self.finishing for line in judged if "why" not in line)
        return self.args.num - self.folder.count - sum(1 for _ in coming)

    async def ask(self) -> None:
        """Have as many requests under way as will bring what is missing."""
        brought = self.args.num - self.room() + self.pipeline.brings
        want = math.ceil(self.room() * (self.seen + 1) / brought)
        known = self.teachers.answers.entries
        while self.args.batch and not self.asked and str(self.following) not in known:
            coming = map(str, range(self.following, self.following + want))
            ids = [id for id in coming if id not in known]
            await self.teachers.ask_in_batches(ids, self.question, self.args.poll)
        while len(self.asked) < min(want, self.pipeline.lag):
            id = str(self.following)
            if self.args.batch and id not in known:
                break
            self.asked.append(asyncio.create_task(self.teachers.ask(id, *self.question(id))))
            self.following += 1

    def question(self, id: str) -> tuple[str, dict, list[str]]:
        return self.pipeline.request(int(id), self.folder.kept)

    async def judge(self) -> None:
        entry = await asyncio.shield(self.asked[0])
        self.asked.popleft()
        room = self.room() if self.pipeline.exact else math.inf
        judged = await asyncio.to_thread(self.folder.judge, entry, self.pipeline, room)
        complete = asyncio.create_task(self.pipeline.complete(judged, self.teachers.ask))
        self.finishing.append((judged, complete))
        self.seen += 1
        if entry["id"] in self.teachers.answers.fresh:  # not what an earlier run went through
            self.barren = 0 if any("why" not in line for line in judged) else self.barren + 1
        if self.barren >= BARREN:
            raise RefusedError(
                f"{BARREN} answers in a row brought nothing new; what was made is kept. Other "
                "seeds, another prompt or another teacher may bring more"
            )
        await asyncio.sleep(0)  # what needs no further question is done with this

    async def write(self) -> None:
        judged, task = self.finishing[0]
        before = self.folder.count
        complete = [*itertools.takewhile(lambda line: line is not None, await asyncio.shield(task))]
        await asyncio.to_thread(self.folder.write, complete)
        self.finishing.popleft()
        self.progress.step(self.folder.count - before, self.teachers.line())
        if len(complete) < len(judged):
            raise BudgetExceeded


async def reparse(folder: Folder, pipeline: Alpaca, answers: RequestLog) -> None:
    """Judge all answers anew, and ask nothing; what has no answer is left out."""

    async def ask(id: str, *question) -> dict:
        if id not in answers.entries:
            raise BudgetExceeded
        return answers.entries[id]

    for id in sorted((id for id in answers.entries if id.isdigit()), key=int):
        judged = folder.judge(answers.entries[id], pipeline, math.inf)
        complete = await pipeline.complete(judged, ask)
        folder.write([line for line in complete if line is not None])


async def generate(args, folder: Folder, pipeline: Alpaca, endpoints: list[Endpoint]) -> float:
    """Go on until there are enough records or the money ends; returns what it has cost."""
    answers = RequestLog(folder.path / "responses.jsonl")
    async with Client(args.timeout, args.max_retries, args.retry_wait) as client:
        await Generation(args, folder, pipeline, Teachers(answers, endpoints, client, args)).run()
    return answers.spent


# ---------------------------------------------------------------- commands


def read_seeds(path: Path) -> list[dict]:
    seeds = []
    for number, (place, raw) in enumerate(json_records(path), 1):
        try:
            cases = normalize_record(raw)
            if "instruction" not in cases[0]:
                raise UserError("it has no instruction")
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        instances = [{"input": case["input"], "output": case["output"]} for case in cases]
        seeds.append({"instruction": cases[0]["instruction"], "instances": instances})
        seeds[-1]["id"] = str(raw.get("id", f"seed_{number}"))
        seeds[-1]["is_classification"] = raw.get("is_classification") is True
    if len(seeds) < PROMPT_SEEDS:
        raise UserError(f"{path}: {len(seeds)} seeds; every prompt takes {PROMPT_SEEDS}")
    if twice := [id for id, n in Counter(seed["id"] for seed in seeds).items() if n > 1]:
        raise UserError(f"{path}: two seeds have the id {join_names(twice)}")
    return seeds


def open_run(args, path: Path, suffix: str = "") -> tuple[Folder, Alpaca]:
    """The folder, locked, and the pipeline; refused if the folder was begun in another way."""
    seeds = read_seeds(args.seeds)
    try:
        header = args.prompt.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{args.prompt}: not UTF-8: save the file as UTF-8") from None
    pipeline = PIPELINES[args.pipeline](seeds, header, args.language, args.seed, args.request)
    texts = {"seeds.json": json.dumps(seeds, ensure_ascii=False, indent=1), "prompt.txt": header}
    settings = {"pipeline": args.pipeline, "seed": args.seed, "language": args.language}
    for name, text in texts.items():
        settings[f"{name} (SHA-256)"] = hashlib.sha256(text.encode()).hexdigest()
    args.lock = claim_run_folder(path, settings, "generating")
    records, rejected = path / "records.jsonl.new", path / "rejected.jsonl.new"
    if rejected.exists() and not records.exists():  # a reparse was killed at its last step
        rejected.replace(path / "rejected.jsonl")
    for leftover in (records, rejected):  # or before that
        leftover.unlink(missing_ok=True)
    for name, text in texts.items():  # the folder tells all that it was made from
        with atomic_file(path / name, "w") as file:
            file.write(text)
    any_script = args.language.lower() != "english"
    pool = Pool((s["instruction"] for s in seeds), tokenize_unicode if any_script else tokenize)
    return Folder(path, pool, any_script, suffix), pipeline


def generate_command(args) -> None:
    endpoints = endpoints_from_args(args, args.teacher, args.licence)
    if args.batch and args.pipeline != "alpaca":
        raise UserError("--batch: each stage of self-instruct waits for the one before, a day each")
    for there in batch.begun(args.out / "batches.jsonl"):
        if not args.batch or not any(batch.of(endpoint, there) for endpoint in endpoints):
            raise UserError(
                f"{args.out} has a batch of {there['model']} at {there['url']} under way, which is "
                "paid for: go on with --batch and that --teacher"
            )
    folder, pipeline = open_run(args, args.out)
    spent = asyncio.run(generate(args, folder, pipeline, endpoints))
    print(f"{folder.count:,} records in {folder.records}, ${spent:.2f} spent")
    if folder.count < args.num:
        print(
            f"The budget of ${args.budget:g} has no room for another request: "
            "a larger --budget goes on from here."
        )


def reparse_command(args) -> None:
    """What today's parser and filters make of the answers that the folder has."""
    settings = read_json(args.folder / "settings.json")
    args.pipeline, args.seed, args.language = map(settings.get, ("pipeline", "seed", "language"))
    if args.pipeline not in [*PIPELINES] or None in (args.seed, args.language):
        raise UserError(f"{args.folder}: by its settings.json no generate made it")
    args.seeds, args.prompt = args.folder / "seeds.json", args.folder / "prompt.txt"
    folder, pipeline = open_run(args, args.folder, suffix=".new")
    asyncio.run(reparse(folder, pipeline, RequestLog(args.folder / "responses.jsonl")))
    before = sum(1 for _ in read_log(args.folder / "records.jsonl"))
    for file in (folder.records, folder.rejected):
        file.touch()
        if (old := file.with_suffix("")).exists():
            shutil.copyfile(old, file.with_suffix(".before"))
    for file in (folder.records, folder.rejected):  # after a kill in between open_run goes on
        file.replace(file.with_suffix(""))
    fsync_path(args.folder)
    print(f"{folder.count:,} records where there were {before:,} (now records.jsonl.before)")


def export_command(args) -> None:
    """Alpaca's JSON list."""
    extra = ("most_similar_instructions", "avg_similarity_score", "provenance") if args.full else ()
    exported = []
    for record in read_log(args.folder / "records.jsonl"):
        for case in record.get("instances", [record]):
            fields = {"instruction": record["instruction"]}
            fields |= {"input": case["input"], "output": case["output"]}
            exported.append(fields | {name: record[name] for name in extra if name in record})
    if not exported:
        raise UserError(f"{args.folder} holds no records yet: generate some first")
    with atomic_file(args.out, "w") as file:
        json.dump(exported, file, ensure_ascii=False, indent=4)
    print(f"{len(exported):,} records in {args.out}")


def report_command(args) -> None:
    """Answers, records, tokens and dollars of each teacher."""
    rows: dict[tuple, Counter] = {}
    whose = {}
    for entry in read_log(args.folder / "responses.jsonl"):
        source = entry["provenance"]
        key = tuple(source[name] for name in ("teacher", "url", "endpoint", "licence"))
        row = rows.setdefault(key, Counter())
        row.update(entry["usage"], answers=1, failed="failed" in entry, cost=entry["cost"])
        whose[entry["id"]] = row
    for name in ("records", "rejected"):
        for line in read_log(args.folder / f"{name}.jsonl"):
            if row := whose.get(line["item"].split(".")[0]):
                row[name] += 1
    if not rows:
        raise UserError(f"{args.folder} holds no answers: is it the --out of a generate?")
    for (teacher, url, endpoint, licence), row in rows.items():
        seen = row["records"] + row["rejected"]
        print(f"{teacher} at {url} ({endpoint}{', ' + licence if licence else ''})")
        print(f"  {row['answers']:,} requests, {row['failed']:,} without an answer")
        print(f"  {row['records']:,} of {seen:,} tasks kept ({row['records'] / max(seen, 1):.0%})")
        print(f"  {row['prompt']:,} tokens in, {row['completion']:,} out: ${row['cost']:.4f}")
        if row["unmetered"]:
            print(
                f"  {row['unmetered']:,} answers without usage, counted as the most they can cost"
            )
    total, count = (sum(row[name] for row in rows.values()) for name in ("cost", "records"))
    print(f"{count:,} records for ${total:.4f}: ${1000 * total / max(count, 1):.2f} a thousand")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_generate(verbs.add_parser("generate", help="ask teachers until there are enough records"))
    for name, command in (("reparse", reparse_command), ("report", report_command)):
        verb = verbs.add_parser(name, help=" ".join(command.__doc__.split()))
        verb.add_argument("folder", type=Path, help="--out of the run")
        verb.set_defaults(command=command, request={})
    verb = verbs.add_parser("export", help="write the records as Alpaca's JSON list")
    verb.add_argument("folder", type=Path, help="--out of the run")
    verb.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    verb.add_argument("--full", action="store_true", help="similarities and provenance too")
    verb.set_defaults(command=export_command)
    return parser.parse_args()


def add_generate(parser: argparse.ArgumentParser) -> None:
    count, number = positive(int), positive(float)
    add = parser.add_argument_group("data").add_argument
    add("--out", type=Path, required=True, help="folder of the run; the same one again goes on")
    add("--num", type=count, default=52_000, help="records wanted (default: 52000)")
    add(
        "--pipeline",
        choices=PIPELINES,
        default="alpaca",
        help="Alpaca's single request, or the paper's four stages (default: alpaca)",
    )
    add("--seeds", type=Path, default=SEEDS, help="seed tasks (default: data/seed_tasks.jsonl)")
    add("--prompt", type=Path, default=PROMPT, help="for the teacher (default: data/prompt.txt)")
    add(
        "--language",
        default="English",
        help="of the tasks; with another one they may begin with any letter, and texts of any "
        "script are compared (default: English)",
    )
    add("--seed", type=int, default=0, help="decides the prompts and who gets them (default: 0)")
    add = parser.add_argument_group("teacher").add_argument
    add(
        "--teacher",
        action="append",
        required=True,
        metavar="MODEL",
        help="model to ask; repeat it for several, as model=…,url=…,kind=…,key=VARIABLE,weight=…,"
        "price-in=…,price-out=…,licence=…, where the flags here are the defaults",
    )
    add("--licence", default="", metavar="NOTE", help="of the answers, for every record")
    add = add_server_arguments(parser).add_argument
    add("--batch", action="store_true", help="the Batch API: half the price, within a day")
    add("--poll", type=number, default=30, help="seconds between looks at a batch (default: 30)")
    parser.set_defaults(command=generate_command)


def main() -> None:
    run_subcommand(parse_args())


if __name__ == "__main__":
    run_command(main)
