"""The content filter: a moderation service or a list of rules checks prompts and answers.

  reason = await filter.check(text)      # "" if nothing is wrong with the text

- `ServiceFilter` asks OpenAI's moderation endpoint, or another server with the same API.
  `RuleFilter` searches for the regular expressions of data/filter_rules.txt.
- The filter fails closed. A service that cannot be reached, is slow, or does not answer in the
  documented form raises `FilterUnavailable`, and no unchecked text is shown.
- `check_next` lets an answer stream. Each new part is checked before it is shown, together with
  the end of what came before it, prompt included. Parts end between words, and for a service they
  are long enough to be judged.
- How far back it looks is counted after normalization, so that 250 spaces, or characters that are
  invisible, push nothing out of sight. Only the filter drops them: the reader gets every character.
"""

import argparse
import asyncio
import json
import math
import re
import time
import unicodedata
from pathlib import Path

from alpaca import CHECKOUT
from alpaca.common.errors import UserError, join_names, notice, replace_surrogates
from alpaca.datagen.client import Client, RefusedError, RequestFailedError, RetryableError
from alpaca.datagen.endpoints import OPENAI_KEY, OPENAI_URL, Endpoint
from tokenizer import SPACE

RULES_FILE = CHECKOUT / "data/filter_rules.txt"
LAST_WORD = re.compile(r"[^\W\u2e80-\u9fff\uf900-\ufaff]*\Z")  # Chinese may be cut anywhere
MAX_WORD_LENGTH = 40
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
BLANK_CELL = "\u2800"  # stands for all of BLANKS, which show nothing and may be as wide as a space
BLANKS = "\u2800\u115f\u1160\u3164\uffa0"  # Braille's empty cell, Hangul's fillers
SPACES = re.compile(rf"[\s{BLANK_CELL}]{{2,}}")
INVISIBLE = re.compile(  # a joiner, Khmer's inherent vowels, variation selectors, a null note
    "[\u034f\u17b4\u17b5\u180b-\u180d\u180f\ufe00-\ufe0f\U0001d159\U000e0100-\U000e01ef]"
)
RETRY_WAIT = 0.2  # s
NOTICE_INTERVAL = 60  # s between two notices that the service cannot be reached
UNAVAILABLE = (
    "The content filter cannot be reached, so nothing is answered or shown. Please try again later."
)
CRISIS_HELP = (
    "If you are thinking of harming yourself, please talk to somebody now: findahelpline.com lists "
    "free and confidential help in most countries."
)


class FilterUnavailable(Exception):
    """The text could not be checked, so it must not be shown."""


def explain_refusal(reason: str) -> str:
    """What a person reads whose prompt, or whose answer, was stopped."""
    message = f"The content filter stopped this ({reason})."
    return f"{message} {CRISIS_HELP}" if "self-harm" in reason else message


class Filter:
    """Lets everything pass: `--filter off`."""

    name = "off"
    min_part = 0  # characters that are checked at a time, at least; 0: any, words are not awaited
    lookback = 0  # characters before them, after normalization, that are checked again

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception) -> None:
        pass

    async def check(self, text: str) -> str:
        return ""

    def normalize(self, text: str) -> str:
        return collapse_spaces(text)

    def tail(self, text: str) -> str:
        """The end of a text, normalized, that is checked again with what follows it."""
        text = self.normalize(text)
        return text[max(0, len(text) - self.lookback) :]

    async def check_next(
        self, text: str, shown: int, complete: bool, before: str = ""
    ) -> tuple[int, str]:
        """How many characters of `text` may be shown, of which `shown` already are, and what is
        wrong with the rest, if anything. `before` is what the text continues."""
        end = len(text)
        if self.min_part and not complete:
            last_word = LAST_WORD.search(text, max(shown, end - MAX_WORD_LENGTH))
            if last_word and len(last_word[0]) < MAX_WORD_LENGTH:
                end -= len(last_word[0])
            if end - shown < self.min_part:
                return shown, ""
        if end == shown:
            return shown, ""
        part = self.tail(before + text[:shown]) + self.normalize(text[shown:end])
        reason = await self.check(part)
        return (shown if reason else end), reason


class RuleFilter(Filter):
    name = "rules"
    min_part = 1
    lookback = 200  # what our rules span, with words of usual length

    def __init__(self, path: Path = RULES_FILE):
        self.rules: list[tuple[str, re.Pattern]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            category, _, pattern = (part.strip() for part in line.partition(":"))
            if not category or not pattern:
                raise UserError(f"{path}, line {number}: expected CATEGORY: REGULAR EXPRESSION")
            pattern = NOT_ASCII.sub(lambda letters: to_plain(letters[0]), pattern)  # as the texts
            try:
                self.rules.append((category, re.compile(pattern)))
            except re.error as error:
                raise UserError(f"{path}, line {number}: {error}") from None
        if not self.rules:
            raise UserError(f"{path}: no rules in it")

    def normalize(self, text: str) -> str:
        return to_plain(text)

    async def check(self, text: str) -> str:
        text = to_plain(text)
        readings = {text.replace(BLANK_CELL, ""), text.replace(BLANK_CELL, " ")}
        found = (c for c, rule in self.rules if any(rule.search(one) for one in readings))
        return next(found, "")


def replacement(char: str, dropped: tuple[str, ...]) -> str:
    """What the filter reads for a character: nothing for one that shows nothing."""
    category = unicodedata.category(char)
    if char == SPACE:
        return " "
    if char in BLANKS:
        return BLANK_CELL
    if char.isspace() and not "\x1c" <= char <= "\x1f":
        return char
    # category C: controls, formats, surrogates, private use and what has no character yet
    return "" if category[0] == "C" or category in dropped or INVISIBLE.match(char) else char


def collapse_spaces(text: str, dropped: tuple[str, ...] = ()) -> str:
    """One space for several, the tokenizer's space included, and nothing that is invisible."""
    if changes := {ord(c): new for c in set(text) if (new := replacement(c, dropped)) != c}:
        text = text.translate(changes)
    return SPACES.sub(lambda run: run[0].strip(BLANK_CELL)[:1] or BLANK_CELL, text)


def to_plain(text: str) -> str:
    """The same on one line, in lower case, in compatible characters without accents."""
    # one character at a time: to sort a run of accents takes time in the square of its length
    text = text.translate({ord(char): unicodedata.normalize("NFKD", char) for char in set(text)})
    text = collapse_spaces(text, ("Mn", "Me")).casefold()
    return re.sub(r"\s", " ", text)


class ServiceFilter(Filter):
    """Use it in `async with`, which closes the connections to the service in the end."""

    min_part, lookback = 160, 1000

    def __init__(self, endpoint: Endpoint, timeout: float = 8.0):
        self.endpoint, self.timeout = endpoint, timeout
        self.name, self.last_notice = endpoint.base_url, -math.inf
        self.client = Client(timeout=timeout / 2, max_retries=1, retry_wait=RETRY_WAIT)

    async def __aexit__(self, *exception) -> None:
        await self.client.__aexit__(*exception)

    async def check(self, text: str) -> str:
        body = {"model": self.endpoint.model, "input": replace_surrogates(text)}
        try:
            async with asyncio.timeout(self.timeout):
                return await self.client.call(self.endpoint, "moderations", body, parse_verdict)
        except (RequestFailedError, RefusedError, UserError, TimeoutError) as error:
            if time.monotonic() - self.last_notice > NOTICE_INTERVAL:
                self.last_notice = time.monotonic()
                notice(f"the filter's service does not work: {error or 'no verdict in time'}")
            raise FilterUnavailable from None


def parse_verdict(response: str) -> str:
    """The categories that the service found, or ""; a RetryableError if it is not clear."""
    try:
        (result,) = json.loads(response)["results"]
        flagged, categories = result["flagged"], result.get("categories") or {}
        if not isinstance(flagged, bool) or not isinstance(categories, dict):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise RetryableError("no verdict in the response") from None
    if not flagged:
        return ""
    names = sorted(str(name)[:40] for name, found in categories.items() if found is True)
    return replace_surrogates(join_names(names)) or "flagged"


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("filter").add_argument
    kinds = "service: ask --moderation-url; rules: search for --rules; off: no filter "
    kinds += "(default: service if its URL or its key is set, else rules)"
    model = "omni-moderation-latest"
    add("--filter", choices=("service", "rules", "off"), help=kinds)
    add("--rules", type=Path, default=RULES_FILE, help="(default: data/filter_rules.txt)")
    add("--moderation-url", metavar="URL", help=f"up to /v1 (default: {OPENAI_URL})")
    add("--moderation-model", default=model, metavar="NAME", help=f"(default: {model})")
    help = f"environment variable with the key (default: {OPENAI_KEY})"
    add("--moderation-key-env", default=OPENAI_KEY, metavar="NAME", help=help)


def make_filter(args: argparse.Namespace) -> Filter:
    url = args.moderation_url or OPENAI_URL
    try:
        endpoint = Endpoint(args.moderation_model, url, key_env=args.moderation_key_env)
    except UserError:
        message = "--moderation-url must be http(s)://HOST[:PORT]/v1"
        raise UserError(f"{message}, --moderation-key-env a variable") from None
    wanted = args.moderation_url or endpoint.key_env != OPENAI_KEY or endpoint.api_key()
    kind = args.filter or ("service" if wanted else "rules")
    if kind == "service":
        try:
            endpoint.check_key()
        except UserError as error:
            raise UserError(f"{error}; --filter rules needs none") from None
        return ServiceFilter(endpoint)
    return Filter() if kind == "off" else RuleFilter(args.rules)
