"""A client of OpenAI-compatible servers, for whoever asks many questions: teacher, judge, filter.

    async with Client() as client:
        reply = await client.ask(endpoint, "a prompt", max_tokens=100)     # or a list of messages

Worth knowing:

  - What may pass by itself (429, 5xx, a time-out, a lost or half-sent answer, an answer that is not
    what the API promises) is asked again, a bounded number of times, after a wait that doubles and
    is partly random; `Retry-After` holds back all requests to that server. Then it is `GaveUp`.
  - What asking again cannot mend (a wrong key, an unknown model, no money left) is `Refused`.
  - The key comes from an environment variable and goes into one header: `without` takes it out of
    whatever the server says, before that is shown or stored.

Shown by tests/test_selfinstruct.py: test_every_mix_of_faults_ends_complete_and_in_bounds.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from alpaca.common.errors import UserError, replace_surrogates

T = TypeVar("T")
LONGEST_WAIT = 60.0  # s between two attempts, where the server does not ask for more
LONGEST_RETRY_AFTER = 600.0
MOST_TOKENS = 10_000_000  # that a server can mean by one answer's usage
LARGEST_ANSWER = 8 << 20  # bytes; a hundred times what 3,072 tokens take
SHORTEST_KEY = 16
PASSES_BY_ITSELF = {408, 409, 425, 429}  # and 500 to 599
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
API_PATHS = {"completions": "completions", "chat": "chat/completions"}  # and their paths


class RefusedError(ValueError):
    """The server will not answer, however often it is asked."""


class Usage(NamedTuple):
    """Tokens as the server counts them, of failed attempts too. `unmetered`: answers without."""

    prompt: int = 0
    completion: int = 0
    unmetered: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))


NONE = Usage()
UNMETERED = Usage(unmetered=1)  # it was on its way, so it is paid for


class RequestError(Exception):
    def __init__(self, why: str, usage: Usage = NONE, unreachable: bool = False):
        super().__init__(why)
        self.usage, self.unreachable = usage, unreachable


class RequestFailedError(RequestError):
    """This request got no usable answer in all its attempts; another one may."""


class RetryableError(RequestError):
    """One attempt failed, and another may not."""


class Reply(NamedTuple):
    text: str
    cut: bool  # it ran into max_tokens or a filter: the end is missing
    usage: Usage
    request_id: str
    body: str  # all that the server sent
    attempts: int = 1


@dataclass(frozen=True)
class Endpoint:
    """A model on a server, and what it costs in dollars a million tokens."""

    model: str
    url: str
    kind: str = "chat"
    key: str = "OPENAI_API_KEY"  # the name of the environment variable
    weight: float = 1.0
    price_in: float = 0.0
    price_out: float = 0.0
    licence: str = ""

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            named = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
            httpx.URL(self.url)
        except (ValueError, httpx.InvalidURL):  # a port that is no number, odd characters
            named = None
        if not named or re.search(r"\s", self.url):
            raise UserError(
                f"{hide_credentials(self.url)!r} is no server: http(s)://HOST[:PORT]/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"{parts.scheme}://{parts.hostname}…: keep keys out of the URL; name the "
                "environment variable that holds it (--key-env)"
            )
        if self.kind not in API_PATHS:
            raise UserError(f"{self.kind!r} is no kind of endpoint: one of {', '.join(API_PATHS)}")
        for name in ("weight", "price_in", "price_out"):
            if not 0 <= getattr(self, name) < 1e9 or (name == "weight" and not self.weight):
                raise UserError(f"{self.model}: {name} {getattr(self, name)} makes no sense")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key):  # a key itself? then it is not repeated
            raise UserError("the key is named by an environment variable, OPENAI_API_KEY say")
        object.__setattr__(
            self, "url", self.url.rstrip("/").removesuffix("/" + API_PATHS[self.kind])
        )

    @classmethod
    def parsed(cls, text: str, default: Mapping[str, Any]) -> "Endpoint":
        """`MODEL`, or `model=…,url=…,key=VARIABLE,weight=2,…` over the defaults."""
        text = text if re.match(r"[\w-]+=", text) else f"model={text}"
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise UserError("--teacher: every part between commas is NAME=VALUE")
        given = {name.strip().replace("-", "_"): value for name, _, value in pairs}
        if len(given) < len(pairs):
            raise UserError("--teacher: every NAME once")
        types = {field.name: field.type for field in fields(cls)}
        if unknown := given.keys() - types.keys():
            raise UserError(f"--teacher: {', '.join(unknown)}? One of {', '.join(types)}")
        if not given.get("model"):
            raise UserError("--teacher: it names no model")
        try:
            given = {k: float(v) if types[k] is float else v for k, v in given.items()}
        except ValueError as mistake:
            raise UserError(f"--teacher {given['model']}: {mistake}") from None
        return cls(**{**default, **given})

    def secret(self) -> str:
        """The key itself; "" where the variable is not set."""
        key = os.environ.get(self.key, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"${self.key} holds what no key has: a space or a special character")
        return key

    def headers(self) -> dict[str, str]:
        key = self.secret()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, prompt: str | list[dict], options: Mapping[str, Any]) -> dict[str, Any]:
        """The request; an option that is None is left out."""
        if self.kind == "completions":
            asked: dict[str, Any] = {"prompt": prompt}
        elif isinstance(prompt, str):
            asked = {"messages": [{"role": "user", "content": prompt}]}
        else:
            asked = {"messages": prompt}
        given = {name: value for name, value in options.items() if value is not None}
        return {"model": self.model, **asked, **given}

    def cost(self, usage: Usage) -> float:
        return (usage.prompt * self.price_in + usage.completion * self.price_out) / 1e6

    def max_cost(self, body: Mapping[str, Any]) -> float:
        """An upper bound on what a request can cost: a token is at least one byte."""
        limit = max(body.get(name) or 0 for name in TOKEN_LIMITS)
        return self.cost(Usage(len(json.dumps(body, ensure_ascii=False).encode()), limit))


class Client:
    def __init__(self, timeout: float = 300, max_retries: int = 7, retry_wait: float = 1.0):
        """`timeout`: s for a whole answer. `retry_wait`: s before the first retry."""
        self.timeout, self.attempts, self.retry_wait = timeout, max_retries + 1, retry_wait
        self.not_before: dict[str, float] = {}  # server -> when it wants to be asked again
        self.answered: set[Endpoint] = set()
        self.retries = 0
        self.closing = False  # no attempt is begun any more

    async def __aenter__(self) -> "Client":
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        wait = httpx.Timeout(self.timeout, connect=min(20, self.timeout))
        self.http = httpx.AsyncClient(timeout=wait, limits=limits)
        return self

    async def __aexit__(self, *exception) -> None:
        await self.http.aclose()

    async def ask(
        self,
        endpoint: Endpoint,
        prompt: str | list[dict],
        again: Callable[[], bool] = lambda: True,
        **options: Any,
    ) -> Reply:
        """`again` is asked before every further attempt: is there money for one?"""
        body, path = endpoint.body(prompt, options), API_PATHS[endpoint.kind]
        return await self.call(endpoint, "POST", path, parse_reply, again, json=body)

    async def call(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        read: Callable[[str], T],
        again: Callable[[], bool] = lambda: True,
        **what: Any,
    ) -> T:
        """What `read` makes of the server's answer, asked for until it is a usable one."""
        wasted, attempt, last, nobody = NONE, 0, "", False
        for attempt in range(1, self.attempts + 1):
            await self._wait(endpoint, attempt)
            if self.closing or (attempt > 1 and not again()):
                break
            try:
                found = read(await self.send(endpoint, method, path, **what))
                self.answered.add(endpoint)
                if isinstance(found, Reply):
                    found = found._replace(usage=wasted + found.usage, attempts=attempt)
                return found
            except RetryableError as problem:
                wasted += problem.usage
                self.retries += 1
                last, nobody = str(problem), problem.unreachable and endpoint not in self.answered
                if nobody and attempt == 3:
                    break
        why = f"{endpoint.url}: no answer in {attempt} attempts, the last: {last}"
        raise RequestFailedError(why, wasted, unreachable=nobody)

    async def _wait(self, endpoint: Endpoint, attempt: int) -> None:
        own = time.monotonic() + (self.wait_before(attempt) if attempt > 1 else 0)
        spread = random.uniform(0, min(1, self.retry_wait))
        while not self.closing:
            until = max(own, self.not_before.get(endpoint.url, 0) + spread)
            if (left := until - time.monotonic()) <= 0:
                break
            await asyncio.sleep(min(0.5, left))

    def wait_before(self, attempt: int) -> float:
        longest = min(LONGEST_WAIT, self.retry_wait * 2 ** (attempt - 2))
        return longest * random.uniform(0.5, 1)

    async def send(self, endpoint: Endpoint, method: str, path: str, **what: Any) -> str:
        """The body of a 200, without the key. Unusable, GaveUp or Refused otherwise."""
        url, begun = f"{endpoint.url}/{path}", NONE
        try:
            async with (
                asyncio.timeout(self.timeout),
                self.http.stream(method, url, headers=endpoint.headers(), **what) as response,
            ):
                begun = UNMETERED if response.status_code == 200 else NONE
                said = bytearray()
                async for chunk in response.aiter_bytes():
                    said += chunk
                    if len(said) > LARGEST_ANSWER and "files/" not in path:
                        raise RetryableError(
                            f"an answer of more than {LARGEST_ANSWER >> 20} MB", begun
                        )
        except (TimeoutError, httpx.ReadTimeout):
            raise RetryableError(f"no whole answer in {self.timeout:g} s", UNMETERED) from None
        except httpx.RequestError as problem:
            unreachable = isinstance(problem, httpx.ConnectError | httpx.ConnectTimeout)
            what_kind = f"{type(problem).__name__} {problem}".strip()
            raise RetryableError(mask_key(endpoint, what_kind), begun, unreachable) from None
        text = mask_key(endpoint, said.decode("utf-8", "replace"))
        if response.status_code == 200:
            return text
        self._raise(endpoint, path, response, text)

    def _raise(self, endpoint: Endpoint, path: str, response: httpx.Response, text: str) -> None:
        status, why = response.status_code, error_message(text)
        line = f"{endpoint.url}/{path} says {status}{': ' if why else ''}{why}"
        if status == 429 and "insufficient_quota" in text:
            raise RefusedError(line)
        if status in PASSES_BY_ITSELF or status >= 500:
            if (pause := retry_after(response.headers)) is not None:
                until = time.monotonic() + min(pause, LONGEST_RETRY_AFTER)
                self.not_before[endpoint.url] = max(until, self.not_before.get(endpoint.url, 0))
            raise RetryableError(f"{status} {why}".strip())
        if status in (401, 403) and not endpoint.secret():
            line += f" (${endpoint.key} is not set)"
        if status in (400, 413, 422) and endpoint in self.answered:
            raise RequestFailedError(line)  # it took other requests: it is something about this one
        if status in (301, 302, 307, 308):
            line += f" (moved to {mask_key(endpoint, response.headers.get('location', '?'))})"
        raise RefusedError(line)


def parse_reply(said: str) -> Reply:
    """A Reply from the body of a 200, or Unusable: what was spent on it counts all the same."""
    try:
        body = json.loads(said)
    except (ValueError, RecursionError):
        raise RetryableError("the answer is not JSON", UNMETERED) from None
    usage = usage_of(body)
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if text is None and "message" in choice:  # a refusal, or only thoughts
            text = choice["message"].get("refusal") or ""
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if not isinstance(text, str):
            raise TypeError
    except (LookupError, TypeError, AttributeError):
        told = f": {error_message(said)}" if isinstance(body, dict) and "error" in body else ""
        raise RetryableError(f"no choices[0] with a text in the answer{told}", usage) from None
    request_id = body.get("id")
    return Reply(
        replace_surrogates(text),
        choice.get("finish_reason") in ("length", "content_filter", "max_tokens"),
        usage,
        replace_surrogates(request_id)[:200] if isinstance(request_id, str) else "",
        said,
    )


def usage_of(body: Any) -> Usage:
    counted = body.get("usage") if isinstance(body, dict) else None
    counted = counted if isinstance(counted, dict) else {}
    numbers = [counted.get(name) for name in ("prompt_tokens", "completion_tokens")]
    numbers[1] = 0 if numbers[1] is None and "total_tokens" in counted else numbers[1]
    if all(type(number) is int and 0 <= number < MOST_TOKENS for number in numbers):
        return Usage(*numbers)
    return UNMETERED


def error_message(text: str) -> str:
    """What a server says about an error, in one line."""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = said if isinstance(said, str) else str(said["message"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = re.sub(r"<[^>]{0,200}>", " ", text[:2000])
    return replace_surrogates(" ".join(text.split())[:300])


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now: the header holds them, or a date."""
    said = headers.get("retry-after", "").strip()
    try:
        seconds = float(said) if re.match(r"[\d.]", said) else None
        if seconds is None:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return max(0.0, seconds)


def mask_key(endpoint: Endpoint, text: str) -> str:
    """The text, the key taken out: servers like to repeat it. What is too short to be a secret
    ("EMPTY", "token") may stand in any text."""
    key = endpoint.secret()
    return key_pattern(key).sub("***", text) if len(key) >= SHORTEST_KEY else text


@lru_cache
def key_pattern(key: str) -> re.Pattern:
    """The key as it is, and as JSON may write it: / as \\/, = as \\u003d."""
    each = (rf"(?:\\?{re.escape(c)}|\\u(?i:{ord(c):04x}))" for c in key)
    return re.compile("".join(each))


def hide_credentials(url: str) -> str:
    """A URL as it may be shown: what stands before an @ may be a password."""
    return re.sub(r"[^/@]*@", "***@", url).split("?")[0]
