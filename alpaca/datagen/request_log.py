"""Asking teachers, each question once: every answer is on disk before it is used.

    teachers = Teachers(Answers(file), endpoints, client, args)
    entry = await teachers.ask("7", prompt, options, seeds)      # asked and stored, or just read

    found = await teachers.ask_until("7", read, 3, prompt, options)      # until `read` can use one
    verdicts = await ask_all(file, endpoint, args, work, one, "answers")          # many at once

An entry of responses.jsonl is an answer as it came, with what it cost and where it is from. A run
that was killed asks again only for what is not there. Which teacher gets a question hangs on
--seed and the question's number alone. A budget is kept: the most that a request can cost is set
aside before it is sent.

Shown by tests/test_selfinstruct.py: test_killed_three_times_it_ends_as_if_it_had_never_been.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from alpaca.common.cli import positive
from alpaca.common.errors import UserError, notice
from alpaca.common.files import append_jsonl, read_log
from alpaca.common.progress import Progress
from alpaca.datagen import batch
from alpaca.datagen.client import (
    API_PATHS,
    TOKEN_LIMITS,
    Client,
    Endpoint,
    RefusedError,
    Reply,
    RequestFailedError,
    parse_reply,
)

T = TypeVar("T")

OPENAI_URL = "https://api.openai.com/v1"
PATIENCE = 10  # requests in a row without an answer, after which a run stops


class BudgetExceeded(Exception):
    """The budget has no room for another request."""


class RequestLog:
    """responses.jsonl, read."""

    def __init__(self, file: Path):
        self.file = file
        self.entries: dict[str, dict] = {}
        for number, entry in enumerate(read_log(file), 1):
            said = entry.keys() & {"response", "failed"}
            if not said or not {"id", "provenance", "usage", "cost"} <= entry.keys():
                raise UserError(f"{file}, line {number}: no answer as they are stored here")
            self.entries[entry["id"]] = entry
        self.spent = sum(entry["cost"] for entry in self.entries.values())
        self.fresh: set[str] = set()  # not from an earlier run

    def store(self, entry: dict) -> None:
        append_jsonl(self.file, entry)
        self.entries[entry["id"]] = entry
        self.fresh.add(entry["id"])
        self.spent += entry["cost"]


class Teachers:
    """Asks each question once: what there is an answer to is not asked, nor paid, again."""

    def __init__(self, answers: RequestLog, endpoints: list[Endpoint], client: Client, args):
        self.answers, self.endpoints, self.client = answers, endpoints, client
        self.budget, self.reserved, self.seed = args.budget, 0.0, args.seed
        self.turn = asyncio.Semaphore(args.concurrency)
        self.in_flight = self.in_a_row = 0
        self.closed = False
        self.why: Exception = BudgetExceeded()
        known = [e["provenance"] for e in answers.entries.values() if "response" in e]
        known = {(of["teacher"], of["url"]) for of in known}
        client.answered |= {one for one in endpoints if (one.model, one.url) in known}

    def teacher(self, id: str) -> Endpoint:
        number = id.split(".")[0]  # one teacher for an instruction and its instances
        weights = [endpoint.weight for endpoint in self.endpoints]
        return random.Random(f"{self.seed} {number} teacher").choices(self.endpoints, weights)[0]

    def reserve(self, most: float) -> bool:
        """Set aside the most that a request can cost, if there is as much."""
        afforded = self.budget is None or self.answers.spent + self.reserved + most <= self.budget
        self.reserved += most if afforded else 0
        return afforded

    async def ask(self, id: str, prompt: str, options: dict, seeds: list[str]) -> dict:
        """The entry of responses.jsonl; one without a response if no attempt brought any."""
        if id in self.answers.entries:
            return self.answers.entries[id]
        endpoint = self.teacher(id)
        most = endpoint.max_cost(endpoint.body(prompt, options))
        async with self.turn:
            while not self.closed and not self.reserve(most):
                if not self.in_flight:
                    raise BudgetExceeded
                await asyncio.sleep(0.05)  # others will cost less than they may
            if self.closed:
                raise self.why
            self.in_flight += 1
            held = most

            def again() -> bool:
                """A further attempt may be billed too."""
                nonlocal held
                afforded = self.reserve(most)
                held += most if afforded else 0
                return afforded

            try:
                found = await self.answer(endpoint, prompt, again, options)
                if self.closed and isinstance(found, RequestFailedError) and not any(found.usage):
                    raise self.why  # it will be asked anew
                entry = self.entry(id, endpoint, seeds, found, most)
                await asyncio.to_thread(self.answers.store, entry)
                if "failed" in entry and self.in_a_row >= PATIENCE:
                    why = f"{PATIENCE} requests in a row without an answer. {entry['failed']}"
                    raise RefusedError(why)
            except (RefusedError, OSError) as problem:  # also a full disk: buy no more
                self.closed, self.why = True, problem
                raise
            finally:
                self.in_flight -= 1
                self.reserved -= held
        return entry

    async def ask_until(
        self, id: str, read: Callable[[Reply], T | None], tries: int, prompt: str, options: dict
    ) -> T | None:
        """What `read` makes of the first answer that is of use to it: of all that are stored, then
        of new ones, as long as there are less than `tries`. No answer at all in an earlier run does
        not count: the server may be well again."""
        for number in itertools.count():
            entry = self.answers.entries.get(f"{id}.{number}")
            if entry is None and tries <= 0:
                return None
            entry = entry or await self.ask(f"{id}.{number}", prompt, options, [])
            if "response" in entry:
                found = read(parse_reply(entry["response"]))
                if found is not None:
                    return found
            tries -= "response" in entry or entry["id"] in self.answers.fresh

    async def answer(
        self, endpoint: Endpoint, prompt: str, again: Callable[[], bool], options: dict
    ) -> Reply | RequestFailedError:
        try:
            reply = await self.client.ask(endpoint, prompt, again, **options)
        except RequestFailedError as problem:
            if problem.unreachable:
                raise RefusedError(str(problem)) from None
            self.in_a_row += 1
            return problem
        self.in_a_row = 0
        return reply

    def entry(
        self,
        id: str,
        endpoint: Endpoint,
        seeds: list[str],
        found: Reply | RequestFailedError,
        most: float,
        price: float = 1,
    ) -> dict:
        """An answer, or the lack of one, as responses.jsonl keeps it. One for which the server
        does not tell the tokens counts as the most it can have cost."""
        provenance = {
            "teacher": endpoint.model,
            "url": endpoint.url,
            "endpoint": endpoint.kind + (" in a batch" if price != 1 else ""),
            "licence": endpoint.licence,
            "request": id,
            "request_id": getattr(found, "request_id", ""),
            "prompt_seeds": seeds,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        entry = {"id": id, "provenance": provenance, "usage": found.usage._asdict()}
        entry["cost"] = (endpoint.cost(found.usage) + found.usage.unmetered * most) * price
        if isinstance(found, Reply):
            return entry | {"attempts": found.attempts, "response": found.body}
        return entry | {"failed": str(found)}

    async def ask_in_batches(self, ids: list[str], request: Callable, every: float) -> None:
        """All of these at once, at half the price, within a day. `request` makes prompt, options
        and seeds from an id."""

        def body_of(id: str) -> dict:
            prompt, options, _ = request(id)
            return self.teacher(id).body(prompt, options)

        async def ask_one(endpoint: Endpoint) -> int:
            mine = [id for id in ids if self.teacher(id) == endpoint and id not in under_way]
            mine = mine[: self.affordable(endpoint, [body_of(id) for id in mine])]
            found = batch.fetch(self.client, endpoint, mine, body_of, log, every, notice)
            async for replies in found:
                if not any(isinstance(reply, Reply) for reply in replies.values()):
                    raise RefusedError(
                        f"a whole batch without an answer: {next(iter(replies.values()))}"
                    )
                for id, reply in replies.items():
                    if id not in self.answers.entries:
                        most, seeds = endpoint.max_cost(body_of(id)), request(id)[2]
                        entry = self.entry(id, endpoint, seeds, reply, most, batch.PRICE)
                        self.answers.store(entry)
            return len(mine)

        log = self.answers.file.parent / "batches.jsonl"
        under_way = {id for there in batch.begun(log) for id in there["ids"]}
        try:
            sent = await asyncio.gather(*map(ask_one, self.endpoints))
        except RequestFailedError as problem:
            raise RefusedError(str(problem)) from None
        if not under_way and not any(sent):
            raise BudgetExceeded

    def affordable(self, endpoint: Endpoint, bodies: list[dict]) -> int:
        """How many of these the budget has room for, whatever their answers will cost."""
        left = math.inf if self.budget is None else self.budget - self.answers.spent
        for number, body in enumerate(bodies):
            left -= endpoint.max_cost(body) * batch.PRICE
            if left < 0:
                return number
        return len(bodies)

    async def stop(self, tasks: list[asyncio.Task]) -> None:
        """Send nothing more, but take what is on its way: it is paid for."""
        self.closed = self.client.closing = True
        if self.in_flight and tasks:
            notice(f"waiting for {self.in_flight} answers under way (Ctrl-C leaves them)")
            await asyncio.wait(tasks, timeout=self.client.timeout)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def line(self) -> str:
        retries = self.client.retries
        parts = [f"${self.answers.spent:.2f}", f"{self.in_flight} in flight"]
        return "  ".join([*parts, f"{retries} retries"] if retries else parts)


async def ask_all(
    answers: RequestLog,
    endpoint: Endpoint,
    args: argparse.Namespace,
    work: Mapping[str, T],
    one: Callable[[Teachers, str, T], Awaitable[None]],
    unit: str,
) -> bool:
    """`one(teachers, id, item)` for all the items, many at once; did the money last?"""
    if not work:
        return True
    enough, known = True, {id for id in work if f"{id}.0" in answers.entries}
    progress = Progress(len(work), unit, done=len(known))
    async with Client(args.timeout, args.max_retries, args.retry_wait) as client:
        teachers = Teachers(answers, [endpoint], client, args)

        async def do(id: str, item: T) -> None:
            nonlocal enough
            try:
                await one(teachers, id, item)
                progress.step(id not in known, teachers.line())
            except BudgetExceeded:  # others may cost less
                enough = False

        tasks = [asyncio.create_task(do(id, item)) for id, item in work.items()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            await teachers.stop(tasks)
            progress.close(teachers.line())
    return enough


# ---------------------------------------------------------------- flags of whoever asks


def add_server_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which server, how it is asked, what it may cost; returns the group for more about money."""
    count, number = positive(int), positive(float)
    add = parser.add_argument_group("server").add_argument
    add(
        "--base-url",
        default=OPENAI_URL,
        metavar="URL",
        help="server, up to /v1 (default: OpenAI's)",
    )
    add("--kind", choices=API_PATHS, default="chat", help="which of its two APIs (default: chat)")
    add(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the key (default: OPENAI_API_KEY)",
    )
    add(
        "--request",
        type=json_object,
        default={},
        metavar="JSON",
        help="more or other fields of the request; null leaves one out: "
        '\'{"max_tokens": null, "max_completion_tokens": 3072}\'',
    )
    add("--concurrency", type=count, default=32, help="requests at once (default: 32)")
    add("--timeout", type=number, default=300, help="seconds for a whole answer (default: 300)")
    add("--max-retries", type=whole_number, default=7, help="of one request (default: 7)")
    waits = "seconds before the first retry, then doubling to 60 (default: 1)"
    add("--retry-wait", type=number, default=1, help=waits)
    money = parser.add_argument_group("money")
    add = money.add_argument
    add("--price-in", type=float, default=0.0, help="dollars a million tokens asked (default: 0)")
    add("--price-out", type=float, default=0.0, help="the same for answers (default: 0)")
    add("--budget", type=number, help="dollars, those of earlier runs too (default: no limit)")
    return money


def whole_number(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


whole_number.__name__ = "whole number"  # argparse: invalid whole number value: '-3'


def json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError
    return found


json_object.__name__ = "JSON object"  # argparse: invalid JSON object value


def endpoints_from_args(
    args: argparse.Namespace, models: list[str], licence: str = ""
) -> list[Endpoint]:
    """The models to ask, where the flags are their defaults."""
    default = {"url": args.base_url, "kind": args.kind, "key": args.key_env, "licence": licence}
    default |= {"price_in": args.price_in, "price_out": args.price_out}
    endpoints = [Endpoint.parsed(text, default) for text in models]
    for endpoint in endpoints:
        endpoint.secret()  # refused now if it cannot be a key
        if args.budget is not None and not (endpoint.price_in and endpoint.price_out):
            raise UserError(
                f"--budget needs the prices of {endpoint.model}: --price-in, --price-out"
            )
    check_request(args)
    return endpoints


def endpoint_from_args(args: argparse.Namespace, flag: str, model: str) -> Endpoint:
    """The one model to ask: a plain name, since all else about it has a flag of its own."""
    if not model or {"=", ","} & set(model):
        raise UserError(f"{flag} {model!r} is no name of a model; --base-url names the server")
    (endpoint,) = endpoints_from_args(args, [model])
    return endpoint


def check_request(args: argparse.Namespace) -> None:
    """What --request may not say: the rest of the run relies on it."""
    if odd := args.request.keys() & {"model", "messages", "prompt", "stream", "n", "best_of"}:
        raise UserError(f"--request: {', '.join(sorted(odd))} is not for it to say")
    limits = [args.request[name] for name in TOKEN_LIMITS if args.request.get(name) is not None]
    if not all(type(limit) is int and limit > 0 for limit in limits):
        raise UserError(f"--request: {' and '.join(TOKEN_LIMITS)} are numbers above 0")
    if args.budget is not None and not limits and "max_tokens" in args.request:
        raise UserError(f"--budget needs a limit: one of {' and '.join(TOKEN_LIMITS)} in --request")
