"""JSON and JSONL files: every error names the file and the line, and nothing in them is too large.

    read_json(path)          one object
    json_records(path)       the elements of a list, or the lines of a JSONL file, with their places
    append_jsonl, read_log   a log that survives a kill in the middle of a line

`shape` describes by example what a file must hold; other fields are left alone:

    {"id": str, "cost": int | float, "failed": str | None, "usage": {"prompt": int}, "ids": [str]}
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import IO, Any

from alpaca.common.errors import UserError
from alpaca.common.files import fsync_path, input_file, named_errors, read_text, refuse_input
from alpaca.common.system import lock_file

MAX_DEPTH = 64  # lists and objects inside each other
MAX_LINE = 8 << 20  # characters of a line, or of a string
MAX_OBJECT = 64 << 20  # bytes of a file with one object
Shape = type | UnionType | re.Pattern | dict | list
NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
NAMES |= {type(None): "null", dict: "an object", list: "a list"}


def bounded_json(text: str | bytes, place: str) -> Any:
    """The JSON value in `text`; an error message begins with `place`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{place}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(v, str) and len(v) > MAX_LINE for v in level):
            raise UserError(f"{place}: a text has more than {MAX_LINE:,} characters")
        level = [child for v in level for child in _children(v)]
        if not level:
            return value
    raise UserError(f"{place}: nested more than {MAX_DEPTH} deep")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_shape(value: Any, shape: Shape, place: str) -> None:
    """Raise a UserError unless `value` is as `shape` describes."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for name, inner in shape.items():
            check_shape(value.get(name), inner, f"{place}: {name}")
    elif isinstance(shape, list) and isinstance(value, list):
        for item in value:
            check_shape(item, shape[0], place)
    elif isinstance(shape, re.Pattern):
        if not isinstance(value, str) or not shape.fullmatch(value):
            raise UserError(f"{place} is {_short(value)}, {shape.pattern} was expected")
    else:
        kinds = getattr(shape, "__args__", (shape if isinstance(shape, type) else type(shape),))
        if type(value) not in kinds or not _is_plain(value):
            expected = " or ".join(NAMES[kind] for kind in kinds)
            raise UserError(f"{place} is {_short(value)}, {expected} was expected")


def _is_plain(value: Any) -> bool:
    """Whether a number is finite, and fits in 64 bits if it is an integer."""
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return not isinstance(value, float) or math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "missing" if value is None else text if len(text) <= 40 else text[:39] + "…"


def read_json(path: str | Path, shape: Shape = dict) -> dict[str, Any]:
    """The object in a JSON file."""
    value = bounded_json(read_text(path, MAX_OBJECT), str(path))
    check_shape(value, shape, str(path))
    return value


def json_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, value) for each element of a JSON list or each line of a JSONL file; the place, such
    as "data.json, record 3" or "data.jsonl, line 3", is what an error message begins with."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        values = bounded_json(text, str(path))
        yield from ((f"{path}, record {i}", value) for i, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield (place := f"{path}, line {number}"), parse_line(line, place)


def parse_line(line: str | bytes, place: str) -> Any:
    if len(line) > MAX_LINE:
        raise UserError(f"{place}: longer than {MAX_LINE:,} characters")
    return bounded_json(line, place)


def append_jsonl(path: str | Path, *records: dict, durable: bool = True) -> None:
    """Append records, one per line. On return they survive a kill, and a power cut if `durable`,
    which waits for the disk. A line torn by an earlier kill is cut off first; the lock keeps other
    writers from mistaking our unfinished line for such a one."""
    path = Path(path)
    refuse_input(path)
    new = not path.exists()
    with named_errors(path), open(path, "ab+") as file:
        lock_file(file)
        start, tail = _last_line(file)
        if tail and is_json(tail):  # complete except for its newline
            file.write(b"\n")
        elif tail:
            file.truncate(start)
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        file.write(lines.encode(errors="backslashreplace"))
        file.flush()
        if durable:
            os.fsync(file.fileno())
    if new:
        fsync_path(path.parent)


def _last_line(file: IO[bytes]) -> tuple[int, bytes]:
    """Where the text after the last newline starts, and that text."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    head, newline, tail = tail.rpartition(b"\n")
    return start + len(head) + len(newline), tail


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_log(path: Path, shape: Shape = dict) -> Iterator[dict]:
    """The records of one of our logs, which may be missing or end in a line cut by a kill."""
    if not path.exists():
        return
    number = 0
    with open(input_file(path), "rb") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            complete = line.endswith(b"\n") or len(line) > MAX_LINE or is_json(line)
            if line.strip() and complete:
                record = parse_line(line, place := f"{path}, line {number}")
                check_shape(record, shape, place)
                yield record
