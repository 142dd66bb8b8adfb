"""Is this text fit to be asked, or shown? A moderation service says so, or a small list of rules.

    found = await filter.check(text)       # "" if nothing is wrong with it, else what is

Worth knowing:

  - `Service` is OpenAI's moderation endpoint, or any that speaks as it does: it gets the text and
    answers with `results`, each `flagged` or not. `Rules` are the regular expressions of
    data/filter_rules.txt.
  - It fails closed. A service that cannot be reached, is slow, or answers anything but the promised
    form is `Unavailable`, and what nobody has checked is not shown.
  - `passed` cuts a growing text where it may be shown, so that an answer can stream: a piece, with
    the end of what came before it, prompt included, is checked first and appears then. Pieces end
    between words, and for a service are long enough to be judged.
  - How far back it looks is counted after the text was made plain: 250 spaces, or characters that
    do not show, push nothing out of sight.

Shown by tests/test_moderation.py: test_every_character_that_is_shown_was_checked.
"""

import argparse
import asyncio
import json
import math
import re
import time
import unicodedata
from pathlib import Path
from typing import Any

from alpaca import CHECKOUT
from alpaca.common.errors import UserError, join_names, notice, replace_surrogates
from alpaca.datagen.client import Client, RefusedError, RequestFailedError, RetryableError
from alpaca.datagen.endpoints import Endpoint
from tokenizer import SPACE

RULES = CHECKOUT / "data/filter_rules.txt"
OPENAI = "https://api.openai.com/v1"
LAST_WORD = re.compile(r"[^\W\u2e80-\u9fff\uf900-\ufaff]*\Z")  # Chinese may be cut anywhere
LONGEST_WORD = 40
LONGEST_RULE_TEXT = 200  # what our rules span, in words of usual length
EVERY = 60  # s between two notices that the service cannot be asked
DOWN = (
    "The content filter cannot be reached, so nothing is answered or shown. Please try again later."
)
HELP = (
    "If you are thinking of harming yourself, please talk to somebody now: findahelpline.com lists "
    "free and confidential help in most countries."
)


class Unavailable(Exception):
    """Nobody can tell; nothing may be shown."""


def explained(found: str) -> str:
    """What a person is told whose text, or whose answer, was stopped."""
    said = f"The content filter stopped this ({found})."
    return f"{said} {HELP}" if "self-harm" in found else said


class Filter:
    """Lets everything pass: `--filter off`."""

    name = "off"
    piece = 1  # characters to be checked at a time, at the least
    context = 0  # characters before them that are looked at again, of a text made plain

    async def __aenter__(self) -> "Filter":
        return self

    async def __aexit__(self, *exception) -> None:
        pass

    async def check(self, text: str) -> str:
        return ""

    def read(self, text: str) -> str:
        """As it is checked."""
        return spaced(text)

    def tail(self, text: str) -> str:
        """The end of it that is looked at again."""
        text = self.read(text)
        return text[max(0, len(text) - self.context) :]

    async def passed(self, text: str, shown: int, whole: bool, before: str = "") -> tuple[int, str]:
        """Up to where a text may be shown that goes on from `before`, and of which `shown`
        characters are shown already; and what is wrong with the rest, if something is."""
        end = len(text)
        if not whole:
            unfinished = LAST_WORD.search(text, max(shown, end - LONGEST_WORD))[0]
            end -= len(unfinished) if len(unfinished) < LONGEST_WORD else 0
            if end - shown < self.piece:
                return shown, ""
        if end == shown:
            return shown, ""
        found = await self.check(self.tail(before + text[:shown]) + self.read(text[shown:end]))
        return (shown if found else end), found


class Rules(Filter):
    name = "rules"
    context = LONGEST_RULE_TEXT

    def __init__(self, path: Path = RULES):
        self.rules: list[tuple[str, re.Pattern]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            category, colon, pattern = line.partition(":")
            try:
                if not colon or not category.strip() or not pattern.strip():
                    raise UserError("a category, a colon and a regular expression were expected")
                self.rules.append((category.strip(), re.compile(pattern.strip())))
            except (ValueError, re.error) as mistake:
                raise UserError(f"{path}, line {number}: {mistake}") from None
        if not self.rules:
            raise UserError(f"{path}: no rules in it")

    def read(self, text: str) -> str:
        return plainer(text)

    async def check(self, text: str) -> str:
        text = plainer(text)
        return next((category for category, rule in self.rules if rule.search(text)), "")


def spaced(text: str, hidden: tuple[str, ...] = ("Cf",)) -> str:
    """One space for many, the tokenizer's among them; characters that do not show dropped."""
    if not text.isascii():
        drop = {ord(c): None for c in set(text) if unicodedata.category(c) in hidden}
        text = text.translate({**drop, ord(SPACE): " "})
    return re.sub(r"(\s)\s+", r"\1", text)


def plainer(text: str) -> str:
    """The same in one line and lower case, compatible forms made one, accents dropped."""
    text = spaced(unicodedata.normalize("NFKD", text), ("Cf", "Mn")).casefold()
    return re.sub(r"\s", " ", text)


class Service(Filter):
    """`async with` it: the connections to the service stay open."""

    piece, context = 160, 1000

    def __init__(self, endpoint: Endpoint, timeout: float = 8.0):
        self.endpoint, self.timeout = endpoint, timeout
        self.name, self.told = endpoint.base_url, -math.inf

    async def __aenter__(self) -> "Service":
        self.client = Client(timeout=self.timeout / 2, max_retries=1, retry_wait=0.2)
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *exception) -> None:
        await self.client.__aexit__(*exception)

    async def check(self, text: str) -> str:
        asked = {"model": self.endpoint.model, "input": replace_surrogates(text)}
        try:
            async with asyncio.timeout(self.timeout):
                call = self.client.call
                return await call(self.endpoint, "POST", "moderations", flagged, json=asked)
        except (RequestFailedError, RefusedError, ValueError, TimeoutError) as problem:
            if time.monotonic() - self.told > EVERY:  # the operator's to mend
                self.told = time.monotonic()
                notice(f"the filter cannot be asked: {problem or 'no verdict in time'}")
            raise Unavailable from None


def flagged(said: str) -> str:
    """What is wrong with the text, by the service's answer; RetryableError if unclear."""
    try:
        (result,) = json.loads(said)["results"]
        verdict, categories = result["flagged"], result.get("categories") or {}
        if not isinstance(verdict, bool) or not isinstance(categories, dict):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RetryableError("no verdict in the answer") from None
    return names_of(categories) if verdict else ""


def names_of(categories: dict[str, Any]) -> str:
    found = [str(name)[:40] for name, so in categories.items() if so is True]
    return replace_surrogates(join_names(sorted(found), 3)) or "flagged"


# ---------------------------------------------------------------- command line


def add_filter_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("filter").add_argument
    kinds = "service: ask --moderation-url; rules: those of --rules; off: let everything pass "
    kinds += "(default: service if its URL or key is set, else rules)"
    add("--filter", choices=("service", "rules", "off"), help=kinds)
    add("--rules", type=Path, default=RULES, help="the list (default: data/filter_rules.txt)")
    add("--moderation-url", metavar="URL", help=f"of the service, up to /v1 (default: {OPENAI})")
    model, key = "omni-moderation-latest", "OPENAI_API_KEY"
    add("--moderation-model", default=model, metavar="NAME", help=f"its model (default: {model})")
    add("--moderation-key", default=key, metavar="VARIABLE", help=f"with its key (default: {key})")


def chosen_filter(args: argparse.Namespace) -> Filter:
    url = args.moderation_url or OPENAI
    endpoint = Endpoint(args.moderation_model, url, key_env=args.moderation_key)
    asked_for = args.moderation_url or endpoint.api_key()
    kind = args.filter or ("service" if asked_for else "rules")
    if kind == "service" and "//api.openai.com" in url.lower() and not endpoint.api_key():
        raise UserError(f"OpenAI's filter takes a key: set {args.moderation_key}, or --filter")
    if kind == "off":
        return Filter()
    return Service(endpoint) if kind == "service" else Rules(args.rules)
