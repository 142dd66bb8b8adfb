"""A folder's safetensors files, laid out before the first tensor comes.

A file is a length in eight bytes, a JSON header of that length, and the data: the numbers of one
tensor behind those of another. The header tells name, dtype, shape and place of each. So where a
tensor will stand is known from shapes alone, and then

  - tensors may come in any order, and only one of them has to be in memory;
  - parts of tensors may come, from several threads (`place`);
  - what an interrupted run has written can be looked at and left as it is (`digest`).

Shown by tests/test_checkpoint.py: test_pairs_may_come_in_any_order_but_must_all_come.
"""

import hashlib
import json
import math
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SAFETENSORS |= {torch.int8: "I8", torch.uint8: "U8"}  # of weights that quantize.py has rounded
SHARD_BYTES = 5_000_000_000


def tensor_bytes(shapes: dict[str, tuple]) -> dict[str, int]:
    """Of tensors known by shape and dtype, or by more that comes after these."""
    return {name: math.prod(what[0]) * what[1].itemsize for name, what in shapes.items()}


def shards_of(shapes: dict[str, tuple], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name → the tensors in it."""
    groups, room = [], 0
    for name, size in tensor_bytes(shapes).items():
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    titles = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    return dict(zip(titles if len(groups) > 1 else ["model.safetensors"], groups, strict=True))


class Shards(ExitStack):
    """Files laid out when it begins and closed when it ends. What they hold already stays until it
    is written over."""

    def __init__(self, folder: Path, shapes: dict[str, tuple], shard_bytes: int = SHARD_BYTES):
        super().__init__()
        sizes, groups = tensor_bytes(shapes), shards_of(shapes, shard_bytes)
        self.pending = {}  # tensor → (file, offset, shape, dtype)
        for title, names in groups.items():
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                (shape, dtype), start, end = shapes[name], end, end + sizes[name]
                place = {"shape": list(shape), "data_offsets": [start, end]}
                header[name] = {"dtype": SAFETENSORS[dtype], **place}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)  # the data starts aligned
            (folder / title).touch()
            file = self.enter_context((folder / title).open("r+b"))
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            file.truncate(8 + len(text) + end)
            for name in names:
                start = 8 + len(text) + header[name]["data_offsets"][0]
                self.pending[name] = file, start, *shapes[name]
        if len(groups) > 1:
            weight_map = {name: title for title, names in groups.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text)

    def write(self, name: str, tensor: Tensor) -> None:
        if name not in self.pending:
            raise UserError(f"unexpected or repeated tensor {name}")
        file, offset, shape, dtype = self.pending.pop(name)
        if tensor.shape != shape:
            raise UserError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
        file.seek(offset)
        file.write(tensor.contiguous().view(torch.uint8).numpy())

    def place(self, name: str, at: int, numbers: np.ndarray) -> None:
        """Write a part of a tensor, `at` bytes from its start; any thread may."""
        file, offset, _, _ = self.pending[name]
        content, done = numbers.data.cast("B"), 0
        while done < len(content):
            done += os.pwrite(file.fileno(), content[done:], offset + at + done)
        # the disk may begin with it: otherwise all of it waits for the last tensor
        os.posix_fadvise(file.fileno(), offset + at, done, os.POSIX_FADV_DONTNEED)

    def digest(self, name: str) -> str:
        """SHA-256 of what is there in a tensor's place."""
        file, offset, shape, dtype = self.pending[name]
        left, digest = math.prod(shape) * dtype.itemsize, hashlib.sha256()
        while left and (found := os.pread(file.fileno(), min(left, 1 << 23), offset)):
            digest.update(found)
            left, offset = left - len(found), offset + len(found)
        return digest.hexdigest()
