"""Seeded damage to files: bytes, JSON values and lines, safetensors headers, pickled tensors."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

SPECIAL = [b"", b"\0", b"null", b"[]", b"{}", b'"x"', b"\xff\xfe", b"[" * 100_000, b"\0" * 4096]
SPECIAL += [b'{"a": ' * 985 + b"1" + b"}" * 985]
LONG_LINE = b'"' + b"x" * (9 << 20) + b'"'
FLOATS = [float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1e38]
SIZES_32 = [0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 30, 99, 2**31, 2**32 - 1]
SIZES_64 = [0, 1, 8, 31, 32, 33, 64, 1024, 2**20, 2**31, 2**40, 2**60, 2**63, 2**64 - 1]
VALUES = [None, True, -1, 0, 1, 3, 0.5, 1e308, -1e-300, float("nan"), float("inf"), 2**40, 2**63]
VALUES += [10**400, "", "x", "../../etc/passwd", "/dev/zero", "\ud800", "\0", "\x1b[31m", "9" * 400]
VALUES += ["x" * 10_000, [], {}, [None], [[0, 1]], {"a": {}}, [1] * 1000]


def mutate(rng: random.Random, name: str, content: bytes) -> bytes:
    """Damage that fits the file's format, or any format."""
    kinds: list[Callable[[random.Random, bytes], bytes]] = [damage_bytes]
    if name.endswith((".json", ".jsonl")):
        kinds += [damage_json] * 3
    if name.endswith(".gguf"):
        kinds += [damage_numbers] * 3
    if name.endswith(".safetensors"):
        kinds += [damage_header] * 2
    return rng.choice(kinds)(rng, content)


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    a, b = sorted(rng.choices(range(len(content) + 1), k=2))
    b = min(b, a + 64)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(SPECIAL)
    if kind == 1:
        return content[:a]
    if kind == 2:
        return content[:a] + content[b:]
    if kind == 3:
        return content[:b] + content[a:]
    if kind == 4:
        return content[:a] + rng.randbytes(rng.randint(1, 8)) + content[a:]
    damaged = bytearray(content)
    for _ in range(min(len(damaged), rng.choice([1, 4, 64]))):
        damaged[rng.randrange(min(len(damaged), 4096))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(damaged)


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Replace, remove, rename or copy one value, or one line of a JSONL file."""
    try:
        return dump(change_value(rng, json.loads(content)))
    except ValueError:
        lines = content.split(b"\n")
        place = rng.randrange(max(len(lines) - 1, 1))
        if rng.random() < 0.2:
            lines.insert(place, rng.choice([*lines, *SPECIAL, LONG_LINE]))
        else:
            lines[place] = dump(change_value(rng, json.loads(lines[place])))
        return b"\n".join(lines)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def change_value(rng: random.Random, value: Any) -> Any:
    holder: Any = {"": value}
    inner, key = rng.choice([*places(holder)])
    kind = rng.randrange(5)
    if kind == 0 and inner is not holder:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict) and inner is not holder:
        inner[rng.choice(["", "x", "__class__", key + "x"])] = inner.pop(key)
    elif kind == 2:
        inner[key] = deepcopy(rng.choice([i[k] for i, k in places(holder)]))
    else:
        inner[key] = rng.choice(VALUES)
    return holder[""]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damage_numbers(rng: random.Random, content: bytes) -> bytes:
    """Replace numbers by others of their size, near the start or among later entries."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        code, numbers = rng.choice([("<I", SIZES_32), ("<Q", SIZES_64), ("<f", FLOATS)])
        end = min(len(content), rng.choice([64, 1024, 60_000])) - 8
        struct.pack_into(code, damaged, rng.randrange(end), rng.choice(numbers))
    return bytes(damaged)


def damage_header(rng: random.Random, content: bytes) -> bytes:
    """Of a safetensors file; its length is mended half of the time."""
    size = struct.unpack("<Q", content[:8])[0]
    header = damage_json(rng, content[8 : 8 + size])
    claimed = len(header) if rng.random() < 0.8 else rng.choice([0, 1, size, 2**30, 2**63 - 1])
    return struct.pack("<Q", claimed) + header + content[8 + size :]
