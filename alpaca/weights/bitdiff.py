"""The difference of two tensors in every bit, piece by piece, with SHA-256 digests of all sides.

tuned - base, taken of floats, is rounded: base + (tuned - base) misses the tuned number by a bit or
more in places. Bit patterns are integers, and integers that wrap around form a group: for any
two patterns t and b, b + (t - b) = t, whatever floats they stand for, NaN and -0.0 too. And numbers
of one sign that lie close together have bit patterns that do: what fine-tuning moves a little is a
small integer, so differences compress where weights would not.

A tensor goes through in pieces of some megabytes: memory does not grow with it.

Shown by tests/test_weightdiff.py: test_every_bit_comes_back.
"""

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.weights.checkpoint import StoredTensor, as_dtype

PIECE = 1 << 23  # bytes of a tensor in work at a time, by each thread
INTEGER = {2: torch.int16, 4: torch.int32}  # by bytes


class Entry(NamedTuple):
    """A tensor in the manifest: what it is, and SHA-256 digests of its three sides."""

    dtype: str
    shape: list[int]
    known: int  # how many of its numbers the base has; the rest are differences to zero
    base_dtype: str  # what those were converted from; "" if the base has none
    base: str  # of those numbers, in the tuned one's dtype
    diff: str  # of the file
    tuned: str


def pieces(count: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    step = PIECE // dtype.itemsize
    return ((start, min(start + step, count)) for start in range(0, count, step))


def dtype_name(stored: StoredTensor | None) -> str:
    return "" if stored is None else str(stored.dtype).removeprefix("torch.")


def flat(stored: StoredTensor | None, most: int) -> Tensor | None:
    return None if stored is None else stored.read().contiguous().flatten()[:most]


def bits(
    numbers: Tensor | None, dtype: torch.dtype, start: int, stop: int, name: str
) -> np.ndarray:
    """Numbers start to stop as integers; zeros where there are none."""
    own = torch.empty(0, dtype=dtype) if numbers is None else numbers[start:stop]
    found = as_dtype(own, dtype, name).view(INTEGER[dtype.itemsize]).numpy()
    missing = stop - start - len(found)
    return np.concatenate([found, np.zeros(missing, found.dtype)]) if missing else found


def packed(difference: np.ndarray) -> bytes:
    """Differences are small numbers of either sign. Zigzag (0, -1, 1, -2 → 0, 1, 2, 3) makes their
    high bytes zero, and bytes of one place side by side compress well."""
    sign = difference >> (8 * difference.itemsize - 1)
    zigzag = (difference << 1) ^ sign
    planes = zigzag.view(np.uint8).reshape(-1, difference.itemsize).T
    content = zlib.compress(planes.tobytes(), 1)
    return len(content).to_bytes(4, "little") + content


def unpacked(content: bytes, dtype: np.dtype, size: int) -> np.ndarray:
    planes = zlib.decompressobj().decompress(content, size + 1)
    if len(planes) != size:
        raise zlib.error
    interleaved = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1).T
    zigzag = np.ascontiguousarray(interleaved).view(f"u{dtype.itemsize}").ravel()
    return ((zigzag >> 1) ^ (0 - (zigzag & 1))).view(dtype)


def make_tensor(
    name: str,
    base: StoredTensor | None,
    tuned: StoredTensor,
    file: Path,
    compress: bool,
    step: Callable[[int], None],
) -> Entry:
    """Write one tensor's difference. The digests are of what was read and written."""
    dtype, count = tuned.dtype, tuned.shape.numel()
    ours, theirs = flat(tuned, count), flat(base, count)
    known = 0 if theirs is None else len(theirs)
    digests = [hashlib.sha256() for _ in range(3)]
    with open(file, "wb") as opened:
        for start, stop in pieces(count, dtype):
            b = bits(theirs, dtype, start, stop, f"the base's {name}")
            t = bits(ours, dtype, start, stop, name)
            content = packed(t - b) if compress else (t - b).data
            opened.write(content)
            for digest, of in zip(digests, (b[: max(0, known - start)], content, t), strict=True):
                digest.update(of)
            step(t.nbytes)
        opened.flush()
        os.fsync(opened.fileno())  # now, while other threads read: at the end all of it would wait
    what = dtype_name(tuned), list(tuned.shape), known, dtype_name(base)
    return Entry(*what, *(digest.hexdigest() for digest in digests))


def recovered_pieces(
    name: str, entry: Entry, base: StoredTensor | None, file: Path, compress: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Where in the tensor, in bytes, and the bits of base + diff there. What is wrong is a
    ValueError, of a digest after the last piece."""
    dtype, count = getattr(torch, entry.dtype), math.prod(entry.shape)
    theirs = flat(base, entry.known)
    if (0 if theirs is None else len(theirs)) != entry.known:
        raise UserError(f"the base is another one: its {name} is missing or smaller")
    damaged = ValueError(f"{file}: the diff of {name} is damaged: fetch it again")
    digests = [hashlib.sha256() for _ in range(3)]
    with open(file, "rb") as opened:
        for start, stop in pieces(count, dtype):
            b = bits(theirs, dtype, start, stop, f"the base's {name}")
            head = opened.read(4) if compress else b""
            size = int.from_bytes(head, "little") if compress else b.nbytes
            if size > 2 * b.nbytes + 1024:  # packing never makes it that much larger
                raise damaged
            content = opened.read(size)
            try:
                d = unpacked(content, b.dtype, b.nbytes) if compress else content
                t = b + np.frombuffer(d, b.dtype)
            except (zlib.error, ValueError):  # not packed data, or too little of it
                raise damaged from None
            used = b[: max(0, entry.known - start)]
            for digest, of in zip(digests, (used, head + content, t), strict=True):
                digest.update(of)
            yield start * dtype.itemsize, t
        if opened.read(1):
            raise damaged
    base_is, diff_is, tuned_is = (digest.hexdigest() for digest in digests)
    if diff_is != entry.diff:
        raise damaged
    if base_is != entry.base:
        raise UserError(f"the base is another one: its {name} is not what the diff was made from")
    if tuned_is != entry.tuned:
        raise UserError(f"{file}: base and diff of {name} are right, but not what they make")
