"""Runs a recipe of selfinstruct.py with many requests in flight, so that a run can be resumed.

    async with Scheduler(recipe, store, teachers, num=52_000) as scheduler:
        async for entry in scheduler.answers():  # of the request log, in the order of their numbers
            scheduler.finish(judge(entry))       # lines for records.jsonl and rejected.jsonl

Answers arrive in any order but are judged and written in the order of the request numbers, and
the seed and i determine request i. So the same answers make the same records, whether or not the
run was interrupted. `RecordStore` has what an earlier run decided.
"""

import asyncio
import itertools
import math
import re
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from alpaca.common.json_files import append_jsonl, read_log
from alpaca.common.progress import Progress
from alpaca.datagen.client import RefusedError
from alpaca.datagen.four_stage import DROPPED_LATER
from alpaca.datagen.request_log import BudgetExceeded, Teachers
from rougel import Pool

TASK = {  # the shape of a line of records.jsonl and rejected.jsonl
    "item": re.compile(r"\d{1,9}\.\d{1,9}"),
    "instruction": str,
    "why": str | None,
}
MAX_USELESS = 50  # answers in a row without a new instruction, after which a run stops


class RecordStore:
    """records.jsonl and rejected.jsonl, and the pool that a new instruction is compared with."""

    def __init__(self, folder: Path, pool: Pool, any_script: bool):
        self.records, self.rejected = folder / "records.jsonl", folder / "rejected.jsonl"
        self.pool, self.any_script = pool, any_script
        self.decided: set[str] = set()  # "12.3" is the fourth task of answer 12
        self.accepted: list[tuple[int, str]] = []  # number of the answer, instruction
        self.count = 0
        lines = [*read_log(self.records, TASK), *read_log(self.rejected, TASK)]
        for line in sorted(lines, key=lambda line: [int(part) for part in line["item"].split(".")]):
            self.count += "why" not in line
            self.decide(line)

    def decide(self, line: dict) -> None:
        """Note a decision. A kept instruction joins the pool, also if it is dropped later."""
        self.decided.add(line["item"])
        if (line.get("why") or DROPPED_LATER).startswith(DROPPED_LATER):
            self.pool.add(line["instruction"])
            self.accepted.append((int(line["item"].split(".")[0]), line["instruction"]))

    def write(self, lines: list[dict]) -> None:
        """Rejected lines first: after a kill in between, the others are judged the same again."""
        records = [line for line in lines if "why" not in line]
        if rejected := [line for line in lines if "why" in line]:
            append_jsonl(self.rejected, *rejected)
        if records:
            append_jsonl(self.records, *records)
        self.count += len(records)


class Scheduler:
    """Keeps requests in flight, hands out their answers in order, writes the resulting lines."""

    def __init__(self, recipe, store: RecordStore, teachers: Teachers, num: int):
        """`recipe`: selfinstruct.Alpaca or four_stage.SelfInstruct."""
        self.recipe, self.store, self.teachers = recipe, store, teachers
        self.num = num
        self.in_flight: deque[asyncio.Task] = deque()
        self.completing: deque[tuple[list[dict], asyncio.Task]] = deque()
        self.next_number = self.judged = self.useless = 0
        self.progress = Progress(num, "records", done=store.count)

    async def __aenter__(self) -> "Scheduler":
        return self

    async def __aexit__(self, *exception) -> None:
        tasks = [*self.in_flight, *(task for _, task in self.completing)]
        await self.teachers.stop(tasks)
        self.progress.close(self.teachers.status())

    async def answers(self) -> AsyncIterator[dict]:
        """Entries of the request log, until there are enough records or the budget is spent."""
        try:
            while self.store.count < self.num:
                if self.missing() > 0:
                    self._fill()
                    entry = await asyncio.shield(self.in_flight[0])
                    self.in_flight.popleft()
                    yield entry
                    self._check_progress(entry)
                    await asyncio.sleep(0)  # Alpaca's `complete`, which asks nothing, ends in this
                elif not await self._write():
                    return
                while self.completing and self.completing[0][1].done():
                    if not await self._write():
                        return
        except BudgetExceeded:  # no further answer comes
            while self.completing and await self._write():
                pass

    def missing(self) -> int:
        """Records still needed if all that are being completed succeed."""
        coming = (line for lines, _ in self.completing for line in lines if "why" not in line)
        return self.num - self.store.count - sum(1 for _ in coming)

    def finish(self, lines: list[dict]) -> None:
        """Complete the lines of one answer (stages 2 and 3 of the paper), and write them."""
        task = asyncio.create_task(self.recipe.complete(lines, self.teachers.ask))
        self.completing.append((lines, task))

    def _fill(self) -> None:
        """Have as many requests in flight as the missing records are likely to take."""
        tasks_seen = self.num - self.missing() + self.recipe.expected_tasks
        want = math.ceil(self.missing() * (self.judged + 1) / tasks_seen)  # at the rate so far
        while len(self.in_flight) < min(want, self.recipe.window):
            question = self.recipe.prompt(self.next_number, self.store.accepted)
            request = self.teachers.ask(str(self.next_number), *question)
            self.in_flight.append(asyncio.create_task(request))
            self.next_number += 1

    def _check_progress(self, entry: dict) -> None:
        self.judged += 1
        if entry["id"] in self.teachers.log.new:  # answers of earlier runs do not count
            useful = any("why" not in line for line in self.completing[-1][0])
            self.useless = 0 if useful else self.useless + 1
        if self.useless >= MAX_USELESS:
            raise RefusedError(
                f"{MAX_USELESS} answers in a row brought nothing new; the records so far are kept. "
                "Other seeds, another prompt or another teacher may bring more"
            )

    async def _write(self) -> bool:
        """Write the lines of the oldest answer. False if the budget ended before it was complete:
        then nothing later may be written, since its records must come first."""
        lines, task = self.completing[0]
        results = await asyncio.shield(task)
        complete = [*itertools.takewhile(lambda line: line is not None, results)]
        before = self.store.count
        await asyncio.to_thread(self.store.write, complete)
        self.completing.popleft()
        self.progress.step(self.store.count - before, self.teachers.status())
        return len(complete) == len(lines)
