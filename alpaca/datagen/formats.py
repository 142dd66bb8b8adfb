"""Published data formats → records: {instruction, input, output}, {messages} or {text}.

    {"instruction": "Name a colour.", "input": "", "output": "Red"}          Alpaca
    {"instruction": …, "instances": [{"input": …, "output": …}]}             Self-Instruct's seeds
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}   ShareGPT, Vicuna
    {"text": "Once upon a time"}                                             plain text

A file is a JSON list or JSONL. `load_records` reads one file, `load_mixture` several with weights:
`FILE:2` repeats every record, `FILE:0.5` takes a seeded half. Each error names the file and the
record ("data.json, record 17") or line ("data.jsonl, line 17").
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.json_files import json_records, read_log

RUN_LOGS = ("records.jsonl", "rejected.jsonl", "responses.jsonl")  # of selfinstruct.py
ROLES = {"human": "user", "user": "user", "system": "system"}  # names of a speaker → role
ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant")


def string_field(record: dict, field: str, default: str | None = None) -> str:
    """The string in `field`, or `default` where it is absent or null."""
    value = record.get(field)
    if value is None and default is not None:
        return default
    if field not in record:
        raise UserError(f"it has no {field}: add one, a string")
    if not isinstance(value, str):
        raise UserError(f"{field} is {json.dumps(value)[:40]}, where a string was expected")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{field} holds half a surrogate pair (\\ud…), which is no text") from None
    return value


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def normalize_record(raw: Any) -> list[dict]:
    """A raw record in the form that dataset.py encodes; a seed with n instances gives n records."""
    if not isinstance(raw, dict):
        raise UserError("an object with instruction, input and output was expected")
    if "conversations" in raw:
        return [{"messages": parse_conversation(raw["conversations"])}]
    if "text" in raw and "instruction" not in raw:
        return [{"text": string_field(raw, "text")}]
    instruction = string_field(raw, "instruction")
    if not instruction.strip():
        raise UserError("instruction is empty: remove the record or write an instruction")
    instances = raw.get("instances", [raw])
    if not is_list_of_objects(instances) or not instances:
        raise UserError("instances must be a list of objects with input and output")
    cases = ((string_field(i, "input", ""), string_field(i, "output")) for i in instances)
    return [{"instruction": instruction, "input": given, "output": out} for given, out in cases]


def parse_conversation(turns: Any) -> list[dict]:
    """ShareGPT's turns as {role, content}: perhaps a system message, then user, assistant, …"""
    if not is_list_of_objects(turns):
        raise UserError("conversations must be a list of objects with from and value")
    messages, expected = [], "user"
    for number, turn in enumerate(turns, 1):
        role = ROLES.get(string_field(turn, "from"))
        if role is None:
            known = ", ".join(ROLES)
            raise UserError(f"turn {number} is from {turn['from']!r}: one of {known} was expected")
        if role != expected and (role != "system" or messages):
            raise UserError(f"turn {number} is from {turn['from']!r}, the {expected} was expected")
        expected = "assistant" if role == "user" else "user"
        messages.append({"role": role, "content": string_field(turn, "value")})
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the conversation does not end with an answer: there is nothing to learn")
    return messages


def normalize_all(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, list[dict]]]:
    """(place, raw record, normalized records) for each (place, raw record) of a file."""
    for place, raw in records:
        try:
            yield place, raw, normalize_record(raw)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None


def read_source(source: Path) -> list[tuple[Any, list[dict]]]:
    """Each record of a file, or of a run of selfinstruct.py, as it is there and normalized."""
    records = json_records(source)
    if source.is_dir():
        file = source / RUN_LOGS[0]
        if not any((source / name).exists() for name in RUN_LOGS):
            raise UserError(f"{source} holds no {file.name}: is it the --out of selfinstruct.py?")
        records = ((f"{file}, line {i}", record) for i, record in enumerate(read_log(file), 1))
    return [(raw, cases) for _, raw, cases in normalize_all(records)]


def load_records(path: str | Path) -> list[dict]:
    """The records of a file, normalized."""
    records = [case for _, _, cases in normalize_all(json_records(path)) for case in cases]
    if not records:
        raise UserError(f"{path}: no records in it")
    return records


def parse_weight(spec: str) -> tuple[Path, float]:
    """`FILE:2` → FILE, 2.0. A file whose name contains the colon is a file."""
    file, _, weight = spec.rpartition(":")
    if not file or Path(spec).exists():
        return Path(spec), 1.0
    try:
        number = float(weight)
    except ValueError:
        return Path(spec), 1.0
    if not 0 < number < 1000:
        raise UserError(f"--data {spec}: the weight must be above 0 and below 1000")
    return Path(file), number


def load_mixture(specs: Iterable[str | Path], seed: int) -> tuple[list[dict], list[str]]:
    """The records of several files (`FILE` or `FILE:WEIGHT`), and each record's origin."""
    records, origins = [], []
    for spec in specs:
        file, weight = parse_weight(str(spec))
        found = load_records(file)
        repeats, fraction = divmod(weight, 1)
        chosen = list(range(len(found))) * int(repeats)
        sampler = random.Random(f"{seed} {spec}")
        chosen += sorted(sampler.sample(range(len(found)), round(fraction * len(found))))
        records += [found[i] for i in chosen]
        origins += [f"{file} record {i + 1}" for i in chosen]
    if not records:
        raise UserError("the weights leave no record")
    return records, origins
