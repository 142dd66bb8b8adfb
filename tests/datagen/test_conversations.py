"""Published conversations: what is repaired, what is skipped, OpenAssistant's trees."""

import json
from pathlib import Path

import pytest

from alpaca.common.errors import UserError
from alpaca.datagen.conversations import parse_turns
from alpaca.datagen.formats import Reading, load_records


def turn(role: str, text: str) -> dict:
    return {"role": {"U": "user", "A": "assistant", "S": "system"}[role], "content": text}


def turns(spec: str) -> list[dict]:
    """ "U:a A:b" as messages."""
    return [turn(*word.split(":")) for word in spec.split()]


PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}]}
REPAIRED = {
    "begins with the assistant": (turns("A:x U:a A:b"), "U:a A:b"),
    "and has a system turn": (turns("S:s A:x U:a A:b"), "S:s U:a A:b"),
    "ends with the user": (turns("U:a A:b U:c"), "U:a A:b"),
    "two users in a row": (turns("U:a U:b A:c"), "U:a\n\nb A:c"),
    "two answers in a row": (turns("U:a A:b A:c U:d"), "U:a A:b\n\nc"),
    "from bard": ([*turns("U:a"), {"from": "bard", "value": "b"}], "U:a A:b"),
    "in parts": ([PARTS, *turns("A:b")], "U:a A:b"),
    "an empty system turn": (turns("S: U:a A:b"), "S: U:a A:b"),
    "from the developer": (
        [{"role": "developer", "content": "s"}, *turns("U:a A:b")],
        "S:s U:a A:b",
    ),
}


@pytest.mark.parametrize(("raw", "expected"), REPAIRED.values(), ids=REPAIRED)
def test_malformed_turns_are_repaired(raw, expected):
    assert parse_turns(raw) == [turn(*word.split(":")) for word in expected.split(" ")]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_form_of_messages_gives_the_same(tmp_path):
    talk = turns("S:Short U:Hi A:Hello U:Bye A:Ciao")
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    share = [{"from": names[one["role"]], "value": one["content"]} for one in talk]
    forms = {"messages": talk}, {"conversations": share}
    file = write(tmp_path / "a.jsonl", *forms, {"prompt": talk[:-1], "completion": talk[-1:]})
    assert load_records(file) == [{"messages": talk}] * 3
    write(file, {"system": "Short", "conversations": share[1:]})
    assert load_records(file) == [{"messages": talk}]


def test_odd_conversations_are_skipped_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be cut in the message
    good = [{"messages": turns("U:a A:b")}] * 40
    tool = {"messages": [*turns("U:a"), {"role": "tool", "content": "x"}]}
    file = write(Path("a.jsonl"), *good, tool, {"messages": []}, tool)
    assert load_records(file) == good
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 of 43 records skipped: 2 because a turn is from 'tool'" in line
    assert f"(first {file}, line 41), 1 because no question has an answer" in line
    write(file, *good[:17], tool, tool)
    with pytest.raises(UserError, match="line 18: a turn is from 'tool'; 2 of 19 records"):
        load_records(file)


# ---------------------------------------------------------------- OpenAssistant


def message(id: str, *replies, rank=None, lang="en", **more) -> dict:
    fields = {"message_id": id, "parent_id": None, "text": f"text {id}", "lang": lang, "rank": rank}
    return {**fields, "replies": list(replies), **more}


def with_roles(root: dict, role: str = "prompter") -> dict:
    other = "assistant" if role == "prompter" else "prompter"
    replies = [with_roles(reply, other) for reply in root["replies"]]
    return root | {"role": role, "replies": replies}


THIRD = message("6", message("7", rank=0), message("8", rank=1), rank=0)
TREE = with_roles(
    message(
        "1",
        message("2", message("3", message("4")), rank=1),
        message("5", THIRD, message("9", rank=1), rank=0),
        message("10", rank=0, deleted=True),
    )
)


def flat(tree: dict, parent=None) -> list[dict]:
    """The tree as OpenAssistant's flat files have it: a message a line, which names its parent."""
    here = {**tree, "parent_id": parent}
    replies = here.pop("replies")
    return [here, *(line for reply in replies for line in flat(reply, tree["message_id"]))]


def ids(records: list[dict]) -> list[str]:
    return [" ".join(t["content"][5:] for t in record["messages"]) for record in records]


@pytest.mark.parametrize("form", ["tree", "flat", "flat, shuffled"])
def test_openassistant_gives_the_best_path_or_all(tmp_path, form):
    lines = [{"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE}]
    if form != "tree":
        lines = flat(TREE)[:: -1 if "shuffled" in form else 1]
    file = write(tmp_path / "oasst.jsonl", *lines)
    (record,) = load_records(file)
    assert ids([record]) == ["1 5 6 7"]
    assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"] * 2
    every = load_records(file, Reading("all"))
    assert sorted(ids(every)) == ["1 2 3 4", "1 5", "1 5 6 7", "1 5 6 8"]


def test_openassistant_message_without_its_parent_is_no_plain_text(tmp_path):
    lost = flat(TREE)[1] | {"message_id": "lost", "parent_id": "elsewhere"}
    file = write(tmp_path / "oasst.jsonl", *flat(TREE), lost)
    with pytest.raises(UserError, match="line 11: a message's parent is not in the file; 1 of 2"):
        load_records(file)


def test_openassistant_trees_are_chosen_by_language(tmp_path):
    german = with_roles(message("a", message("b", lang="de"), lang="de"))
    file = write(tmp_path / "oasst.jsonl", {"prompt": TREE}, {"prompt": german})
    assert ids(load_records(file, Reading(languages=("de",)))) == ["a b"]
    assert len(load_records(file, Reading(languages=("de", "en")))) == 2
    with pytest.raises(UserError, match="no records"):
        load_records(file, Reading(languages=("fr",)))
