"""Published conversations → turns {role, content}: perhaps a system turn, then user, assistant, …

Published files contain malformed conversations. Turns before the first user turn or after the last
answer are dropped, and neighbouring turns of one role are joined. A conversation that cannot be
repaired like this raises OddConversation; formats.py skips it and counts the reasons.

OpenAssistant (arXiv:2304.07327) publishes trees: to every message there are several replies, and
people have ranked them. `parse_tree` gives the best conversation of a tree, or all of them.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from alpaca.common.errors import UserError

ROLES = {"human": "user", "user": "user", "prompter": "user"}
ROLES |= {"system": "system", "developer": "system"}  # OpenAI's older and newer name
ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant", "bard", "bing", "model"), "assistant")
MESSAGE = {"message_id", "parent_id", "role", "text"}  # fields of OpenAssistant's flat files
LONGEST = 1000  # messages in one conversation of a tree


class OddConversation(UserError):
    """A conversation that cannot be used; equal messages are counted as one reason."""


def parse_turns(raw: Any) -> list[dict]:
    """The turns of a conversation in ShareGPT's form (from, value), OpenAI's (role, content) or
    OpenAssistant's (role, text)."""
    if not isinstance(raw, list):
        raise OddConversation("the turns are not a list")
    turns: list[dict] = []
    for turn in raw:
        role, text = role_and_text(turn)
        if role == "system" and turns:
            raise OddConversation("a system turn is not the first")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        elif role != "assistant" or any(earlier["role"] == "user" for earlier in turns):
            turns.append({"role": role, "content": text})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise OddConversation("no question has an answer")
    return turns


def role_and_text(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise OddConversation("a turn is not an object")
    name = turn.get("from", turn.get("role"))
    text = next((turn[key] for key in ("value", "content", "text") if key in turn), None)
    if isinstance(text, list):  # OpenAI's parts
        with suppress(TypeError, KeyError):  # a part without a text
            text = "\n".join(part["text"] for part in text)
    if not isinstance(name, str) or name not in ROLES:
        raise OddConversation(f"a turn is from {str(name)[:20]!r}")
    if not isinstance(text, str):
        raise OddConversation("a turn has no text")
    if not text.strip() and ROLES[name] != "system":
        raise OddConversation("a turn is empty")
    if turn.get("weight") == 0:  # in OpenAI's files: no loss on this answer
        raise OddConversation("an answer has weight 0")
    return ROLES[name], text


# ---------------------------------------------------------------- OpenAssistant's trees


def join_messages(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Flat messages joined into trees, {"prompt": root}, each at the place of its root."""
    messages: dict[Any, tuple[str, dict]] = {}
    for place, raw in records:
        if isinstance(raw, dict) and raw.keys() >= MESSAGE:
            messages[str(raw["message_id"])] = place, raw | {"replies": []}
        else:
            yield place, raw
    for _, message in messages.values():
        if parent := messages.get(str(message["parent_id"])):
            parent[1]["replies"].append(message)
    for place, message in messages.values():
        if str(message["parent_id"]) not in messages:
            yield place, {"prompt": message}


def tree_paths(root: dict, best: bool) -> list[list[dict]]:
    """The conversations of a tree: the one of the best replies, or all."""
    paths, stack = [], [(root, [])]
    while stack:
        message, path = stack.pop()
        path = [*path, message]
        replies = message.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise OddConversation("replies are not a list of objects")
        replies = [reply for reply in replies if not reply.get("deleted")]
        replies = sorted(replies, key=rank_of)[: 1 if best else None]
        if not replies or len(path) == LONGEST:
            paths.append(path)
        else:
            stack += [(reply, path) for reply in reversed(replies)]
    return paths


def parse_tree(root: dict, best: bool) -> list[list[dict]]:
    """The usable conversations of a tree, each once; if there is none, the last reason why."""
    if root.get("parent_id") is not None:
        raise OddConversation("a message's parent is not in the file")
    found, reason = [], OddConversation("no question has an answer")
    for path in tree_paths(root, best):
        try:
            if (turns := parse_turns(path)) not in found:
                found.append(turns)
        except OddConversation as error:
            reason = error
    if not found:
        raise reason
    return found


def rank_of(reply: dict) -> float:
    """0 is the best; a reply without a rank comes last."""
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")
