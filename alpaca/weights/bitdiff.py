"""The exact difference of two models: their bit patterns, subtracted as integers.

A difference of floats is rounded, so base + (tuned - base) is not always tuned. But the bits of a
float are also an integer of the same size, and integers that wrap around (modulo 2^16 or 2^32) form
a group. For any two bit patterns, those of NaN and -0.0 too,

    diff = tuned - base    gives    diff + base = tuned

For example, 1.0 in bf16 has the bits 0x3f80 and the next larger number 0x3f81: the difference is 1.
Read as a float of the same dtype, a difference is a tensor like any other, and is stored as one.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import StoredTensor, as_dtype
from alpaca.weights.writer import ShardWriter, tensor_bytes

# name → a tensor of the tuned model (or of the diff), and the base's
TensorPairs = dict[str, tuple[StoredTensor, StoredTensor]]
Hashes = tuple[str, str, str]  # SHA-256 of these two and of the result
INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of a float in bytes
PIECE_BYTES = 1 << 23  # processed at once, so that the memory in use does not grow with a tensor
THREADS = min(4, (os.cpu_count() or 1) + 1)  # reading, hashing and writing overlap


def combine(
    operation: np.ufunc,
    pairs: TensorPairs,
    folder: Path | None,
    check: Callable[[str, Hashes], None] = lambda name, hashes: None,
) -> dict[str, Hashes]:
    """Subtract or add (np.subtract, np.add) the base of every pair, and write the results to
    safetensors files if there is a folder. `check` raises if the hashes of a tensor are wrong."""
    shapes = {name: (other.shape, other.dtype) for name, (other, _) in pairs.items()}
    sizes, hashes = tensor_bytes(shapes), {}
    progress = Progress(sum(sizes.values()), "bytes")

    def work(name: str) -> Hashes:
        write = partial(shards.write_part, name) if shards else lambda start, numbers: None
        found = combine_pair(operation, *pairs[name], write, name)
        check(name, found)
        return found

    writer = ShardWriter(folder, shapes) if folder else nullcontext()
    with writer as shards, ThreadPoolExecutor(THREADS) as threads:
        for name, found in zip(pairs, threads.map(work, pairs), strict=True):
            hashes[name] = found  # an error in `work` is raised here; pairs not begun are dropped
            progress.step(sizes[name])
    progress.close()
    return hashes


def combine_pair(
    operation: np.ufunc,
    other: StoredTensor,
    base: StoredTensor,
    write: Callable[[int, np.ndarray], object],
    name: str,
) -> Hashes:
    """Pass the result to `write` in pieces, as (offset in bytes, integers). The base is converted
    to other's dtype. If it is shorter, zeros follow, which are not hashed."""
    x_all, b_all = other.read().reshape(-1), base.read().reshape(-1)[: other.shape.numel()]
    digests = [hashlib.sha256() for _ in range(3)]
    step = PIECE_BYTES // other.dtype.itemsize
    for start in range(0, len(x_all), step):
        x = bits(x_all[start : start + step])
        b = bits(as_dtype(b_all[start : start + step], other.dtype, f"the base's {name}"))
        result = operation(x, np.pad(b, (0, len(x) - len(b))) if len(b) < len(x) else b)
        for digest, numbers in zip(digests, (x, b, result), strict=True):
            digest.update(numbers.data)
        write(start * other.dtype.itemsize, result)
    return digests[0].hexdigest(), digests[1].hexdigest(), digests[2].hexdigest()


def bits(numbers: Tensor) -> np.ndarray:
    return numbers.view(INTEGERS[numbers.itemsize]).numpy()
