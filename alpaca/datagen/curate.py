"""Inspect instruction data, and remove records with known defects.

    alpaca curate report runs/data --out report.html               # a folder of selfinstruct.py
    alpaca curate report alpaca_data.json --out verbs.svg          # or any data file
    alpaca curate lint alpaca_data.json --examples 5
    alpaca curate lint alpaca_data.json --fix kept.json --dropped dropped.json
    alpaca curate sources alpaca_data.json dolly.jsonl:2 --tokenizer llama-7b

`report` prints how many records were kept and why others were not, each teacher's requests, tokens
and dollars, lengths, similarity to the seed tasks, and opening verbs with their objects; --out
draws Self-Instruct's figure of these (arXiv:2212.10560). `lint` counts the defects that lint.py
describes; --fix and --dropped split the records into those without and those with defects.
`sources` counts what each source adds to a mixture: examples and tokens as fsdp_train.py trains on
them, and languages, where the file names them.

The data may be hostile: none of it reaches the terminal or the HTML unescaped.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from alpaca.common.charts import html_page, sunburst
from alpaca.common.cli import not_negative, positive
from alpaca.common.errors import UserError, escape_control, join_names
from alpaca.common.files import atomic_file, refuse_existing, refuse_same, write_text
from alpaca.common.json_files import read_json, read_log
from alpaca.datagen.formats import Reading, group_by_source, load_mixture, read_source
from alpaca.datagen.lint import RULES, find_defects
from alpaca.datagen.openings import openings
from alpaca.datagen.overlap import questions_of
from alpaca.datagen.request_log import ENTRY
from rougel import Pool, tokenize, tokenize_unicode
from templates import TEMPLATES
from tokenizer import load_tokenizer

TOP_VERBS = 20  # shown
WORD_BINS = (1, 5, 9, 17, 33, 65, 129, 257, 513)  # lower ends of the bars of the histograms


def printable(text: str, width: int = 100) -> str:
    """Text from the data, cut and escaped for the terminal."""
    text = " ".join(text[: 4 * width].split())
    return escape_control(text if len(text) <= width else text[: width - 1] + "…")


def instances_of(record: list[dict]) -> list[dict]:
    """A record's instructions with their outputs. All questions of a conversation are its
    instruction, and each answer is an output. A plain text has none."""
    instances = [case for case in record if "instruction" in case]
    for case in (case for case in record if "messages" in case):
        answers = (turn["content"] for turn in case["messages"] if turn["role"] == "assistant")
        asked = {"instruction": questions_of(case)[0], "input": ""}
        instances += [asked | {"output": text} for text in answers]
    return instances


# ---------------------------------------------------------------- report


def histogram(title: str, values: np.ndarray, edges: list, labels: list[str]) -> Iterator[str]:
    """A bar of # for the values between each edge and the next, from the first to the last."""
    counts = np.histogram(values, edges)[0]
    yield f"\n{title}"
    filled = np.flatnonzero(counts)
    for i in range(filled[0], filled[-1] + 1) if len(filled) else ():
        bar = "#" * math.ceil(48 * counts[i] / counts.max())
        yield f"{labels[i]:>9} {counts[i]:9,}  {bar}".rstrip()


def word_counts(field: str, texts: list[str]) -> Iterator[str]:
    counts = np.array([len(text.split()) for text in texts], int)
    stats = f"mean {counts.mean():.1f}, median {np.median(counts):g}" if texts else "none"
    labels = ["0", *(f"{a}-{b - 1}" for a, b in pairwise(WORD_BINS)), f"{WORD_BINS[-1]}+"]
    return histogram(f"Words of {field} ({stats})", counts, [0, *WORD_BINS, np.inf], labels)


def seed_similarity(instructions: list[str], folder: Path) -> Iterator[str]:
    """Each instruction's highest ROUGE-L with a seed task, tokenized as in the run."""
    seeds = [record[0].get("instruction", "") for _, record in read_source(folder / "seeds.json")]
    settings = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    english = str(settings.get("language", "English")).lower() == "english"
    pool = Pool(instructions, tokenize if english else tokenize_unicode)
    highest = np.zeros(len(pool))
    for seed in seeds:  # ROUGE-L is symmetric, and there are fewer seeds than instructions
        highest = np.maximum(highest, pool.scores(seed))
    stats = f"mean {highest.mean():.3f}" if instructions else "none"
    title = f"Highest ROUGE-L with one of {len(seeds)} seeds ({stats})"
    edges = np.linspace(0, 1, 11).tolist()
    return histogram(title, highest, edges, [f"{a:.1f}-{b:.1f}" for a, b in pairwise(edges)])


def count_by_teacher(folder: Path) -> dict[str, Counter]:
    """Teacher → its requests, failures, tokens and dollars, and its records and rejected tasks."""
    rows: dict[str, Counter] = defaultdict(Counter)
    asked = {}
    for entry in read_log(folder / "responses.jsonl", ENTRY):
        source = entry["provenance"]
        name = ", ".join(filter(None, (source["endpoint"], source["licence"])))
        row = asked[entry["id"]] = rows[f"{source['teacher']} at {source['url']} ({name})"]
        row.update(entry["usage"], requests=1, failed="failed" in entry, cost=entry["cost"])
    for name in ("records", "rejected"):
        for line in read_log(folder / f"{name}.jsonl", {"item": str | None}):
            if row := asked.get((line.get("item") or "").split(".")[0]):
                row[name] += 1
    return rows


def generation_lines(folder: Path, accepted: int) -> Iterator[str]:
    """Requests of a run of selfinstruct.py, what became of its tasks, and the cost."""
    teachers = count_by_teacher(folder)
    everything = sum(teachers.values(), Counter())
    requests, failed, cost = (everything[name] for name in ("requests", "failed", "cost"))
    yield f"{requests:,} requests: {requests - failed:,} answers, {failed:,} failed"
    for teacher, row in teachers.items():
        figures = f"{row['requests']:,} requests, {row['failed']:,} failed, {row['records']:,} of "
        figures += f"{row['records'] + row['rejected']:,} tasks kept, {row['prompt']:,} tokens in, "
        figures += f"{row['completion']:,} out: ${row['cost']:.4f}"
        if row["unmetered"]:
            figures += f" ({row['unmetered']:,} answers without usage, at the most they can cost)"
        yield f"  {printable(teacher)}: {figures}"
    rejected = read_log(folder / "rejected.jsonl", {"why": str})
    reasons = Counter(task["why"] for task in rejected)
    total = accepted + reasons.total()
    yield f"{accepted:,} of {total:,} tasks kept" + (f" ({accepted / total:.1%})" if total else "")
    for reason, n in reasons.most_common():
        yield f"{n:9,} {n / total:6.1%}  {printable(reason)}"
    thousand = f": ${1000 * cost / accepted:.4f} a thousand records" if accepted else ""
    yield f"Cost so far ${cost:.4f}{thousand}"


def run_report(args: argparse.Namespace) -> None:
    suffix = args.out.suffix.lower() if args.out else ""
    if suffix not in ("", ".html", ".svg"):
        raise UserError(f"--out {args.out}: the name must end in .html or .svg")
    records, is_run = [record for _, record in read_source(args.source)], args.source.is_dir()
    if not records and not is_run:
        raise UserError(f"{args.source}: no records in it")
    tasks = [task for task in map(instances_of, records) if task]
    instances = [instance for task in tasks for instance in task]
    instructions = [task[0]["instruction"] for task in tasks]
    inputs = [instance["input"] for instance in instances if instance["input"]]
    more = f" with {len(instances):,} instances" if len(instances) > len(tasks) else ""
    head = f"{len(tasks):,} records{more}, {len(inputs):,} with input"
    lines = [f"{printable(str(args.source), 200)}: {head}"]
    if count := len(records) - len(tasks):
        lines.append(f"{count:,} plain texts left out")
    lines += generation_lines(args.source, len(tasks)) if is_run else ()
    lines += word_counts("instructions", instructions)
    lines += word_counts("inputs", inputs)
    lines += word_counts("outputs", [instance["output"] for instance in instances])
    if is_run and (args.source / "seeds.json").exists():
        lines += seed_similarity(instructions, args.source)
    else:
        lines.append("\nNo similarity to seed tasks: there is no seeds.json beside the data")
    verbs = openings(instructions)
    lines.append("\nOpening verbs and their objects")
    for verb, n, objects in verbs[:TOP_VERBS]:
        nouns = ", ".join(f"{printable(noun, 24)} {count:,}" for noun, count in objects)
        lines.append(f"{n:9,}  {printable(verb, 24):<12} {nouns}".rstrip())
    text = "\n".join(lines)
    if args.out:
        named = [entry for entry in verbs if entry[0][0] != "("][:TOP_VERBS]
        center = f"{sum(n for _, n, _ in named):,} of {len(instructions):,} records"
        figure = sunburst(named, center)
        body = f"{figure}<h1>In figures</h1>\n<pre>{escape(text)}</pre>"
        page = html_page("Opening verbs and their objects", body)
        write_text(args.out, figure if suffix == ".svg" else page)
    print(text)


# ---------------------------------------------------------------- lint


def run_lint(args: argparse.Namespace) -> None:
    if bool(args.fix) != bool(args.dropped):
        raise UserError("give both --fix and --dropped: records without and with defects")
    refuse_same("--fix", args.fix, "--dropped", args.dropped)
    for file in filter(None, (args.fix, args.dropped)):
        refuse_existing(file)
    records, earlier, defects = read_source(args.source), set(), {}
    if not records:
        raise UserError(f"{args.source}: no records in it")
    for number, (_, record) in enumerate(records, 1):
        if found := find_defects(instances_of(record), earlier):
            defects[number] = found
    if args.fix:
        split_records(args, [raw for raw, _ in records], defects)
    share = f"{len(defects):,} of {len(records):,} records flagged"
    print(f"{printable(str(args.source), 200)}: {share} ({len(defects) / len(records):.1%})")
    for name, (meaning, _) in RULES.items():
        broken = [(number, found[name]) for number, found in defects.items() if name in found]
        print(f"{len(broken):9,}  {name}: {meaning}")
        for number, text in broken[: args.examples]:
            print(f"{'':11}record {number:,}: {printable(text)}")


def split_records(args: argparse.Namespace, records: list[dict], defects: dict[int, dict]) -> None:
    """Write --dropped, with the reasons, and --fix. Both are complete before either gets its name,
    and --dropped gets it first: a kill in between loses no record."""
    clean, dropped = [], []
    for number, raw in enumerate(records, 1):
        if number not in defects:
            clean.append(raw)
        elif taken := {"flags", "record"} & raw.keys():
            raise UserError(f"{args.source}: record {number} has a field {min(taken)!r} already")
        else:
            dropped.append(raw | {"flags": list(defects[number]), "record": number})
    with atomic_file(args.fix, "w") as last, atomic_file(args.dropped, "w") as first:  # renamed
        json.dump(dropped, first, ensure_ascii=False, indent=4)
        json.dump(clean, last, ensure_ascii=False, indent=4)


# ---------------------------------------------------------------- sources

SOURCE_LINE = "{:<40} {:>9} {:>13} {:>7} {:>11} {:>10}  {}"


def run_sources(args: argparse.Namespace) -> None:
    from dataset import encode_all  # torch, which takes seconds to load

    tokenizer = load_tokenizer(args.tokenizer, template=args.template)
    reading = Reading(args.oasst, tuple(args.languages))
    records, origins = load_mixture(args.files, args.seed, reading)
    examples = encode_all(records, origins, tokenizer, args.max_length)
    lengths, supervised, origins = examples.lengths, examples.supervised, examples.origins
    print("examples: " + ", ".join(f"{n:,} {what}" for what, n in examples.report.items()))
    head = "source", "examples", "tokens", "share", "mean length", "in answers", "languages"
    print(SOURCE_LINE.format(*head))
    groups = [*group_by_source(origins).items(), ("all", list(range(len(origins))))]
    for source, which in groups if len(groups) > 2 else groups[:1]:
        tokens = lengths[which].sum()
        languages = Counter(name for i in which if (name := origins[i].language))
        names = (f"{printable(name, 24)} {n:,}" for name, n in languages.most_common())
        share, answers = tokens / lengths.sum(), supervised[which].sum() / tokens
        figures = f"{len(which):,}", f"{tokens:,}", f"{share:.1%}", f"{tokens / len(which):.1f}"
        line = printable(source, 40), *figures, f"{answers:.1%}", join_names(names, 6)
        print(SOURCE_LINE.format(*line))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    report = verbs.add_parser("report", help="print statistics of the data, and draw its verbs")
    lint = verbs.add_parser("lint", help="find known defects; remove the records with them")
    for verb, command in ((report, run_report), (lint, run_lint)):
        verb.add_argument("source", type=Path, help="--out of selfinstruct.py, or a data file")
        verb.set_defaults(command=command)
    count, add = positive(int), report.add_argument
    add("--out", type=Path, help="write an .html page, or an .svg of the verbs alone")
    add = lint.add_argument
    add("--examples", type=count, default=3, help="records to show of each defect (default: 3)")
    add("--fix", type=Path, metavar="KEPT", help="JSON file to write: records without a defect")
    add("--dropped", type=Path, metavar="DROPPED", help="JSON file to write: records with one")
    sources = verbs.add_parser("sources", help="count what each source adds to a mixture")
    sources.set_defaults(command=run_sources)
    add = sources.add_argument
    add("files", nargs="+", metavar="FILE[:WEIGHT]", help="data, as for fsdp_train.py")
    add("--tokenizer", type=Path, required=True, help="tokenizer file, or a model")
    add("--template", choices=TEMPLATES, help="chat template (default: the model's, else alpaca)")
    add("--max-length", type=count, default=512, help="in tokens; cuts records (default: 512)")
    add("--seed", type=not_negative, default=42, help="seed for FILE:0.5 (default: 42)")
    add("--oasst", choices=("best", "all"), default="best", help="replies of OpenAssistant's trees")
    add("--languages", nargs="+", default=(), metavar="LANG", help="of those trees (default: all)")


def run(args: argparse.Namespace) -> None:
    args.command(args)
