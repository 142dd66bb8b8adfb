"""GGUF, llama.cpp's file format: a model's configuration, tokenizer and tensors in one file.

    header      "GGUF", version 3, number of tensors, number of metadata entries
    metadata    name, type, value              "llama.block_count", uint32, 30
    tensors     name, shape, kind, offset      "blk.0.attn_q.weight", [576, 576], Q4_1, 4718592
    data        one tensor after another, each at a multiple of 32 bytes from the first

Everything is little-endian. A text is its length in 8 bytes, then UTF-8. A shape is stored
in reverse: the contiguous axis comes first. alpaca/weights/gguf.py decodes the tensors' data.

The counts in a hostile file may be false, so each is limited and checked against the file's size.
"""

import mmap
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, errors_at
from alpaca.common.files import input_file

MAGIC = b"GGUF"
ALIGNMENT = 32  # of each tensor's data, unless general.alignment says otherwise
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
STRUCT_LETTERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type → struct's letter
WRITTEN = {int: UINT32, float: FLOAT32, bool: BOOL}
MAX_COUNT = 1 << 21  # values of an array, metadata entries, tensors; a large vocabulary is 2^18
MAX_TEXT = 1 << 20  # bytes; a chat template has a few thousand


class TensorInfo(NamedTuple):
    shape: list[int]
    kind: int
    start: int  # of its data in the file


class GGUF(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap  # the whole file; changes are not written back


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUF:
    if not is_gguf(input_file(path)):
        raise UserError(f"{path}: neither a folder nor a GGUF file")
    info = path.stat()
    return _read_gguf(path, info.st_ino, info.st_size, info.st_mtime_ns)


@lru_cache(maxsize=2)  # model, tokenizer and template are read from the same file
def _read_gguf(path: Path, *_version: int) -> GGUF:
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with errors_at(path):
        return GGUF(path, *read_header(Cursor(data)), data)


# ---------------------------------------------------------------- reading


class Cursor:
    """The part of a file that has not been read yet."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, len(MAGIC)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise UserError(f"damaged or cut short: {size:,} bytes are missing at {self.at:,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, letter: str, count: int) -> tuple:
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter)))

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def count(self, limit: int = MAX_COUNT) -> int:
        count = self.number("Q")
        if count > limit:
            raise UserError(f"damaged: a count of {count:,}, at most {limit:,} was expected")
        return count

    def text(self) -> str:
        try:
            return self.take(self.count(MAX_TEXT)).decode()
        except UnicodeDecodeError:
            raise UserError("damaged: a text is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in STRUCT_LETTERS:
            return self.number(STRUCT_LETTERS[kind])
        inner, count = (self.number("I"), self.count()) if kind == ARRAY else (kind, 0)
        if inner == STRING:
            return [self.text() for _ in range(count)]
        if inner in STRUCT_LETTERS:
            return list(self.numbers(STRUCT_LETTERS[inner], count))
        raise UserError(f"a value of type {inner} is not supported")  # arrays of arrays, too


def read_header(cursor: Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    version = cursor.number("I")
    if version not in (2, 3):  # 3 only added big-endian files; 1 had shorter counts
        raise UserError(f"GGUF version {version} is not supported, only 2 and 3 are")
    tensor_count, metadata_count = cursor.count(), cursor.count()
    metadata, tensors = {}, {}
    for _ in range(metadata_count):
        name, kind = cursor.text(), cursor.number("I")
        if name in metadata:
            raise UserError(f"{name} appears twice")
        metadata[name] = cursor.value(kind)
    for _ in range(tensor_count):
        name, axes = cursor.text(), cursor.number("I")
        if name in tensors or axes > 4:
            raise UserError(f"{name} appears twice, or has {axes} axes")
        sizes = cursor.numbers("Q", axes)
        tensors[name] = TensorInfo(list(sizes[::-1]), cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise UserError(f"general.alignment is {alignment!r}, not a multiple of 8")
    first = cursor.at + -cursor.at % alignment
    for name, (shape, kind, offset) in tensors.items():
        if offset % alignment:
            raise UserError(f"{name} is not at a multiple of {alignment} bytes")
        tensors[name] = TensorInfo(shape, kind, first + offset)
    return metadata, tensors


def check_spans(file: GGUF, sizes: Mapping[str, int]) -> None:
    """Refuse tensors that overlap or exceed the file, given their sizes in bytes."""
    end = 0
    for name, info in sorted(file.tensors.items(), key=lambda item: item[1].start):
        if info.start < end or not sizes[name]:
            raise UserError(f"{file.path}: damaged: {name} is empty or overlaps another tensor")
        end = info.start + sizes[name]
    if end > len(file.data):
        sizes_differ = f"it has {len(file.data):,} of {end:,} bytes"
        raise UserError(f"{file.path}: damaged or cut short: {sizes_differ}")


# ---------------------------------------------------------------- writing


def pack_text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def pack_value(value: Any) -> tuple[int, bytes]:
    """The type and the bytes of a value."""
    if isinstance(value, str):
        return STRING, pack_text(value)
    if isinstance(value, list):
        items = [pack_value(item) for item in value]
        kind = items[0][0] if items else STRING
        kind = INT32 if kind == UINT32 else kind  # arrays of integers are signed
        start = struct.pack("<IQ", kind, len(items))
        return ARRAY, start + b"".join(content for _, content in items)
    kind = WRITTEN[type(value)]
    return kind, struct.pack(f"<{STRUCT_LETTERS[kind]}", value)


def pack_header(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Sequence[int], int, int]]
) -> tuple[bytes, dict[str, int], int]:
    """All bytes before the tensors' data, each tensor's position in the file, and the file's size,
    given each tensor's shape, kind and size in bytes."""
    text = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for name, value in metadata.items():
        kind, content = pack_value(value)
        text += pack_text(name) + struct.pack("<I", kind) + content
    offsets, end = {}, 0
    for name, (shape, kind, size) in tensors.items():
        offsets[name] = end = end + -end % ALIGNMENT
        text += pack_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        text += struct.pack("<IQ", kind, offsets[name])
        end += size
    text += bytes(-len(text) % ALIGNMENT)
    positions = {name: len(text) + offset for name, offset in offsets.items()}
    return text, positions, len(text) + end + -end % ALIGNMENT
