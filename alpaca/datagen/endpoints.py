"""A model on an OpenAI-compatible server: where it is, what it costs, and the flags that name it.

    add_server_arguments(parser)                   # --base-url, --price-in, --budget, …
    endpoint = endpoint_from_args(args, args.judge)  # one model, set up by the flags
    endpoints = read_teachers(file, args)          # several models, from a JSON file

The JSON file is a list. Each entry names a model; what it leaves out comes from the flags:

    [{"model": "gpt-4.1-mini", "weight": 3, "price_in": 0.4, "price_out": 1.6},
     {"model": "my-model", "base_url": "http://localhost:8000/v1", "kind": "completions"}]

The API key is read from an environment variable, which must be set for OpenAI's server, or if its
name is given. `mask_key` removes the key from what a server sends back, before that is shown or
stored.
"""

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from alpaca.common.cli import not_negative, positive
from alpaca.common.errors import UserError, errors_at
from alpaca.common.json_files import json_records

OPENAI_URL, OPENAI_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
API_PATHS = {"completions": "completions", "chat": "chat/completions"}  # by kind
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
RESERVED = {"model", "messages", "prompt", "stream", "n", "best_of"}  # not for --request
MIN_KEY_LENGTH = 16  # a shorter "key" (EMPTY, token) is no secret and may stand in any text


class Usage(NamedTuple):
    """Tokens as the server counts them, failed attempts included."""

    prompt: int = 0
    completion: int = 0
    unmetered: int = 0  # responses that came without a count

    def plus(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Endpoint:
    """A model on a server, with its prices in dollars per million tokens."""

    model: str
    base_url: str
    kind: str = "chat"
    key_env: str = OPENAI_KEY  # environment variable with the key
    weight: float = 1.0  # share of the requests, relative to the other teachers
    price_in: float = 0.0
    price_out: float = 0.0
    licence: str = ""

    def __post_init__(self):
        if not self.model:
            raise UserError("the model has no name")
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL:
            url = httpx.URL()
        secret = url.userinfo or url.query or url.fragment
        if secret or url.scheme not in ("http", "https") or not re.fullmatch(r"[^%]+", url.host):
            raise UserError("--base-url is http(s)://HOST[:PORT]/v1; --key-env names the key")
        if self.kind not in API_PATHS:
            raise UserError(f"{self.kind!r} is no kind of endpoint: one of {', '.join(API_PATHS)}")
        for name in ("weight", "price_in", "price_out"):
            if not 0 <= getattr(self, name) < 1e9 or (name == "weight" and not self.weight):
                raise UserError(f"{self.model}: {name} {getattr(self, name)} makes no sense")
        if self.key_env not in (OPENAI_KEY, *os.environ):  # perhaps it is a key: do not print it
            raise UserError(
                "--key-env takes the name of an environment variable, not a key: none has this name"
            )
        base_url = self.base_url.rstrip("/").removesuffix("/" + API_PATHS[self.kind])
        object.__setattr__(self, "base_url", base_url)

    def api_key(self) -> str:
        """The key, or "" if the variable is not set."""
        key = os.environ.get(self.key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"${self.key_env} holds a space or a special character: it is no key")
        return key

    def check_key(self) -> None:
        """Refuse a malformed key, and a missing one where it is needed."""
        host = "." + httpx.URL(self.base_url).host
        needed = self.key_env != OPENAI_KEY or host.endswith(".api.openai.com")
        if not self.api_key() and needed:
            raise UserError(
                f"${self.key_env} is not set: it is to hold the key for {self.base_url}"
            )

    def headers(self) -> dict[str, str]:
        key = self.api_key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, prompt: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The request's JSON. An option that is None is left out."""
        content: dict[str, Any] = {"prompt": prompt}
        if self.kind == "chat":
            content = {"messages": [{"role": "user", "content": prompt}]}
        options = {name: value for name, value in options.items() if value is not None}
        return {"model": self.model, **content, **options}

    def cost(self, usage: Usage) -> float:
        return (usage.prompt * self.price_in + usage.completion * self.price_out) / 1e6

    def max_cost(self, body: Mapping[str, Any]) -> float:
        """An upper bound on what a request can cost: a token is at least one byte."""
        limit = max(body.get(name) or 0 for name in TOKEN_LIMITS)
        return self.cost(Usage(len(json.dumps(body, ensure_ascii=False).encode()), limit))

    def mask_key(self, text: str) -> str:
        """Replace the key by ***, also where JSON spells / as \\/ or = as \\u003d: servers like to
        repeat it in their error messages."""
        key = self.api_key()
        if len(key) < MIN_KEY_LENGTH:
            return text
        pattern = "".join(rf"(?:\\?{re.escape(c)}|\\u(?i:{ord(c):04x}))" for c in key)
        return re.sub(pattern, "***", text)


# ---------------------------------------------------------------- flags


def json_object(text: str) -> dict[str, Any]:
    """For `type=` of a flag: an object that can be sent: without NaN or half surrogates."""
    value = json.loads(text)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    if not isinstance(value, dict):
        raise ValueError
    return value


json_object.__name__ = "JSON object"  # argparse: invalid JSON object value: …


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    count, number = positive(int), positive(float)
    add = parser.add_argument_group("server").add_argument
    add("--base-url", default=OPENAI_URL, metavar="URL", help="up to /v1 (default: OpenAI's)")
    add("--kind", choices=API_PATHS, default="chat", help="API to use (default: chat)")
    variable = f"environment variable with the key (default: {OPENAI_KEY})"
    add("--key-env", default=OPENAI_KEY, metavar="NAME", help=variable)
    more = "other fields of the request; null leaves one out: "
    more += '\'{"max_tokens": null, "max_completion_tokens": 3072}\''
    add("--request", type=json_object, default={}, metavar="JSON", help=more)
    add("--concurrency", type=count, default=32, help="requests in flight (default: 32)")
    add("--timeout", type=number, default=300, help="seconds for one response (default: 300)")
    retries = "of one request (default: 7, but 2 if no server is there)"
    add("--max-retries", type=not_negative, help=retries)
    wait = "seconds before the first retry, then doubling to 60 (default: 1)"
    add("--retry-wait", type=number, default=1, help=wait)
    add = parser.add_argument_group("cost").add_argument
    price = "dollars per million tokens of {} (default: 0)"
    add("--price-in", type=float, default=0.0, help=price.format("prompts"))
    add("--price-out", type=float, default=0.0, help=price.format("responses"))
    add("--budget", type=number, help="dollars, earlier runs included (default: no limit)")


def endpoint_from_args(args: argparse.Namespace, model: str, **settings: Any) -> Endpoint:
    """An endpoint; settings that are not given come from the flags. They may not change what the
    rest of the program relies on."""
    if refused := args.request.keys() & RESERVED:
        raise UserError(f"--request cannot set {', '.join(sorted(refused))}")
    limits = [args.request[name] for name in TOKEN_LIMITS if args.request.get(name) is not None]
    if not all(type(limit) is int and limit > 0 for limit in limits):
        raise UserError(f"--request: {' and '.join(TOKEN_LIMITS)} are integers above 0")
    if args.budget is not None and not limits and "max_tokens" in args.request:
        raise UserError(f"--budget needs a limit: one of {' and '.join(TOKEN_LIMITS)} in --request")
    names = ("base_url", "kind", "key_env", "price_in", "price_out")
    endpoint = Endpoint(model, **{name: getattr(args, name) for name in names} | settings)
    endpoint.check_key()  # before anything is written
    if args.budget is not None and not (endpoint.price_in and endpoint.price_out):
        raise UserError(f"--budget needs the prices of {model}: --price-in, --price-out")
    return endpoint


def read_teachers(path: Path, args: argparse.Namespace, **settings: Any) -> list[Endpoint]:
    """The endpoints of a JSON file; the docstring of this module shows one."""
    records = json_records(path)
    endpoints = [parse_endpoint(entry, place, args, **settings) for place, entry in records]
    if not endpoints:
        raise UserError(f"{path}: no teachers in it")
    return endpoints


def parse_endpoint(
    entry: Any, place: str, args: argparse.Namespace, other: Iterable[str] = (), **settings: Any
) -> Endpoint:
    """The endpoint of an entry, in which the caller reads the `other` fields."""
    names = [field.name for field in fields(Endpoint)]
    known = [*other, *names]
    if not isinstance(entry, dict) or entry.keys() - set(known) or "model" not in settings | entry:
        raise UserError(f"{place}: an object with {', '.join(known)} was expected")
    given = {name: entry[name] for name in names if name in entry}
    for name, value in given.items():
        number = name in ("weight", "price_in", "price_out")
        right = type(value) in ((int, float) if number else (str,))
        if not right or not str(value).isprintable():
            raise UserError(f"{place}: {name} is not a {'number' if number else 'plain text'}")
    with errors_at(place):
        return endpoint_from_args(args, **settings | given)
