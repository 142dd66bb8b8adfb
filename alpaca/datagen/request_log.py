"""Sends each request to a teacher once: every response is stored as it arrives.

    teachers = Teachers(RequestLog(file), endpoints, args)
    entry = await teachers.ask("7", prompt, options)        # read from the log, or asked and stored
    value = await teachers.ask_until("7", parse, 3, prompt, options)   # up to 3 responses
    done = await ask_all(log, endpoint, args, work, one, "answers")    # many items concurrently

An entry of the log is a response as it came, with its cost and provenance. A run that was killed
asks only what is missing: at most the requests in flight at the kill are asked again. Ctrl-C and
SIGTERM wait for these and store them. The seed and the request's number determine its teacher. The
total never exceeds the budget: the most that an attempt can cost is reserved before it is sent.
"""

import argparse
import asyncio
import itertools
import math
import random
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, notice
from alpaca.common.files import fsync_path
from alpaca.common.json_files import append_jsonl, read_log
from alpaca.common.progress import Progress
from alpaca.datagen.client import (
    Client,
    RefusedError,
    Reply,
    RequestFailedError,
    RetryableError,
    parse_reply,
)
from alpaca.datagen.endpoints import Endpoint

Result = Reply | RequestFailedError
MAX_FAILURES = 10  # requests in a row without a response, after which a run stops
ENTRY = {  # the shape of a line of responses.jsonl
    "id": str,
    "provenance": {"teacher": str, "url": str, "endpoint": str, "licence": str},
    "usage": {"prompt": int, "completion": int, "unmetered": int},
    "cost": int | float,
    "response": str | None,
    "failed": str | None,
}


class BudgetExceeded(Exception):
    """The budget does not allow another request."""


class RequestLog:
    """responses.jsonl: all entries by their id, and what they cost together."""

    def __init__(self, file: Path):
        self.file = file
        self.entries: dict[str, dict] = {}
        for number, entry in enumerate(read_log(file, ENTRY), 1):
            try:
                reply_of(entry)
            except (RetryableError, ValueError, RecursionError):
                raise UserError(f"{file}, line {number}: response is not a server's") from None
            self.entries[entry["id"]] = entry
        self.spent = sum(entry["cost"] for entry in self.entries.values())
        self.new: set[str] = set()  # stored by this run

    def store(self, entry: dict) -> None:
        """Write an entry: it survives a kill from here on, and a power cut after an fsync."""
        append_jsonl(self.file, entry, durable=False)
        self.entries[entry["id"]] = entry
        self.new.add(entry["id"])
        self.spent += entry["cost"]


class Teachers:
    """Sends each request once: what is in the log is not asked again."""

    def __init__(self, log: RequestLog, endpoints: list[Endpoint], args: argparse.Namespace):
        """`args`: the flags of `add_server_arguments`, and --seed."""
        self.log, self.endpoints, self.seed = log, endpoints, args.seed
        self.client = Client(args.timeout, args.max_retries, args.retry_wait)
        self.budget = math.inf if args.budget is None else args.budget
        self.slots = asyncio.Semaphore(args.concurrency)
        self.reserved: dict[str, float] = {}  # id of a request in flight -> dollars
        self.failures = 0  # in a row
        self.stopped: Exception | None = None  # why nothing more is sent
        sources = [e["provenance"] for e in log.entries.values() if "response" in e]
        known = {(source["teacher"], source["url"]) for source in sources}
        self.client.answered = {e for e in endpoints if (e.model, e.base_url) in known}

    def endpoint_of(self, id: str) -> Endpoint:
        number = id.split(".")[0]  # an instruction and its instances come from the same teacher
        weights = [endpoint.weight for endpoint in self.endpoints]
        return random.Random(f"{self.seed} {number} teacher").choices(self.endpoints, weights)[0]

    def reserve(self, id: str, amount: float) -> bool:
        """Reserve what an attempt can cost at most, if the budget allows."""
        if self.log.spent + sum(self.reserved.values()) + amount > self.budget:
            return False
        self.reserved[id] = self.reserved.get(id, 0) + amount
        return True

    async def ask(self, id: str, prompt: str, options: dict, seeds: Sequence[str] = ()) -> dict:
        """The log's entry. It has "failed" in place of "response" if no attempt succeeded."""
        if id in self.log.entries:
            return self.log.entries[id]
        endpoint = self.endpoint_of(id)
        body = endpoint.body(prompt, options)
        max_cost = endpoint.max_cost(body)
        async with self.slots:
            while not self.stopped and not self.reserve(id, max_cost):
                if not self.reserved:
                    raise BudgetExceeded
                await asyncio.sleep(0.05)  # those in flight will cost less than is reserved
            if self.stopped:
                raise self.stopped
            try:
                result = await self._send(id, endpoint, body, max_cost)
                entry = log_entry(id, endpoint, seeds, result, max_cost)
                self.log.store(entry)  # at once: while the disk is slow, others arrive
                await asyncio.to_thread(fsync_path, self.log.file)
                if "failed" in entry and self.failures >= MAX_FAILURES:
                    text = f"{MAX_FAILURES} requests in a row without an answer. {result}"
                    raise RefusedError(text)
            except (RefusedError, OSError) as error:  # also a full disk: buy nothing more
                self.stopped = error
                raise
            finally:
                del self.reserved[id]
        return entry

    async def _send(self, id: str, endpoint: Endpoint, body: dict, max_cost: float) -> Result:
        may_retry = partial(self.reserve, id, max_cost)  # every attempt may be billed
        try:
            reply = await self.client.ask(endpoint, body, may_retry)
        except RequestFailedError as error:
            if self.stopped and not any(error.usage):  # nothing was billed: ask in the next run
                raise self.stopped from None
            self.failures += 1
            return error
        self.failures = 0
        return reply

    async def ask_until(self, id: str, parse: Callable, tries: int, prompt: str, options: dict):
        """The first result of `parse` that is not None, over at most `tries` responses, those in
        the log first. A failure of an earlier run does not count: the server may have recovered."""
        for number in itertools.count():
            entry = self.log.entries.get(f"{id}.{number}")
            if entry is None and tries <= 0:
                return None
            entry = entry or await self.ask(f"{id}.{number}", prompt, options)
            reply = reply_of(entry)
            if reply and (value := parse(reply)) is not None:
                return value
            tries -= reply is not None or entry["id"] in self.log.new

    async def stop(self, tasks: list[asyncio.Task]) -> None:
        """Send nothing more, wait for what is in flight (it is paid for), and disconnect."""
        self.stopped = self.stopped or BudgetExceeded()
        self.client.closing = True
        if self.reserved and tasks:
            notice(f"waiting for {len(self.reserved)} answers in flight (Ctrl-C abandons them)")
            await asyncio.wait(tasks, timeout=self.client.timeout)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.http.aclose()

    def status(self) -> str:
        retries = f"  {self.client.retries} retries" if self.client.retries else ""
        return f"${self.log.spent:.2f}  {len(self.reserved)} in flight{retries}"


def log_entry(
    id: str, endpoint: Endpoint, seeds: Sequence[str], result: Result, max_cost: float
) -> dict[str, Any]:
    """A line of responses.jsonl. A response without a token count is charged at its maximum."""
    provenance = {
        "teacher": endpoint.model,
        "url": endpoint.base_url,
        "endpoint": endpoint.kind,
        "licence": endpoint.licence,
        "request": id,
        "request_id": getattr(result, "request_id", ""),
        "prompt_seeds": list(seeds),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    entry = {"id": id, "provenance": provenance, "usage": result.usage._asdict()}
    entry["cost"] = endpoint.cost(result.usage) + result.usage.unmetered * max_cost
    if isinstance(result, Reply):
        return entry | {"attempts": result.attempts, "response": result.body}
    return entry | {"failed": str(result)}


def reply_of(entry: dict) -> Reply | None:
    """The reply in an entry of the log; None if there was no answer."""
    return None if "failed" in entry else parse_reply(entry.get("response", ""))


def run_until_signal(main: Coroutine) -> Any:
    """Run a coroutine. SIGTERM, which a cluster sends before it kills, ends it as Ctrl-C does: by a
    CancelledError, so that what is in flight can be stored."""

    async def cancellable() -> Any:
        task = asyncio.ensure_future(main)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def ask_all(
    log: RequestLog, endpoint: Endpoint, args, work: Mapping[str, Any], one: Callable, unit: str
) -> bool:
    """Run `one(teachers, id, item)` for all items concurrently. False if the budget ended first."""
    if not work:
        return True
    known = {id for id in work if f"{id}.0" in log.entries}
    progress = Progress(len(work), unit, done=len(known))
    teachers = Teachers(log, [endpoint], args)

    async def run(id: str, item: Any) -> bool:
        try:
            await one(teachers, id, item)
        except BudgetExceeded:  # others may cost less
            return False
        progress.step(id not in known, teachers.status())
        return True

    tasks = [asyncio.create_task(run(id, item)) for id, item in work.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        results = [task.result() for task in done]  # all of them: any may raise
        return all(results)
    finally:
        await teachers.stop(tasks)
        progress.close(teachers.status())
