"""Is this text fit to be asked, or shown? A moderation service says so, or a small list of rules.

    found = await filter.check(text)       # "" if nothing is wrong with it, else what is

Worth knowing:

  - `Service` is OpenAI's moderation endpoint, or any that speaks as it does: it gets the text and
    answers with `results`, each `flagged` or not. `Rules` are the regular expressions of
    data/filter_rules.txt.
  - It fails closed. A service that cannot be reached, is slow, or answers anything but the promised
    form is `Unavailable`, and what nobody has checked is not shown.
  - `passed` cuts a growing text where it may be shown, so that an answer can stream: a piece, with
    what came before it, is checked first and appears then. Pieces end between words, and for a
    service are long enough to be judged.

Shown by tests/test_moderation.py: test_every_character_that_is_shown_was_checked.
"""

import argparse
import asyncio
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from api import Client, Endpoint, GaveUp, Refused, Unusable
from console import listed, plain

RULES = Path(__file__).parent / "data/filter_rules.txt"
LAST_WORD = re.compile(r"[^\W\u2e80-\uffff]*\Z")  # Chinese or Japanese may be cut anywhere
LONGEST_WORD = 40
LONGEST_RULE_TEXT = 200  # what a rule of ours can span
HELP = (
    "If you are thinking of harming yourself, please talk to somebody now: findahelpline.com lists "
    "free and confidential help in most countries."
)


class Unavailable(Exception):
    """Nobody can tell; nothing may be shown."""

    def __init__(self):
        super().__init__(
            "The content filter cannot be reached, so nothing is answered or shown. Please try "
            "again later."
        )


def explained(found: str) -> str:
    """What a person is told whose text, or whose answer, was stopped."""
    said = f"The content filter stopped this ({found})."
    return f"{said} {HELP}" if "self-harm" in found else said


class Filter:
    """Lets everything pass: `--filter off`."""

    name = "off"
    piece = 1  # characters to be checked at a time, at the least
    context = 0  # characters before them that are looked at again

    async def __aenter__(self) -> "Filter":
        return self

    async def __aexit__(self, *exception) -> None:
        pass

    async def check(self, text: str) -> str:
        return ""

    async def passed(self, text: str, shown: int, whole: bool) -> tuple[int, str]:
        """Up to where a text may be shown of which `shown` characters are already; and what is
        wrong with the rest, if something is."""
        end = len(text)
        if not whole:
            unfinished = LAST_WORD.search(text, max(shown, end - LONGEST_WORD))[0]
            end -= len(unfinished) if len(unfinished) < LONGEST_WORD else 0
            if end - shown < self.piece:
                return shown, ""
        if end == shown:
            return shown, ""
        found = await self.check(text[max(0, shown - self.context) : end])
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
                    raise ValueError("a category, a colon and a regular expression were expected")
                self.rules.append((category.strip(), re.compile(pattern.strip())))
            except (ValueError, re.error) as mistake:
                raise ValueError(f"{path}, line {number}: {mistake}") from None
        if not self.rules:
            raise ValueError(f"{path}: no rules in it")

    async def check(self, text: str) -> str:
        text = plainer(text)
        return next((category for category, rule in self.rules if rule.search(text)), "")


def plainer(text: str) -> str:
    """Lower case, compatible forms made one, hidden characters and accents dropped, one space."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn"))
    return " ".join(text.casefold().split())


class Service(Filter):
    """`async with` it: the connections to the service stay open."""

    piece, context = 160, 1000

    def __init__(self, endpoint: Endpoint, timeout: float = 8.0):
        self.endpoint, self.timeout = endpoint, timeout
        self.name = endpoint.url

    async def __aenter__(self) -> "Service":
        self.client = Client(timeout=self.timeout / 2, attempts=2, first_wait=0.2)
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *exception) -> None:
        await self.client.__aexit__(*exception)

    async def check(self, text: str) -> str:
        asked = {"model": self.endpoint.model, "input": plain(text)}
        try:
            async with asyncio.timeout(self.timeout):
                call = self.client.call
                return await call(self.endpoint, "POST", "moderations", flagged, json=asked)
        except (GaveUp, Refused, ValueError, TimeoutError):
            raise Unavailable from None


def flagged(said: str) -> str:
    """What is wrong with the text, by the service's answer; Unusable if it is no clear answer."""
    try:
        (result,) = json.loads(said)["results"]
        verdict, categories = result["flagged"], result.get("categories") or {}
        if not isinstance(verdict, bool) or not isinstance(categories, dict):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unusable("no verdict in the answer") from None
    return names_of(categories) if verdict else ""


def names_of(categories: dict[str, Any]) -> str:
    found = [str(name)[:40] for name, so in categories.items() if so is True]
    return plain(listed(sorted(found), 3)) or "flagged"


# ---------------------------------------------------------------- command line


def add_filter_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("filter").add_argument
    told = "(default: service if its key is set, else rules)"
    add("--filter", choices=("service", "rules", "off"), help=told)
    add("--rules", type=Path, default=RULES, help="the list (default: data/filter_rules.txt)")
    url = "https://api.openai.com/v1"
    add("--moderation-url", default=url, metavar="URL", help="service, up to /v1 (default: OpenAI)")
    model = "omni-moderation-latest"
    add("--moderation-model", default=model, metavar="NAME", help=f"of the service ({model})")
    key = "OPENAI_API_KEY"
    add("--moderation-key", default=key, metavar="NAME", help=f"variable with its key ({key})")


def chosen_filter(args: argparse.Namespace) -> Filter:
    endpoint = Endpoint(args.moderation_model, args.moderation_url, key=args.moderation_key)
    kind = args.filter or ("service" if endpoint.secret() else "rules")
    if kind == "off":
        return Filter()
    return Service(endpoint) if kind == "service" else Rules(args.rules)
