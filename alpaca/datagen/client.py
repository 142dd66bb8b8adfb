"""A client of OpenAI-compatible servers, for many requests at once: to teachers, judges, filters.

    async with Client() as client:
        reply = await client.ask(endpoint, endpoint.body("a prompt", {"max_tokens": 100}))

Transient errors (429, 5xx, a timeout, a response that is lost, incomplete or malformed) are retried
with exponential backoff and jitter; `Retry-After` delays every request to that server. Two errors
reach the caller: `RequestFailedError` if all attempts of one request failed, `RefusedError` if the
server would refuse any other request as well.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import httpx

from alpaca.common.errors import UserError, replace_surrogates
from alpaca.datagen.endpoints import API_PATHS, Endpoint, Usage

MayRetry = Callable[[], bool] | None
MAX_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
MAX_RETRY_AFTER = 600.0
MAX_USAGE = 10_000_000  # tokens: a higher count is not believed
MAX_RESPONSE = 3 << 20  # bytes: many times what 3,072 tokens take; a line of a log holds it escaped
RETRYABLE = {408, 409, 425, 429}  # and 500 to 599
TRUNCATED = ("length", "content_filter", "max_tokens")  # finish reasons
FREE, UNMETERED = Usage(), Usage(unmetered=1)  # a 200 is billed, even if it is unusable


class RefusedError(UserError):
    """No request can succeed: a wrong key, an unknown model, an unreachable server."""


class RequestFailedError(Exception):
    """This request got no usable response; another request may get one."""

    def __init__(self, text: str, usage: Usage = FREE):
        super().__init__(text)
        self.usage = usage


class RetryableError(Exception):
    """One attempt failed; a retry may succeed."""

    def __init__(self, text: str, usage: Usage = FREE, unreachable: bool = False):
        super().__init__(text)
        self.usage, self.unreachable = usage, unreachable


class Reply(NamedTuple):
    text: str
    truncated: bool  # by max_tokens or a filter: the end is missing
    usage: Usage
    request_id: str
    body: str  # everything that the server sent
    attempts: int = 1


class Client:
    def __init__(
        self, timeout: float = 300, max_retries: int | None = None, retry_wait: float = 1.0
    ):
        """`timeout`: seconds for a whole response. `retry_wait`: seconds before the first retry."""
        self.timeout, self.retry_wait = timeout, retry_wait
        self.attempts, self.first_attempts = 8, 3  # the latter if no server is there
        if max_retries is not None:
            self.attempts = self.first_attempts = max_retries + 1
        self.not_before: dict[str, float] = {}  # server -> when it wants the next request
        self.answered: set[Endpoint] = set()
        self.retries = 0
        self.closing = False  # no further attempt is started
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        connect = httpx.Timeout(timeout, connect=min(20, timeout))
        try:
            self.http = httpx.AsyncClient(timeout=connect, limits=limits)
        except (ImportError, ValueError) as error:  # its messages hide the password in a URL
            raise UserError(f"the proxy of the environment cannot be used: {error}") from None

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception) -> None:
        await self.http.aclose()

    async def ask(self, endpoint: Endpoint, body: dict, may_retry: MayRetry = None) -> Reply:
        """A completion. `may_retry` is called before every retry: is there money for it?"""
        return await self.call(endpoint, API_PATHS[endpoint.kind], body, parse_reply, may_retry)

    async def call(
        self, endpoint: Endpoint, path: str, body: dict, parse: Callable, may_retry: MayRetry = None
    ) -> Any:
        """Send a request, with retries, and return the parsed response."""
        wasted, attempt, error, unreachable = FREE, 0, "none was made", False
        while attempt < self.attempts and not (unreachable and attempt == self.first_attempts):
            await self._wait(endpoint, attempt)
            if self.closing or (attempt and may_retry and not may_retry()):
                break
            attempt += 1
            try:
                result = await self._attempt(endpoint, path, body, parse)
            except RetryableError as failure:
                wasted = wasted.plus(failure.usage)
                self.retries += 1
                error, unreachable = failure, failure.unreachable and endpoint not in self.answered
            else:
                self.answered.add(endpoint)
                if isinstance(result, Reply):
                    result = result._replace(usage=wasted.plus(result.usage), attempts=attempt)
                return result
        text = f"{endpoint.base_url}: no answer in {attempt} attempts, the last: {error}"
        raise RefusedError(text) if unreachable else RequestFailedError(text, wasted)

    async def _wait(self, endpoint: Endpoint, failures: int) -> None:
        earliest = time.monotonic() + self.backoff(failures)
        spread = random.uniform(0, min(1, self.retry_wait))  # not all at the same moment
        while not self.closing:
            until = max(earliest, self.not_before.get(endpoint.base_url, 0) + spread)
            if (left := until - time.monotonic()) <= 0:
                break
            await asyncio.sleep(min(0.5, left))

    def backoff(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        longest = min(MAX_WAIT, self.retry_wait * 2 ** (failures - 1)) if failures else 0
        return longest * random.uniform(0.5, 1)

    async def _attempt(self, endpoint: Endpoint, path: str, body: dict, parse: Callable) -> Any:
        """The parsed body of a 200, or one of the three errors."""
        url, headers = f"{endpoint.base_url}/{path}", endpoint.headers()
        usage, content = FREE, bytearray()
        try:
            async with (
                asyncio.timeout(self.timeout),
                self.http.stream("POST", url, headers=headers, json=body) as response,
            ):
                usage = UNMETERED if response.status_code == 200 else FREE
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_RESPONSE:
                        raise RetryableError(f"more than {MAX_RESPONSE >> 20} MB", usage)
        except (TimeoutError, httpx.ReadTimeout):
            text = f"no complete response in {self.timeout:g} s"
            raise RetryableError(text, UNMETERED) from None
        except httpx.RequestError as error:
            unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            text = endpoint.mask_key(f"{type(error).__name__} {error}".strip())
            raise RetryableError(text, usage, unreachable) from None
        text = endpoint.mask_key(content.decode("utf-8", "replace"))
        if response.status_code != 200:
            raise self.status_error(endpoint, path, response, text)
        try:
            return parse(text)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            text = f"the response is not what the API promises ({type(error).__name__})"
            raise RetryableError(text, usage) from None

    def status_error(
        self, endpoint: Endpoint, path: str, response: httpx.Response, body: str
    ) -> Exception:
        status, message = response.status_code, error_message(body)
        line = f"{endpoint.base_url}/{path} says {status}: {message}".removesuffix(": ")
        quota = status == 429 and "insufficient_quota" in body  # not a rate limit: no money left
        if (status in RETRYABLE or status >= 500) and not quota:
            if pause := min(retry_after(response.headers), MAX_RETRY_AFTER):
                until = max(time.monotonic() + pause, self.not_before.get(endpoint.base_url, 0))
                self.not_before[endpoint.base_url] = until
            return RetryableError(f"{status} {message}".strip())
        if status in (400, 413, 422) and endpoint in self.answered:
            return RequestFailedError(line)  # it took other requests: the fault lies in this one
        if status in (401, 403) and not endpoint.api_key():
            line += f" (${endpoint.key_env} is not set)"
        if status in (301, 302, 307, 308):
            line += f" (moved to {endpoint.mask_key(response.headers.get('location', '?'))})"
        return RefusedError(line)


def parse_reply(text: str) -> Reply:
    """A Reply from the body of a 200, or a RetryableError with its usage if it is unusable."""
    body = json.loads(text)
    usage = parse_usage(body)
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"] if "message" in choice else choice["text"]
        if content is None and "message" in choice:  # a refusal, or only reasoning
            content = choice["message"].get("refusal") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if not isinstance(content, str):
            raise TypeError
    except (LookupError, TypeError, AttributeError):
        message = f": {error_message(text)}" if isinstance(body, dict) and "error" in body else ""
        raise RetryableError(f"no choices[0] with a text in it{message}", usage) from None
    request_id = body.get("id")
    return Reply(
        replace_surrogates(content),
        choice.get("finish_reason") in TRUNCATED,
        usage,
        replace_surrogates(request_id)[:200] if isinstance(request_id, str) else "",
        text,
    )


def parse_usage(body: Any) -> Usage:
    try:
        usage = body["usage"]
        missing = 0 if "total_tokens" in usage else None
        counts = usage["prompt_tokens"], usage.get("completion_tokens", missing)
    except (LookupError, TypeError, AttributeError):
        return UNMETERED
    plausible = all(type(count) is int and 0 <= count < MAX_USAGE for count in counts)
    return Usage(*counts) if plausible else UNMETERED


def error_message(body: str) -> str:
    """What a server says about an error, in one line."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        body = error if isinstance(error, str) else str(error["message"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        body = re.sub(r"<[^>]{0,200}>", " ", body[:2000])
    return replace_surrogates(" ".join(body.split())[:300])


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds from now; 0 without the header, or with a date, which such servers do not send."""
    found = re.fullmatch(r"\d+(\.\d+)?", headers.get("retry-after", "").strip())
    return float(found[0]) if found else 0.0
