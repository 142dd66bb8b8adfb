"""The folder of a training run: what it was started with, how it goes, whose turn it is.

    settings.json    what decides the outcome: the same command goes on, another is refused
    metrics.jsonl    every step once, however often the run was interrupted
    loss.svg         the picture of it

A lock on the folder keeps a second process out; it dies with the process that holds it.

Shown by tests/test_train.py: test_a_run_is_not_mixed_with_another.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common import charts
from alpaca.common.errors import UserError
from alpaca.common.files import append_jsonl, atomic_file, claim_run_folder, read_jsonl
from alpaca.common.progress import Progress, duration

LINE = "loss {loss:.3f}  lr {lr:.2e}  norm {grad_norm:.2f}  {tokens_per_s:,.0f} tokens/s"
LATELY = 20  # steps that the line's tokens/s and MFU are the mean of


def seconds(step: dict[str, Any]) -> float:
    """How long a step took."""
    return step["tokens"] / max(1, step["tokens_per_s"])


class RunFolder:
    """Opened by the first rank; on the others (`quiet`) nothing is read, written or shown."""

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool, quiet: bool):
        self.folder, self.quiet = folder, quiet
        self.metrics, self.chart = folder / "metrics.jsonl", folder / "loss.svg"
        self.records: list[dict[str, Any]] = []
        if quiet:
            return
        if resume and not (folder / "settings.json").exists():
            raise UserError(f"--resume: there is no run in {folder}")
        self.lock = claim_run_folder(folder, settings, "training")
        for leftover in folder.glob("*.json*.partial"):  # of a kill while a file was written
            leftover.unlink()

    def finished(self) -> bool:
        if not (self.folder / "settings.json").exists():  # which the first rank wrote
            raise UserError(f"--out {self.folder} must be one folder that all machines see")
        return any((self.folder / name).exists() for name in ("model", "adapter"))

    def close(self) -> None:
        if not self.quiet:
            os.close(self.lock)

    def begin(self, done: int, steps: int) -> None:
        """Go on after `done` steps: what was logged of later ones will come again."""
        if self.quiet:
            return
        self.records = []
        if done and self.metrics.exists():
            logged = read_jsonl(self.metrics, skip_torn=True)
            self.records = [r for r in logged if r.get("step", math.inf) <= done]
            if done == steps and self.records and "held_out_loss" in self.records[-1]:
                self.records.pop()  # of the trained model; it is measured again
        with atomic_file(self.metrics, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
        self.progress = Progress(steps, "steps", done=done)

    def add(self, record: dict[str, Any]) -> None:
        if not self.quiet:
            self.records.append(record)
            append_jsonl(self.metrics, record)

    def step(self, record: dict[str, Any]) -> None:
        if self.quiet:
            return
        self.add(record)
        recent = [r for r in self.records[-LATELY:] if "loss" in r]
        for figure in ("tokens_per_s", "mfu"):
            if figure in record:
                mean = np.average([r[figure] for r in recent], weights=[*map(seconds, recent)])
                record = {**record, figure: mean}
        mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        memory = f"  {record['memory_GB'] * 1e9 / 2**30:.1f} GiB"
        self.progress.step(extra=LINE.format_map(record) + mfu + memory)

    def points(self, figure: str) -> list[tuple[int, float]]:
        return [(r["step"], r[figure]) for r in self.records if figure in r]

    def summary(self) -> str:
        """What came of it and what was spent, in a line."""
        steps = [record for record in self.records if "loss" in record]
        if not steps:
            return "its log was lost"
        tokens, took = sum(record["tokens"] for record in steps), sum(map(seconds, steps))
        held_out = [loss for _, loss in self.points("held_out_loss")]
        return (
            f"{len(steps)} steps of {tokens:,} tokens in {duration(took)}; "
            f"training loss {steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"
            + (f"; held out {held_out[0]:.3f} → {held_out[-1]:.3f}" if held_out else "")
        )

    def end(self) -> None:
        if not self.quiet:
            self.progress.close()
            lines = {"training": self.points("loss"), "held out": self.points("held_out_loss")}
            chart = charts.line_chart("Loss", "step", {k: v for k, v in lines.items() if v})
            with atomic_file(self.chart, "w") as file:
                file.write(chart)
