"""Look at instruction data, and clean it.

    alpaca curate report runs/data --num 52000 --out report.html   # --out of a generate
    alpaca curate report alpaca_data.json --out verbs.svg          # or any data file
    alpaca curate lint alpaca_data.json --examples 5
    alpaca curate lint alpaca_data.json --fix kept.json --dropped dropped.json

`report` tells what was kept and why the rest was not, lengths, likeness to the seeds, the opening
verbs with their objects, and dollars. `lint` flags known defects of such data. Worth knowing:

  - Verbs and objects are a heuristic for English, without a parser. The verb is the opening word,
    if that can open a command; the object is the last word of the first phrase after it: "Write a
    short story about" is write, story. Of rare ones some are nonsense.
  - Lint would rather miss a defect than flag a good record. Its rules are in lint.py.
  - --fix leaves out what is flagged; --dropped gets it, with the reasons. Between them they hold
    every record as it was. --dropped is on disk before --fix appears.
  - The data may be hostile: nothing of it reaches the terminal unescaped, nor the HTML, which has
    no script and needs nothing from elsewhere.

The picture is Self-Instruct's, arXiv:2212.10560.

Shown by tests/test_curate.py: test_a_folder_is_counted_exactly.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from html import escape
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common.charts import Bars, bar_chart, sunburst
from alpaca.common.cli import Parser, positive, run_subcommand
from alpaca.common.errors import UserError, escape_control, run_command
from alpaca.common.files import atomic_file, json_records, read_json, read_log
from alpaca.datagen.formats import normalize_record
from alpaca.datagen.lint import RULES, flags_of
from rougel import Pool, tokenize, tokenize_unicode

VERBS, OBJECTS = 20, 4  # as many as are shown, of each verb
EDGES = (1, 5, 9, 17, 33, 65, 129, 257, 513)  # words with which a bar of the histograms begins
LOGS = ("records.jsonl", "rejected.jsonl", "responses.jsonl")


def shown(text: str, most: int = 100) -> str:
    """Text from data as one line of printable characters."""
    text = " ".join(text[: 4 * most].split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    return escape_control(text)


def read_source(source: Path) -> list[tuple[Any, list[dict]]]:
    """Every record as it stands in the file, and as dataset.py understands it."""
    lines: Iterable[tuple[str, Any]]
    if source.is_dir():
        if not any((source / name).exists() for name in LOGS):
            raise UserError(f"{source} holds no {LOGS[0]}: is it the --out of a generate?")
        source = source / LOGS[0]
        lines = ((f"{source}, line {i}", raw) for i, raw in enumerate(read_log(source), 1))
    else:
        lines = json_records(source)
    found = []
    for place, raw in lines:
        try:
            found.append((raw, normalize_record(raw)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return found


# ---------------------------------------------------------------- verbs and their objects

ASKING = """what what's what’s how how's why when where where's who who's whom whose which is isn't
are aren't was were does doesn't did can can't could should would will may might has am"""
SMALL = f"""{ASKING} a about above according across after against all along also among an and any
as associated assuming at based because been before beginning being below between both but by
called concerning considering containing describing down during each every few first five following
for four from given had have he her here his i if in including into involving it its last like many
me more most my named next no not now of off on once one onto or other our out over own per
provided regarding related second several she since six so some someone starting such ten than that
the their them there these they third this those three through to two under until up upon us used
using various versus via we whether while with within without you your"""  # they open no command
ASKING, SMALL = set(ASKING.split()), set(SMALL.split())
LEAD = re.compile(
    r"(?:please|kindly|(?:can|could|would|will) you|(?:i (?:want|need)|i would like|i'd like) you "
    r"to|your (?:task|job) is to|you (?:need|have|are asked) to|let us|let's"
    r"|(?!apply|comply|fly|multiply|rely|reply|supply)[a-z]+ly)\b[\s,:]*"
)
ADVERB = re.compile("(?<!fami)(?<!assemb)ly$")
TOKEN = re.compile(r"\d[\w.,%-]*|[^\W\d_]+(?:['’-][^\W\d_]+)*|\S")


def opening(instruction: str) -> tuple[str, str]:
    """(verb, object), or ("(question)", its first word), or ("(no verb)", "")."""
    text = instruction[:500].lower().lstrip("\"'“*#- \n")
    while lead := LEAD.match(text):
        text = text[lead.end() :]
    verb, *rest = TOKEN.findall(text) or ["…"]
    if verb in ASKING or (verb in SMALL and "?" in text):
        return "(question)", verb
    if verb in SMALL or not verb[0].isalpha():
        return "(no verb)", ""
    return verb, object_in(rest[2:] if rest[:1] == ["and"] else rest)  # compare and contrast


def object_in(words: list[str]) -> str:
    last = ""
    for word in words:
        if not word[0].isalnum():
            break
        if word[0].isalpha() and word not in SMALL and not ADVERB.search(word):
            last = word
        elif last and not word[0].isdigit():
            break
    if last.endswith("ies") and last not in ("series", "species", "movies"):
        return last[:-3] + "y"
    return re.sub(r"(?<=ss|sh|ch|.x)es$|(?<=[^\W\d_]{2}[^suic])s$", "", last)


def openings(instructions: Iterable[str]) -> list[tuple[str, int, Bars]]:
    """Verbs, how often, and their most frequent objects; the most frequent verb first."""
    nouns: dict[str, Counter[str]] = defaultdict(Counter)
    for verb, noun in map(opening, instructions):
        nouns[verb][noun] += 1
    found = []
    for verb, all_of_it in nouns.items():
        objects = [(noun, n) for noun, n in all_of_it.most_common() if noun]
        found.append((verb, all_of_it.total(), objects[:OBJECTS]))
    return sorted(found, key=lambda one: -one[1])


# ---------------------------------------------------------------- report


def histogram(labels: Iterable[str], counts: np.ndarray) -> Bars:
    """Without the empty bars at both ends."""
    filled = np.flatnonzero(counts)
    bars = list(zip(labels, counts.tolist(), strict=True))
    return bars[filled[0] : filled[-1] + 1] if len(filled) else []


def lengths(name: str, texts: list[str]) -> tuple[str, Bars]:
    words = np.array([len(text.split()) for text in texts], int)
    labels = ["0", *(f"{a}-{b - 1}" for a, b in pairwise(EDGES)), f"{EDGES[-1]}+"]
    counts = np.bincount(np.digitize(words, EDGES), minlength=len(labels))
    middle = f"mean {words.mean():.1f}, median {np.median(words):g}" if texts else "none"
    return f"Words of {name} ({middle})", histogram(labels, counts)


def likeness(instructions: list[str], folder: Path) -> tuple[str, Bars]:
    """Each instruction's highest ROUGE-L with a seed. The instructions are the pool: the score is
    the same both ways, and the seeds are fewer."""
    seeds = [known[0].get("instruction", "") for _, known in read_source(folder / "seeds.json")]
    settings = folder / "settings.json"
    told = read_json(settings) if settings.exists() else {}
    english = str(told.get("language", "English")).lower() == "english"
    pool = Pool(instructions, tokenize if english else tokenize_unicode)
    highest = np.zeros(len(pool))
    for seed in seeds:
        highest = np.maximum(highest, pool.scores(seed))
    counts, edges = np.histogram(highest, 10, (0, 1))
    mean = f"mean {highest.mean():.3f}" if instructions else "none"
    labels = (f"{a:.1f}-{b:.1f}" for a, b in pairwise(edges))
    return f"Highest ROUGE-L with one of {len(seeds)} seeds ({mean})", histogram(labels, counts)


def text_bars(title: str, bars: Bars) -> Iterator[str]:
    most = max((count for _, count in bars), default=1)
    yield f"\n{title}"
    for label, count in bars:
        yield f"{label:>9} {count:9,}  {'#' * math.ceil(48 * count / most)}".rstrip()


def generation(folder: Path, kept: int, wanted: int) -> Iterator[str]:
    """Requests, what became of their tasks, and dollars."""
    entries = list(read_log(folder / "responses.jsonl"))
    failed = sum("response" not in entry for entry in entries)
    yield f"{len(entries):,} requests: {len(entries) - failed:,} answers, {failed:,} failed"
    why = Counter(str(line.get("why")) for line in read_log(folder / "rejected.jsonl"))
    tasks = kept + why.total()
    yield f"{kept:,} of {tasks:,} tasks kept" + (f" ({kept / tasks:.1%})" if tasks else "")
    asks = Counter({reason: n for reason, n in why.items() if reason.startswith("asks for ")})
    others = Counter({reason: n for reason, n in why.items() if reason not in asks})
    for reason, count in (others + Counter({"asks for …": asks.total()})).most_common():
        yield f"{count:9,} {count / tasks:6.1%}  {shown(reason)}"
        if reason == "asks for …":
            yield from (f"{n:20,}  {shown(asked)}" for asked, n in asks.most_common())
    cost, left = sum(entry.get("cost", 0) for entry in entries), max(wanted - kept, 0)
    each = f": ${1000 * cost / kept:.4f} a thousand records" if kept else ""
    rest = f", about ${left * cost / kept:.2f} for the {left:,} to come" if kept and left else ""
    yield f"Cost so far ${cost:.4f}{each}{rest}"


def verb_table(verbs: list[tuple[str, int, Bars]]) -> Iterator[str]:
    yield "\nOpening verbs and their objects"
    for verb, count, objects in verbs[:VERBS]:
        told = ", ".join(f"{shown(noun, 24)} {n:,}" for noun, n in objects)
        yield f"{count:9,}  {shown(verb, 24):<12} {told}".rstrip()


def report_command(args) -> None:
    kind = args.out.suffix.lower() if args.out else ""
    if kind not in ("", ".html", ".svg"):
        raise UserError(f"--out {args.out}: a name that ends in .html or .svg was expected")
    records, folder = [known for _, known in read_source(args.source)], args.source.is_dir()
    if not records and not folder:
        raise UserError(f"{args.source}: no records in it")
    tasks = [known for known in records if "instruction" in known[0]]
    cases = [case for known in tasks for case in known]
    given = [case["input"] for case in cases if case["input"]]
    instructions = [known[0]["instruction"] for known in tasks]
    more = f" with {len(cases):,} instances" if len(cases) > len(tasks) else ""
    head = f"{len(tasks):,} records{more}, {len(given):,} with input"
    lines = [f"{shown(str(args.source), 200)}: {head}"]
    for field, what in (("messages", "chats"), ("text", "plain texts")):
        if count := sum(field in known[0] for known in records):
            lines.append(f"{count:,} {what} left out")
    lines += generation(args.source, len(tasks), args.num) if folder else ()
    histograms = [lengths("instructions", instructions), lengths("inputs", given)]
    histograms.append(lengths("outputs", [case["output"] for case in cases]))
    if folder and (args.source / "seeds.json").exists():
        histograms.append(likeness(instructions, args.source))
    else:
        lines.append("No likeness to the seeds: there is no seeds.json with it")
    verbs = openings(instructions)
    tables = (text_bars(title, bars) for title, bars in histograms)
    text = "\n".join([*lines, *chain(*tables), *verb_table(verbs)])
    if args.out:
        named = [one for one in verbs if one[0][0] != "("][:VERBS]
        below = f"{sum(n for _, n, _ in named):,} of {len(instructions):,} records"
        picture = sunburst(named, below)
        with atomic_file(args.out, "w") as file:
            file.write(picture if kind == ".svg" else page(text, picture, histograms))
    print(text)


def page(text: str, picture: str, histograms: list[tuple[str, Bars]]) -> str:
    charts = "".join(f"<h2>{escape(title)}</h2>\n{bar_chart(bars)}" for title, bars in histograms)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>Instruction data</title>
<meta http-equiv="Content-Security-Policy" content="{policy}"/>
<style>body {{ font-family: sans-serif; margin: 2em }} h2 {{ font-size: 1em }}</style></head>
<body><h1>Opening verbs and their objects</h1>
{picture}{charts}<h2>In figures</h2>
<pre>{escape(text)}</pre></body></html>
"""


# ---------------------------------------------------------------- lint


def lint_command(args) -> None:
    check_outputs(args)
    records, earlier, flagged = read_source(args.source), set(), {}
    if not records:
        raise UserError(f"{args.source}: no records in it")
    for number, (_, known) in enumerate(records, 1):
        if "instruction" in known[0] and (flags := flags_of(known, earlier)):
            flagged[number] = flags
    if args.fix:
        separate(args, [raw for raw, _ in records], flagged)
    share = f"{len(flagged):,} of {len(records):,} records flagged"
    print(f"{shown(str(args.source), 200)}: {share} ({len(flagged) / len(records):.1%})")
    for name, (meaning, _) in RULES.items():
        broken = [(number, flags[name]) for number, flags in flagged.items() if name in flags]
        print(f"{len(broken):9,}  {name}: {meaning}")
        for number, text in broken[: args.examples]:
            print(f"{'':11}record {number:,}: {shown(text)}")


def check_outputs(args) -> None:
    if bool(args.fix) != bool(args.dropped):
        raise UserError("--fix and --dropped go together: what is not kept must go somewhere")
    if args.fix and args.fix.resolve() == args.dropped.resolve():
        raise UserError(f"--fix and --dropped are both {args.fix}: name two files")
    for file in filter(None, (args.fix, args.dropped)):
        if file.is_symlink() or file.exists():
            raise UserError(f"{file} exists already: name a new file, or remove it first")


def separate(args, records: list[dict], flagged: dict[int, dict]) -> None:
    """Both files are written out before either gets its name, and DROPPED gets it first."""
    kept = [raw for number, raw in enumerate(records, 1) if number not in flagged]
    dropped = []
    for number, flags in flagged.items():
        raw = records[number - 1]
        if taken := {"flags", "record"} & raw.keys():
            raise UserError(f"{args.source}: record {number} has a field {min(taken)!r} already")
        dropped.append(raw | {"flags": list(flags), "record": number})
    assert len(kept) + len(dropped) == len(records)
    with atomic_file(args.fix) as last, atomic_file(args.dropped) as first:
        for file, part in ((first, dropped), (last, kept)):
            text = json.dumps(part, ensure_ascii=False, indent=4)
            file.write(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair: \ud83d


# ---------------------------------------------------------------- commands


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    report = verbs.add_parser("report", help="what the data is like, in figures and a picture")
    lint = verbs.add_parser("lint", help="find known defects; take out what has them")
    for verb, command in ((report, report_command), (lint, lint_command)):
        verb.add_argument("source", type=Path, help="--out of a generate, or a data file")
        verb.set_defaults(command=command)
    count, add = positive(int), report.add_argument
    add("--num", type=count, default=52_000, help="records wanted in the end (default: 52000)")
    add("--out", type=Path, help="write an .html page, or an .svg of the verbs alone")
    add = lint.add_argument
    add("--examples", type=count, default=3, help="shown of each defect (default: 3)")
    add("--fix", type=Path, metavar="KEPT", help="JSON file for the records without a flag")
    add("--dropped", type=Path, metavar="DROPPED", help="JSON file for those with one")
    return parser.parse_args()


def main() -> None:
    run_subcommand(parse_args())


if __name__ == "__main__":
    run_command(main)
