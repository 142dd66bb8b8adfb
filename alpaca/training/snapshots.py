"""A training run's state on disk, to resume from: written in the background, whole or not at all.

  checkpoints/step-000100/    every rank's part of weights and Adam moments after 100 steps
  checkpoints/*.partial       being written, or cut off by a kill; removed at the next start

- `torch.distributed.checkpoint` has each rank write its own shards, and reads them back for any
  other number of ranks.
- `save` copies the state and returns; files are written while training continues. The writers use a
  process group of their own: in the training's, their messages would mix with its collectives.
- A folder gets its name when all ranks have written and synced their parts, so a kill or a full
  disk costs the newest state at most.
- It holds tensors only; all else that a run must know is JSON, in the run's folder. (Reading uses
  the checkpoint library's own pickled index: resume from your own folders only.)
"""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from alpaca.common.errors import UserError, notice
from alpaca.common.files import fsync_path
from alpaca.training.parallel import is_peer_failure, trained_parameters
from model import Llama


class Snapshots:
    """The newest `limit` states of model and optimizer."""

    def __init__(self, folder: Path, limit: int, model: Llama, optimizer: torch.optim.Optimizer):
        self.folder, self.limit, self.model, self.optimizer = folder, limit, model, optimizer
        self.group: Any = dist.new_group(backend="gloo")
        self.first = dist.get_rank() == 0  # the rank that names and removes folders
        self.writing: Any = None  # a Future
        self.renaming: Thread | None = None
        self.rename_error: OSError | None = None

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("step-*[0-9]"), key=step_number)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What a state holds."""
        tensors = {}
        for name, parameter in trained_parameters(self.model).items():
            moments = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"exp_avg.{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return tensors

    def load(self) -> int:
        """Load the newest state, the same on every rank. Returns the number of steps that it was
        saved after, 0 if there is none."""
        if self.first:
            for partial in self.folder.glob("*.partial"):
                shutil.rmtree(partial)
        found = [self._states()[-1:]]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if not found[0]:
            return 0
        (folder,) = found[0]
        try:
            dcp.load(self._tensors(), checkpoint_id=folder, process_group=self.group)
        except (CheckpointException, OSError, RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder} cannot be read ({root_cause(error)}): remove it to resume from an older "
                "one"
            ) from None
        done = step_number(folder)
        for moments in self.optimizer.state.values():
            moments["step"].fill_(done)
        notice(f"resuming after step {done}")
        return done

    def save(self, step: int) -> None:
        """Start to write a state, when the one before is written."""
        self.finish()
        final = self.folder / f"step-{step:06}"
        partial = final.with_name(final.name + ".partial")
        if self.first:
            partial.mkdir(parents=True, exist_ok=True)
        dist.barrier(self.group)
        # A writer of our own: the default one would open a context on GPU 0 from every rank.
        writer = dcp.FileSystemWriter(partial)
        self.writing = dcp.async_save(
            self._tensors(), storage_writer=writer, process_group=self.group
        )
        if self.first:
            self.renaming = Thread(target=self._rename, args=(self.writing, partial, final))
            self.renaming.start()

    def _rename(self, writing: Future, partial: Path, final: Path) -> None:
        """The first rank coordinates the others: when its part is written, so are all."""
        if writing.exception() is not None:
            return  # `finish` raises it
        try:
            fsync_path(partial)
            os.replace(partial, final)
            fsync_path(self.folder)
            for old in self._states()[: -self.limit]:
                shutil.rmtree(old)
        except OSError as error:
            self.rename_error = error

    def finish(self) -> None:
        """Wait for the state that is being written, if any, and raise its error. All ranks must
        call it: if writing fails, it fails on all of them."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            reason = root_cause(error)
            if is_peer_failure(reason):
                raise RuntimeError(reason) from None
            raise UserError(
                f"{self.folder}: a snapshot could not be written ({reason}); the one before it is "
                "kept"
            ) from None
        if self.renaming:
            self.renaming.join()
        if self.rename_error:
            raise self.rename_error
        dist.barrier(self.group)  # no rank ends, and others with it, before the folder has its name


def remove_snapshots(folder: Path) -> None:
    """Free the disk: a finished run does not resume."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def root_cause(error: BaseException) -> str:
    """The first line of the error that a failed checkpoint began with."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).split("\n")[0]
