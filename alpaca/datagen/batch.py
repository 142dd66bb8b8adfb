"""The Batch API of OpenAI: many requests in one file, answered within a day at half the price.

    async for replies in fetch(client, endpoint, ["7", "8"], body_of, log):
        store(replies)                                       # {"7": a Reply or GaveUp, ...}

A batch that was paid for is never lost nor bought twice. Before it is made, `log` (a JSONL file)
gets a line with its name, which the server keeps too: after a kill its list is searched for that
name. The batch counts as read only when the caller, having stored the replies, asks for more.

Shown by tests/test_selfinstruct.py: test_a_batch_outlives_the_run_that_sent_it.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from alpaca.common.files import append_jsonl, read_log
from alpaca.common.progress import duration
from alpaca.datagen.client import (
    API_PATHS,
    Client,
    Endpoint,
    RefusedError,
    Reply,
    RequestFailedError,
    RetryableError,
    parse_reply,
)

PRICE = 0.5  # of what single requests cost
MAX_REQUESTS = 20_000  # requests in a batch; the server's own limits are 50,000 and 200 MB
OVER = ("completed", "expired", "cancelled", "failed")


async def fetch(
    client: Client,
    endpoint: Endpoint,
    ids: list[str],
    body_of: Callable[[str], dict],
    log: Path,
    every: float = 30,
    say: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[dict[str, Reply | RequestFailedError]]:
    """Replies, a batch at a time; first of batches that an interrupted run has left under way."""
    under_way = [batch for batch in begun(log) if of(endpoint, batch)]
    for start in range(0, len(ids), MAX_REQUESTS):
        batch = {"name": "alpaca-" + secrets.token_hex(8), "model": endpoint.model}
        batch |= {
            "url": endpoint.url,
            "kind": endpoint.kind,
            "ids": ids[start : start + MAX_REQUESTS],
        }
        append_jsonl(log, batch)
        under_way.append(batch)
    made = [await find_or_make(client, endpoint, batch, body_of) for batch in under_way]
    for batch, there in zip(under_way, made, strict=True):
        start = time.monotonic()
        while there["status"] not in OVER:
            counts = there.get("request_counts")
            done = counts.get("completed", 0) if isinstance(counts, dict) else "?"
            waited = duration(time.monotonic() - start)
            say(f"batch {there['id']}: {there['status']}, {done} of {len(batch['ids'])}, {waited}")
            await asyncio.sleep(every)
            try:
                there = await client.call(endpoint, "GET", f"batches/{there['id']}", described)
            except RequestFailedError as problem:  # it is worked on all the same
                say(str(problem))
        replies = await results(client, endpoint, there)
        if replies:
            yield {id: replies[id] for id in batch["ids"] if id in replies}
        append_jsonl(log, {"name": batch["name"], "over": there["status"]})
        if not replies:
            raise RefusedError(f"batch {there['id']} is {there['status']}: {trouble(there)}")


def begun(log: Path) -> list[dict]:
    """The batches that are not read yet."""
    lines = list(read_log(log))
    over = {line["name"] for line in lines if "over" in line}
    return [line for line in lines if line["name"] not in over]


def of(endpoint: Endpoint, batch: dict) -> bool:
    names = ("url", "model", "kind")
    return all(batch[name] == getattr(endpoint, name) for name in names)


async def find_or_make(
    client: Client, endpoint: Endpoint, batch: dict, body_of: Callable[[str], dict]
) -> dict[str, Any]:
    """The server's description of a batch of ours. Making one is not repeated blindly: an answer
    that was lost leaves a batch behind."""
    request = {"method": "POST", "url": f"/v1/{API_PATHS[endpoint.kind]}"}
    for attempt in range(client.attempts):
        if there := await find(client, endpoint, batch["name"]):
            return there
        lines = (request | {"custom_id": id, "body": body_of(id)} for id in batch["ids"])
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        files = {"file": (batch["name"] + ".jsonl", content, "application/jsonl")}
        purpose = {"purpose": "batch"}
        file = await client.call(endpoint, "POST", "files", named, data=purpose, files=files)
        order = {"input_file_id": file["id"], "endpoint": request["url"]}
        order |= {"completion_window": "24h", "metadata": {"name": batch["name"]}}
        try:
            return described(await client.send(endpoint, "POST", "batches", json=order))
        except RetryableError as problem:
            why = str(problem)
            await asyncio.sleep(client.wait_before(attempt + 2))
    raise RequestFailedError(
        f"{endpoint.url}: no batch made in {client.attempts} attempts, last: {why}"
    )


async def find(client: Client, endpoint: Endpoint, name: str) -> dict[str, Any] | None:
    after, seen = "", set()
    while after not in seen:  # a server may turn in a circle
        seen.add(after)
        page = await client.call(endpoint, "GET", f"batches?limit=100{after}", page_of)
        batches = [one for one in page["data"] if has(one, id=str, status=str)]
        for there in batches:
            if has(there, metadata=dict) and there["metadata"].get("name") == name:
                return there
        if page.get("has_more") and batches:
            after = f"&after={batches[-1]['id']}"
    return None


async def results(
    client: Client, endpoint: Endpoint, there: dict
) -> dict[str, Reply | RequestFailedError]:
    """What the output and error files of a batch say of each request."""
    replies: dict[str, Reply | RequestFailedError] = {}
    for field in ("output_file_id", "error_file_id"):
        if there.get(field):
            path = f"files/{there[field]}/content"
            for line in await client.call(endpoint, "GET", path, lines_of):
                replies[str(line.get("custom_id"))] = reply_of(line)
    return replies


def reply_of(line: dict) -> Reply | RequestFailedError:
    response = line["response"] if has(line, response=dict) else {}
    if response.get("status_code") != 200:
        return RequestFailedError(
            f"the batch says {line.get('error') or response.get('body')}"[:300]
        )
    try:
        return parse_reply(json.dumps(response.get("body")))
    except RetryableError as problem:
        return RequestFailedError(str(problem)[:300], problem.usage)


def trouble(there: dict) -> str:
    known = has(there, errors=dict) and has(there["errors"], data=list)
    errors = there["errors"]["data"] if known else []
    told = (str(e.get("message", e)) if isinstance(e, dict) else str(e) for e in errors)
    return "; ".join(told)[:300] or "it has no results"


def has(found: Any, **kinds: type) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(n), k) for n, k in kinds.items())


def parsed(text: str, **kinds: type) -> dict[str, Any]:
    """The JSON object of an answer, with these fields at least."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise RetryableError("the answer is not JSON") from None
    if not has(found, **kinds):
        raise RetryableError(f"the answer is no JSON object with {' and '.join(kinds) or 'fields'}")
    return found


named, described = partial(parsed, id=str), partial(parsed, id=str, status=str)
page_of = partial(parsed, data=list)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [parsed(line) for line in text.split("\n") if line.strip()]
