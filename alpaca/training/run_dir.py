"""The folder of a training run: its settings, its log, and a lock.

    settings.json    what decides the outcome: a run resumes with equal settings only
    metrics.jsonl    every step once, however often the run was interrupted
    loss.svg         the losses, plotted (plot.py); with --objective group, reward.svg
    right_answers.json  three held-out records that it answers as expected, for the page of `serve`

The lock keeps a second process out; it ends with the process that holds it.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from alpaca.common.charts import Series
from alpaca.common.errors import UserError
from alpaca.common.files import atomic_file, write_text
from alpaca.common.json_files import append_jsonl
from alpaca.common.progress import Progress, duration
from alpaca.common.run_folder import run_folder
from alpaca.common.system import available_memory
from alpaca.training.plot import METRICS, plot_run, read_metrics, series
from alpaca.training.throughput import GIB

FORMATS = {  # of the progress line
    "loss": "loss {loss:.3f}  lr {lr:.2e}  grad norm {grad_norm:.2f}  {tokens_per_s:,.0f} tok/s",
    "mfu": "MFU {mfu:.1%}",
    "accuracy": "accuracy {accuracy:.0%}",
    "reward": "reward {reward:.3f}",
    "held_out_loss": "held out {held_out_loss:.3f}",
    "held_out_reward": "held out {held_out_reward:.3f}",
    "memory_GiB": "peak memory {memory_GiB:.1f} GiB",
}
RECENT = 20  # steps that the progress line averages tok/s and MFU over


def step_seconds(step: dict[str, Any]) -> float:
    return step["tokens"] / max(1, step["tokens_per_s"])


def check_space(out: Path, disk: float, memory: float) -> None:
    """Refuse a run that would end with a full disk or no host memory, by the bytes it needs."""
    folder = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    free = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in out.rglob("rank-*"))
    for what, need, has in (("disk", disk, free), ("host memory", memory, available_memory())):
        if need > has:
            raise UserError(
                f"{out}: snapshots and result need {need / GIB:,.3f} GiB of {what}, "
                f"{has / GIB:,.3f} are free: --save-every 0 writes no snapshots"
            )


class RunDir(ExitStack):
    """Opened by rank 0; on other ranks (`quiet`) it neither reads, writes nor prints."""

    def __init__(self, folder: Path, settings: dict[str, Any], quiet: bool):
        super().__init__()
        self.folder, self.quiet = folder, quiet
        group = (settings.get("objective") or "").startswith("group")
        self.figure = "reward" if group else "loss"
        self.metrics, self.chart = folder / METRICS, folder / f"{self.figure}.svg"
        self.held_out = f"held_out_{self.figure}"  # of "held_out_loss/SOURCE", too
        self.records: list[dict[str, Any]] = []
        self.latest: dict[str, Any] = {}  # of each figure
        if quiet:
            return
        self.enter_context(run_folder(folder, settings, "training"))
        for leftover in folder.glob("*.json*.partial"):  # of a kill during a write
            leftover.unlink()

    def finished(self) -> bool:
        if not (self.folder / "settings.json").exists():  # which rank 0 wrote
            raise UserError(f"--out {self.folder} must be one folder that all machines see")
        return any((self.folder / name).exists() for name in ("model", "adapter"))

    def start_log(self, done: int, steps: int) -> None:
        """Continue the log after `done` steps; drop later ones, which will run again."""
        if self.quiet:
            return
        self.records = []
        if done and self.metrics.exists():
            for record in read_metrics(self.metrics):  # held-out figures of now are measured again
                if record["step"] < done + ("loss" in record):
                    self.records.append(record)
        with atomic_file(self.metrics, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
        self.progress = Progress(steps, "steps", done=done)

    def log(self, record: dict[str, Any]) -> None:
        if not self.quiet:
            self.records.append(record)
            self.latest |= record
            append_jsonl(self.metrics, record)

    def log_step(self, record: dict[str, Any]) -> None:
        """Log a step and print the progress line."""
        if self.quiet:
            return
        self.log(record)
        recent = [r for r in self.records[-RECENT:] if "loss" in r]
        shown = dict(self.latest)
        for figure in {"tokens_per_s", "mfu", "accuracy", "reward"} & record.keys():
            weights = [*map(step_seconds, recent)]
            shown[figure] = np.average([r[figure] for r in recent], weights=weights)
        formats = [text for figure, text in FORMATS.items() if figure in shown]
        self.progress.step(extra="  ".join(formats).format_map(shown))

    def series(self, figure: str) -> Series:
        return series(self.records, figure)

    def change(self, figure: str) -> str:
        (_, first), *_, (_, last) = self.series(figure) * 2
        return f"{first:.3f} → {last:.3f}"

    def summary(self) -> str:
        """The run in one line."""
        steps = [record for record in self.records if "loss" in record]
        if not steps:
            return "metrics.jsonl of this run is lost"
        tokens, seconds = sum(r["tokens"] for r in steps), sum(map(step_seconds, steps))
        text = f"{len(steps)} steps, {tokens:,} tokens in {duration(seconds)}; "
        text += f"training {self.figure} {self.change(self.figure)}"
        if accuracy := self.series("held_out_accuracy"):  # at first all pairs are ties: 0
            text += f"; held-out accuracy {accuracy[-1][1]:.3f}"
        for figure in next((r for r in reversed(self.records) if self.held_out in r), ()):
            name, _, source = figure.partition("/")
            if name == self.held_out:
                text += f"{f', {source[:60]}' if source else '; held out'} {self.change(figure)}"
        return text

    def end_log(self) -> None:
        """Print the last progress line and plot the losses."""
        if not self.quiet:
            self.progress.close()
            write_text(self.chart, plot_run(self.records, self.figure))
