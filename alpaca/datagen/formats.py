"""Published data formats → records: {instruction, input, output}, {messages} or {text}.

    {"instruction": "Name a colour.", "input": "", "output": "Red"}          Alpaca
    {"instruction": …, "instances": [{"input": …, "output": …}]}             Self-Instruct's seeds
    {"instruction": …, "context": …, "response": …}                          Dolly
    {"prompt": "Name a colour.", "completion": "Red"}                        TRL; texts or messages
    {"question": …, "answer": "70 + 2 = 72 … #### 72"}                       GSM8K
    {"question": …, "human_answers": […], "chatgpt_answers": […]}            HC3, as Koala used it
    {"messages": [{"role": "user", "content": …}, …]}                        OpenAI, Hugging Face
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}   ShareGPT, Vicuna
    {"message_tree_id": …, "prompt": {"text": …, "replies": […]}}            OpenAssistant's trees
    {"message_id": …, "parent_id": …, "role": "prompter", "text": …}         and its flat messages
    {"text": "Once upon a time"}                                             plain text

A file is a JSON list or JSONL, perhaps gzipped. `load_records` reads one file, `load_mixture`
several with weights: `FILE:2` repeats every record, `FILE:0.5` takes a seeded half. A record's
source is its field `source`, or else the file's name. An error names the file and the record
("data.json, record 17") or line ("data.jsonl, line 17"). Conversations that cannot be used are
skipped and counted; a file with more than a tenth of them is refused.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from alpaca.common.errors import UserError, check_unicode, escape_control, join_names, notice
from alpaca.common.json_files import check_shape, json_records, read_log
from alpaca.datagen.conversations import OddConversation, join_messages, parse_tree, parse_turns

RUN_LOGS = ("records.jsonl", "rejected.jsonl", "responses.jsonl")  # of selfinstruct.py
OTHER_NAMES = {"context": "input", "response": "output"}  # Dolly's
OTHER_NAMES |= {"prompt": "instruction", "completion": "output"}
OTHER_NAMES |= {"question": "instruction", "answer": "output"}  # GSM8K's
ANSWERS = {"output", "completion", "response", "answer"}
KNOWN = "instruction and output, prompt and completion, question and answer, messages, "
KNOWN += "conversations, question and chatgpt_answers, OpenAssistant's trees, text"
MAX_SKIPPED = 0.1  # share of a file's records; above it the file is refused
MAX_SOURCES = 20  # reported separately: in some files every record has its own
Parsed = TypeVar("Parsed")  # what one record is read as


class Reading(NamedTuple):
    """Which conversations to take from OpenAssistant's trees."""

    oasst: str = "best"  # one conversation, of the best replies, or "all"
    languages: tuple[str, ...] = ()  # such as "en"; empty: all


BEST = Reading()


class Origin(NamedTuple):
    """Where a record comes from. Source and language are as in the file, but escaped."""

    place: str  # "data.json, record 17"
    source: str
    language: str  # what its `lang` says, or ""


def string_field(record: dict, field: str, default: str | None = None) -> str:
    """The string in `field`, or `default` where it is absent or null."""
    if record.get(field) is None and default is not None:
        return default
    if field not in record:
        raise UserError(f"it has no {field}: add one, a string")
    check_shape(value := record[field], str, field)
    check_unicode(value)
    return value


def normalize_record(raw: Any, reading: Reading = BEST) -> list[dict]:
    """The records that a raw record holds, in the form that dataset.py encodes."""
    if not isinstance(raw, dict):
        raise UserError("an object with instruction, input and output was expected")
    if "conversations" in raw or "messages" in raw:
        turns = raw.get("conversations", raw.get("messages"))
        if raw.get("system") and isinstance(turns, list):
            turns = [{"role": "system", "content": raw["system"]}, *turns]
        return [{"messages": parse_turns(turns)}]
    if isinstance(prompt := raw.get("prompt"), dict):  # a tree
        if reading.languages and prompt.get("lang") not in reading.languages:
            return []
        return [{"messages": turns} for turns in parse_tree(prompt, reading.oasst == "best")]
    if raw.keys() & {"chosen", "output_1"} and not raw.keys() & ANSWERS:
        raise UserError("it compares two answers: --objective dpo or reward learns from it")
    if isinstance(prompt, list):
        check_shape(raw.get("completion"), list, "completion")
        return [{"messages": parse_turns(prompt + raw["completion"])}]
    if "text" in raw and "instruction" not in raw:
        return [{"text": string_field(raw, "text")}]
    if "chatgpt_answers" in raw:
        check_shape(raw["chatgpt_answers"], list, "chatgpt_answers")
        answers = raw["chatgpt_answers"] + (raw.get("human_answers") or [])
        instances = [{"output": answer} for answer in answers]
        raw = raw | {"instruction": raw.get("question"), "instances": instances}
    for theirs, ours in OTHER_NAMES.items():
        if theirs in raw and ours not in raw:
            raw = raw | {ours: raw[theirs]}
    if "instruction" not in raw:
        fields = join_names(map(repr, raw)) or "none"
        raise UserError(f"its fields ({fields}) fit no known format, such as {KNOWN}")
    instruction = string_field(raw, "instruction")
    if not instruction.strip():
        raise UserError("instruction is empty: remove the record or write an instruction")
    if raw.get("system") or raw.get("history"):
        raise OddConversation("an instruction comes with a system message or a history")
    instances = raw.get("instances", [raw])
    if not instances or not isinstance(instances, list):
        raise UserError("instances must be a list of objects with input and output")
    check_shape(instances, [dict], "instances")
    cases = ((string_field(i, "input", ""), string_field(i, "output")) for i in instances)
    return [{"instruction": instruction, "input": given, "output": out} for given, out in cases]


def normalize_all(
    records: Iterable[tuple[str, Any]], reading: Reading = BEST
) -> Iterator[tuple[str, Any, list[dict]]]:
    """(place, raw record, normalized records) for each (place, raw record) of a file."""
    return skip_odd(join_messages(records), lambda raw: normalize_record(raw, reading))


def skip_odd(
    records: Iterable[tuple[str, Any]], parse: Callable[[Any], Parsed]
) -> Iterator[tuple[str, Any, Parsed]]:
    """(place, raw record, parsed) for each (place, raw record); odd conversations are skipped."""
    skipped: dict[str, list[str]] = {}
    count = 0
    for place, raw in records:
        count += 1
        try:
            yield place, raw, parse(raw)
        except OddConversation as error:
            skipped.setdefault(str(error), []).append(place)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    total = sum(map(len, skipped.values()))
    reasons = [f"{len(p)} because {why} (first {p[0]})" for why, p in skipped.items()]
    if total > MAX_SKIPPED * count:
        first, (place, *_) = next(iter(skipped.items()))
        counts = join_names(f"{len(p)} because {why}" for why, p in skipped.items())
        raise UserError(
            f"{place}: {first}; {total} of {count} records are unusable, at most a tenth may be "
            f"({counts}): remove them"
        )
    if skipped:
        notice(f"{total} of {count} records skipped: {join_names(reasons)}")


def read_source(source: Path) -> list[tuple[Any, list[dict]]]:
    """(raw record, normalized records) for each record of a file or run of selfinstruct.py."""
    records = json_records(source)
    if source.is_dir():
        file = source / RUN_LOGS[0]
        if not any((source / name).exists() for name in RUN_LOGS):
            raise UserError(f"{source} holds no {file.name}: is it the --out of selfinstruct.py?")
        records = ((f"{file}, line {i}", record) for i, record in enumerate(read_log(file), 1))
    return [(raw, cases) for _, raw, cases in normalize_all(records)]


def load_placed(path: str | Path, reading: Reading = BEST) -> list[tuple[str, dict, dict]]:
    """(place, raw record, normalized record) for each normalized record of a file."""
    found = normalize_all(json_records(path), reading)
    records = [(place, raw, case) for place, raw, cases in found for case in cases]
    if not records:
        raise UserError(f"{path}: no records in it")
    return records


def load_records(path: str | Path, reading: Reading = BEST) -> list[dict]:
    """The records of a file, normalized."""
    return [case for *_, case in load_placed(path, reading)]


def parse_weight(spec: str) -> tuple[Path, float]:
    """`FILE:2` → FILE, 2.0, unless a file with the colon in its name exists."""
    file, _, weight = spec.rpartition(":")
    if not file or Path(spec).exists():
        return Path(spec), 1.0
    try:
        number = float(weight)
    except ValueError:
        return Path(spec), 1.0
    if not 0 < number < 1000:
        raise UserError(f"{spec}: the weight must be above 0 and below 1000")
    return Path(file), number


def find_origin(place: str, raw: dict, file_name: str) -> Origin:
    prompt = raw.get("prompt")
    fields = prompt | raw if isinstance(prompt, dict) else raw  # a tree's language is its root's
    given = (fields.get(name) for name in ("source", "lang"))
    source, language = (each.strip() if isinstance(each, str) else "" for each in given)
    return Origin(place, escape_control(source or file_name), escape_control(language))


def load_mixture(
    specs: Iterable[str | Path], seed: int, reading: Reading = BEST
) -> tuple[list[dict], list[Origin]]:
    """The records of several files (`FILE` or `FILE:WEIGHT`), and each record's origin."""
    return mix_files(specs, seed, lambda file: load_placed(file, reading))


def mix_files(
    specs: Iterable[str | Path], seed: int, load: Callable[[Path], list[tuple[str, dict, Parsed]]]
) -> tuple[list[Parsed], list[Origin]]:
    """`load_mixture` for anything that `load` makes of a file: (place, raw record, item)."""
    records, origins = [], []
    weights = {str(spec): parse_weight(str(spec)) for spec in specs}
    same = Counter(file.name for file in {file for file, _ in weights.values()})
    for spec in specs:
        file, weight = weights[str(spec)]
        found = load(file)
        name = "/".join(file.parts[-2 if same[file.name] > 1 else -1 :])
        repeats, fraction = divmod(weight, 1)
        chosen = list(range(len(found))) * int(repeats)
        sampler = random.Random(f"{seed} {spec}")
        chosen += sorted(sampler.sample(range(len(found)), round(fraction * len(found))))
        records += [found[i][2] for i in chosen]
        origins += [find_origin(found[i][0], found[i][1], name) for i in chosen]
    if not records:
        raise UserError("the weights leave no records: raise them")
    return records, origins


def group_by_source(origins: list[Origin]) -> dict[str, list[int]]:
    """Source → indices, the largest first; the smallest beyond MAX_SOURCES are one group."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, origin in enumerate(origins):
        groups[origin.source].append(i)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    if len(ordered) > MAX_SOURCES:
        rest = ordered[MAX_SOURCES - 1 :]
        indices = sorted(i for _, group in rest for i in group)
        ordered[MAX_SOURCES - 1 :] = [(f"({len(rest):,} smaller sources)", indices)]
    return dict(ordered)
