"""The Batch API of OpenAI: many requests in one file, answered within a day at half the price.

    await ask_in_batches(teachers, ["7", "8"], question, poll=30)    # into the request log

A batch that was paid for is neither lost nor bought twice. Before it is created, its name is
written to batches.jsonl beside the request log. The server stores the name too, so that after a
kill the batch is found in the server's list. Another line follows when the results are stored.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpaca.common.errors import notice
from alpaca.common.json_files import append_jsonl, check_shape, read_log
from alpaca.common.progress import duration
from alpaca.datagen.client import (
    Client,
    RefusedError,
    Reply,
    RequestFailedError,
    RetryableError,
    parse_reply,
)
from alpaca.datagen.endpoints import API_PATHS, Endpoint
from alpaca.datagen.request_log import BudgetExceeded, Result, Teachers, log_entry

PRICE = 0.5  # of what single requests cost
MAX_REQUESTS = 20_000  # in a batch; the server's own limits are 50,000 and 200 MB
BATCH = {"name": str, "model": str, "url": str, "kind": str, "ids": [str]}
FINAL = ("completed", "expired", "cancelled", "failed")
Question = Callable[[str], tuple[str, dict, list[str]]]  # id -> prompt, options, ids of its seeds


async def ask_in_batches(
    teachers: Teachers, ids: list[str], question: Question, poll: float
) -> None:
    """Ask as many of these as the budget allows, a batch per teacher. A teacher with an unfinished
    batch of an earlier run completes that one first."""
    file = teachers.log.file.parent / "batches.jsonl"
    batches = pending_batches(file)
    bought = [id for batch in batches for id in batch["ids"]]
    chosen: dict[Endpoint, list[str]] = {endpoint: [] for endpoint in teachers.endpoints}
    for id in dict.fromkeys([*bought, *ids]):
        endpoint = teachers.endpoint_of(id)
        max_cost = endpoint.max_cost(endpoint.body(*question(id)[:2])) * PRICE
        if not teachers.reserve(id, max_cost) and id not in bought:
            break
        chosen[endpoint].append(id)
    if not any(chosen.values()):
        raise BudgetExceeded
    for endpoint, new in chosen.items():
        if new and not any(belongs_to(endpoint, batch) for batch in batches):
            name = "alpaca-" + secrets.token_hex(8)
            batch = {"name": name, "model": endpoint.model, "url": endpoint.base_url}
            batch |= {"kind": endpoint.kind, "ids": new[:MAX_REQUESTS]}
            append_jsonl(file, batch)
            batches.append(batch)
    try:
        await asyncio.gather(*(run_batch(teachers, one, question, poll, file) for one in batches))
    except RequestFailedError as error:
        raise RefusedError(str(error)) from None
    finally:
        teachers.reserved.clear()


async def run_batch(
    teachers: Teachers, batch: dict, question: Question, poll: float, file: Path
) -> None:
    """Create a batch, or find it again; wait until it is finished, and store its replies."""
    endpoint = next(e for e in teachers.endpoints if belongs_to(e, batch))
    client, bodies = teachers.client, {}
    for id in batch["ids"]:
        prompt, options, _ = question(id)
        bodies[id] = endpoint.body(prompt, options)
    state, start = await find_or_create(client, endpoint, batch["name"], bodies), time.monotonic()
    while state["status"] not in FINAL:
        done = (state.get("request_counts") or {}).get("completed", 0)
        waited = duration(time.monotonic() - start)
        notice(f"batch {state['id']}: {state['status']}, {done} of {len(bodies)}, {waited}")
        await asyncio.sleep(poll)
        try:
            state = await client.call(endpoint, "GET", f"batches/{state['id']}", parse_batch)
        except RequestFailedError as error:  # the server works on it all the same
            notice(str(error))
    replies: dict[str, Result] = {}
    for field in ("output_file_id", "error_file_id"):
        if state.get(field):
            path = f"files/{state[field]}/content"
            replies |= await client.call(endpoint, "GET", path, parse_results)
    new = [id for id in bodies if id in replies and id not in teachers.log.entries]
    for id in new:
        max_cost, seeds = endpoint.max_cost(bodies[id]), question(id)[2]
        teachers.log.store(log_entry(id, endpoint, seeds, replies[id], max_cost, PRICE))
    if new:
        await teachers.log.sync()
    append_jsonl(file, {"name": batch["name"], "over": state["status"]})
    if not any(isinstance(reply, Reply) for reply in replies.values()):
        why = str(next(iter(replies.values()), state.get("errors")))[:300]
        raise RefusedError(f"batch {state['id']} is {state['status']}, without any answer: {why}")


async def find_or_create(
    client: Client, endpoint: Endpoint, name: str, bodies: dict[str, dict]
) -> dict[str, Any]:
    """The server's description of our batch. If creating it fails, the list is searched before
    another attempt: perhaps only the response was lost, and the batch exists."""
    request = {"method": "POST", "url": f"/v1/{API_PATHS[endpoint.kind]}"}
    lines = [json.dumps(request | {"custom_id": id, "body": body}) for id, body in bodies.items()]
    upload = {"file": (f"{name}.jsonl", "\n".join(lines).encode(), "application/jsonl")}
    order = {"endpoint": request["url"], "completion_window": "24h", "metadata": {"name": name}}
    last: RequestFailedError | None = None
    for failures in range(1, client.attempts + 1):
        if found := await find_batch(client, endpoint, name):
            return found
        form = {"data": {"purpose": "batch"}, "files": upload}
        order["input_file_id"] = await client.call(endpoint, "POST", "files", parse_id, **form)
        create = (endpoint, "POST", "batches", parse_batch, lambda: False)  # without retries
        try:
            return await client.call(*create, json=order)
        except RequestFailedError as error:
            last = error
            await asyncio.sleep(client.backoff(failures))
    raise RequestFailedError(f"no batch created in {client.attempts} attempts, the last: {last}")


async def find_batch(client: Client, endpoint: Endpoint, name: str) -> dict[str, Any] | None:
    """Our batch in the server's list, which comes in pages."""
    last, seen = "", set()
    while last not in seen:  # some servers repeat their only page
        seen.add(last)
        path = "batches?limit=100" + (f"&after={last}" if last else "")
        batches, more = await client.call(endpoint, "GET", path, parse_page)
        for batch in batches:
            if (batch.get("metadata") or {}).get("name") == name:
                return batch
        last = batches[-1]["id"] if more and batches else ""
    return None


def pending_batches(file: Path) -> list[dict]:
    """The batches whose results are not stored yet."""
    lines = list(read_log(file, {"name": str}))
    over = {line["name"] for line in lines if "over" in line}
    pending = [line for line in lines if line["name"] not in over]
    for line in pending:
        check_shape(line, BATCH, f"{file}, batch {line['name']}")
    return pending


def belongs_to(endpoint: Endpoint, batch: dict) -> bool:
    source = (endpoint.base_url, endpoint.model, endpoint.kind)
    return source == (batch["url"], batch["model"], batch["kind"])


def parse_id(text: str) -> str:
    return json.loads(text)["id"]


def parse_batch(text: str) -> dict[str, Any]:
    batch = json.loads(text)
    return batch | {"id": batch["id"], "status": batch["status"]}


def parse_page(text: str) -> tuple[list[dict], bool]:
    page = json.loads(text)
    return page["data"], page.get("has_more", False)


def parse_results(text: str) -> dict[str, Result]:
    """The lines of an output or error file, by request."""
    replies: dict[str, Result] = {}
    for line in filter(str.strip, text.split("\n")):
        result = json.loads(line)
        response = result.get("response") or {}
        if response.get("status_code") != 200:
            reply = RequestFailedError(f"{result.get('error') or response.get('body')}"[:300])
        else:
            try:
                reply = parse_reply(json.dumps(response["body"]))
            except RetryableError as error:
                reply = RequestFailedError(str(error)[:300], error.usage)
        replies[result["custom_id"]] = reply
    return replies
