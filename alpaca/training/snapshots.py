"""A training run's state on disk: written in the background, whole or not at all, the last K kept.

  checkpoints/step-000100/    every rank's part of weights and Adam moments after 100 steps
  checkpoints/*.partial       being written, or cut off; cleared at the next start

- `torch.distributed.checkpoint` has each rank write its own shards, and reads them back for any
  other number of ranks.
- Saving copies the state aside and returns; files are written while training goes on. Ranks talk
  meanwhile over a process group of their own, or their messages would mix with the training's.
- A folder gets its name when all ranks have written and synced theirs, so a kill or a full disk
  costs at most the newest state.
- Only tensors are in it; what else a run must know is JSON, in its folder. (Reading still goes
  through the checkpoint library's own pickled index: resume from your own folders only.)

Shown by tests/test_train.py: test_a_killed_run_goes_on_to_the_same_bits.
"""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from alpaca.common.errors import UserError
from alpaca.common.files import fsync_path
from alpaca.training.parallel import lost_contact


class Snapshots:
    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.group = dist.new_group(backend="gloo")
        self.first = dist.get_rank() == 0  # the rank that names and removes folders
        self.writing: Future | None = None
        self.naming: Thread | None = None
        self.trouble: OSError | None = None

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("step-*[0-9]"), key=step_of)

    def load(self, tensors: dict[str, torch.Tensor]) -> int:
        """Fill `tensors` in place from the last whole state, the same on every rank; returns how
        many steps it was taken after, 0 if there is none."""
        if self.first:
            for partial in self.folder.glob("*.partial"):
                shutil.rmtree(partial)
        found = [self._states()[-1:]]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if not found[0]:
            return 0
        (folder,) = found[0]
        try:
            dcp.load(tensors, checkpoint_id=folder, process_group=self.group)
            return step_of(folder)
        except (CheckpointException, OSError, RuntimeError, KeyError, ValueError) as mistake:
            raise UserError(
                f"{folder} cannot be read ({cause(mistake)}): remove it to go on from an older one"
            ) from None

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Begin to write a state; the one before is waited for."""
        self.finish()
        final = self.folder / f"step-{step:06}"
        partial = final.with_name(final.name + ".partial")
        if self.first:
            partial.mkdir(parents=True, exist_ok=True)
        dist.barrier(self.group)
        # A writer of our own: the default one would open a context on GPU 0 from every rank.
        writer = dcp.FileSystemWriter(partial)
        self.writing = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        if self.first:
            self.naming = Thread(target=self._name, args=(self.writing, partial, final))
            self.naming.start()

    def _name(self, writing: Future, partial: Path, final: Path) -> None:
        """The first rank coordinates the others: when its part is done, so are all."""
        if writing.exception() is not None:
            return  # `finish` tells
        try:
            fsync_path(partial)
            os.replace(partial, final)
            fsync_path(self.folder)
            for old in self._states()[: -self.keep]:
                shutil.rmtree(old)
        except OSError as mistake:
            self.trouble = mistake

    def finish(self) -> None:
        """Wait for the state under way, if any, and tell what went wrong. All ranks must call it,
        for writing fails on all of them."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except (CheckpointException, OSError, RuntimeError) as mistake:
            if lost_contact(cause(mistake)):
                raise RuntimeError(cause(mistake)) from None
            raise UserError(
                f"{self.folder}: a snapshot could not be written ({cause(mistake)}); "
                "the one before it is kept"
            ) from None
        if self.naming:
            self.naming.join()
        if self.trouble:
            raise self.trouble
        dist.barrier(self.group)  # nobody leaves, and takes the others along, before it has a name

    def remove(self) -> None:
        """The run is over: what it would go on from is in the way of the disk."""
        if self.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def cause(mistake: BaseException) -> str:
    """The first line of what went wrong at the bottom of it."""
    if isinstance(mistake, CheckpointException) and mistake.failures:
        mistake = next(iter(mistake.failures.values()))[0]
    return (str(mistake).strip() or type(mistake).__name__).split("\n")[0]
