"""A training run's state on disk, to resume from: written in the background, whole or not at all.

  checkpoints/step-000100/    the state after 100 steps
      rank-00000.safetensors  one rank's rows of the weights and of Adam's moments
      index.json              {"step": 100, "ranks": 1}, written when all ranks have written
  checkpoints/*.partial       being written, or cut off by a kill; removed at the next start

- Each rank writes the rows it has. A tensor's rows follow one another from file to file, so any
  other number of ranks finds its rows by counting; it maps the files and reads no other rows.
- `save` starts to copy the state into host memory and returns. The next step computes meanwhile and
  waits before it changes the weights; then the files are written, while training continues. The
  memory, 12 bytes for each parameter that a rank has, is allocated once; for a GPU it is pinned.
- The writers use a process group of their own: in the training's, their messages would mix with its
  collectives.
- A folder gets its name when all its files are written and synced.
"""

import json
import os
import re
import shutil
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed.tensor import DTensor

from alpaca.common.errors import UserError, describe_error, join_names, notice
from alpaca.common.files import atomic_file, fsync_path, remove
from alpaca.common.json_files import read_json
from alpaca.training.parallel import first_row, run_on_all_ranks, trained_parameters
from alpaca.weights.checkpoint import open_file
from alpaca.weights.writer import safetensors_head
from model import Llama

OVERDUE = 15 * 60  # seconds after the last snapshot


class Snapshots:
    """The newest `limit` states of model and optimizer."""

    def __init__(self, folder: Path, limit: int, model: Llama, optimizer: torch.optim.Optimizer):
        self.folder, self.limit, self.model, self.optimizer = folder, limit, model, optimizer
        self.group: Any = dist.new_group(backend="gloo")
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future | None = None
        self.saved = time.monotonic()
        self.staging: Tensor | None = None
        self.stream: Any = None  # on a GPU, the copies run beside the next step
        if next(model.parameters()).is_cuda:
            self.stream = torch.cuda.Stream()
            optimizer.register_step_pre_hook(
                lambda *_: torch.cuda.current_stream().wait_stream(self.stream)
            )

    def _tensors(self) -> dict[str, DTensor]:
        """The tensors of a state, by name."""
        tensors: dict[str, Any] = {}
        for name, parameter in trained_parameters(self.model).items():
            moments = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"exp_avg.{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return tensors

    def load(self) -> int:
        """Load the newest state, the same on every rank. Returns the number of steps that it was
        saved after, 0 if there is none."""
        if dist.get_rank() == 0:
            for partial in self.folder.glob("*.partial"):
                remove(partial)
        newest = states(self.folder)[-1:] or [None]
        dist.broadcast_object_list(newest, src=0, group=self.group)
        if not (folder := newest[0]):
            return 0
        run_on_all_ranks(lambda: read_state(folder, self._tensors()))
        done = step_number(folder)
        for moments in self.optimizer.state.values():
            moments["step"].fill_(done)
        notice(f"resuming after step {done}")
        return done

    def save(self, step: int) -> None:
        """Start to write a state, after the one before has been written."""
        self.finish()
        tensors = list(self._tensors().items())
        shards = tensors[0][1].device_mesh["shard"].size()
        replica, replicas = dist.get_rank() // shards, dist.get_world_size() // shards
        mine = tensors[replica::replicas]  # each replica writes other tensors
        parts = self._copy({name: tensor.to_local() for name, tensor in mine})
        self.writing = self.writer.submit(self._write, step, parts)
        self.saved = time.monotonic()

    def overdue(self) -> bool:
        return time.monotonic() - self.saved > OVERDUE

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Start to copy tensors into host memory."""
        sizes = [tensor.numel() for tensor in tensors.values()]
        if self.staging is None:
            self.staging = torch.empty(sum(sizes))
            if self.stream:  # not `pin_memory=True`, which rounds up to a power of two
                pin_memory(self.staging.data_ptr(), self.staging.nbytes)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        parts = dict(zip(tensors, self.staging.split(sizes), strict=True))
        with torch.cuda.stream(self.stream):
            for name, tensor in tensors.items():
                parts[name] = parts[name].view_as(tensor).copy_(tensor, non_blocking=True)
        return parts

    def _write(self, step: int, parts: dict[str, Tensor]) -> None:
        if self.stream:
            self.stream.synchronize()
        partial = self.folder / f"step-{step:06}.partial"
        run_on_all_ranks(lambda: write_part(partial, parts), self.group)
        run_on_all_ranks(lambda: dist.get_rank() > 0 or self._publish(partial, step), self.group)

    def _publish(self, partial: Path, step: int) -> None:
        """When all ranks have written: give the folder its name, and remove the oldest."""
        with atomic_file(partial / "index.json", "w") as file:
            json.dump({"step": step, "ranks": dist.get_world_size()}, file)
        os.replace(partial, partial.with_suffix(""))
        fsync_path(self.folder)
        for old in states(self.folder)[: -self.limit]:
            remove(old)

    def finish(self) -> None:
        """Wait for the state that is being written, if any, and raise its error. All ranks must
        call it: if writing fails, it fails on all of them."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except UserError as error:
            reason = f"a snapshot could not be written ({error}); the one before it is kept"
            raise UserError(f"{self.folder}: {reason}") from None

    def close(self) -> None:
        """Finish, and free the host memory."""
        self.finish()
        if self.stream and self.staging is not None:
            unpin_memory(self.staging.data_ptr())  # or CUDA would copy from it what comes after it
        self.staging = None


# ---------------------------------------------------------------- files


def states(folder: Path) -> list[Path]:
    """A run's snapshots, the newest last."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,9}", path.name)]
    return sorted(paths, key=step_number)


def step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def remove_snapshots(folder: Path) -> None:
    """Free the disk: a finished run does not resume."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def write_part(folder: Path, parts: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # by whichever rank is first
    head, _ = safetensors_head({name: (part.shape, part.dtype) for name, part in parts.items()})
    with atomic_file(folder / f"rank-{dist.get_rank():05}.safetensors") as file:
        file.write(head)
        for part in parts.values():
            file.write(part.numpy())


def read_state(folder: Path, tensors: dict[str, DTensor]) -> None:
    """Fill this rank's rows of all tensors from a snapshot of any number of ranks."""
    try:
        stored = stored_parts(folder)
        if differing := sorted(stored.keys() ^ tensors.keys()):
            raise UserError(f"{folder}: missing or unexpected {join_names(differing)}")
        for name, tensor in tensors.items():
            row = tensor.ndim, tensor.shape[1:], tensor.dtype
            parts = [p for p in stored[name] if (p.ndim, p.shape[1:], p.dtype) == row]
            if len(tensor) != sum(map(len, parts)):
                raise UserError(f"{folder}: {name} is not {list(tensor.shape)} in fp32")
            copy_rows(parts, first_row(tensor, tensor.device_mesh), tensor.to_local())
    except (UserError, OSError) as error:
        advice = f"remove {folder.name} to resume from an older snapshot, or use another --out"
        raise UserError(f"{describe_error(error)}: {advice}") from None


def stored_parts(folder: Path) -> dict[str, list[Tensor]]:
    """The parts that each tensor's rows are divided into, in order, memory-mapped."""
    index, files = folder / "index.json", sorted(folder.glob("rank-*.safetensors"))
    for file in folder.iterdir():
        if folder.is_symlink() or file.is_symlink() or not file.is_file():
            raise UserError(f"{file}: a link, or not a regular file")
    if not index.exists():
        raise UserError(f"{folder}: no index.json: not whole, or made by an older version")
    if read_json(index) != {"step": step_number(folder), "ranks": len(files)}:
        raise UserError(f"{index}: not the index of the {len(files)} files beside it")
    stored = defaultdict(list)
    for file in files:
        for name, part in open_file(file):
            stored[name].append(part)
    return stored


def copy_rows(parts: list[Tensor], start: int, rows: Tensor) -> None:
    """Fill `rows` with those from `start` on of a tensor whose rows are divided into `parts`."""
    for part in parts:
        found = part[start:][: len(rows)]
        rows[: len(found)].copy_(found)
        start, rows = max(0, start - len(part)), rows[len(found) :]
