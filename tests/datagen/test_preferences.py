"""Published preference files: every form gives the same pairs, and what is dropped is counted."""

import json

import pytest

from alpaca.common.errors import UserError
from alpaca.datagen.preferences import load_preferences

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Red"}
BAD = GOOD | {"output": "Five"}
USER = {"role": "user", "content": "Name a colour."}
CHAT = {"messages": [USER, {"role": "assistant", "content": "Red"}]}
CHAT_BAD = {"messages": [USER, {"role": "assistant", "content": "Five"}]}
JUDGED = {"instruction": "Name a colour.", "output_1": "Five", "output_2": "Red"}
ASKED = {"prompt": "Name a colour.", "chosen": "Red", "rejected": "Five"}
ADD = {"instruction": "Add.", "input": "1 1"}
HH = "\n\nHuman: Name a colour.\n\nAssistant:"


def load(path, *records, **options):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return load_preferences([path], **options)


FORMS = {
    "AlpacaFarm": (JUDGED | {"input": "", "preference": 2}, GOOD, BAD),
    "AlpacaFarm, first is better": (
        {**GOOD, "output_1": "Red", "output_2": "Five", "preference": 1},
        GOOD,
        BAD,
    ),
    "texts": (ASKED | {"messages": [], "text": "unused", "score_chosen": 7}, GOOD, BAD),
    "instruction and input": (
        ADD | {"chosen": "2", "rejected": ""},
        ADD | {"output": "2"},
        ADD | {"output": ""},
    ),
    "whole conversations": (
        ASKED | {"chosen": CHAT["messages"], "rejected": CHAT_BAD["messages"]},
        CHAT,
        CHAT_BAD,
    ),
    "whole conversations alone": (
        {"chosen": CHAT["messages"], "rejected": CHAT_BAD["messages"]},
        CHAT,
        CHAT_BAD,
    ),
    "last answers": (
        {"prompt": [USER], "chosen": CHAT["messages"][1:], "rejected": CHAT_BAD["messages"][1:]},
        CHAT,
        CHAT_BAD,
    ),
    "last answers as texts": (ASKED | {"prompt": [USER]}, CHAT, CHAT_BAD),
    "a text and last answers": (
        ASKED | {"chosen": CHAT["messages"][1:], "rejected": CHAT_BAD["messages"][1:]},
        CHAT,
        CHAT_BAD,
    ),
    "HH-RLHF": ({"chosen": f"{HH} Red", "rejected": f"{HH} Five"}, CHAT, CHAT_BAD),
    "HH-RLHF with its prompt": (
        {"prompt": HH, "chosen": " Red", "rejected": " Five"},
        CHAT,
        CHAT_BAD,
    ),
}


@pytest.mark.parametrize(("raw", "chosen", "rejected"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_better_and_the_worse_record(tmp_path, raw, chosen, rejected):
    found = load(tmp_path / "p.jsonl", raw, raw)
    assert found.records == [chosen, rejected] * 2 and found.p == [1, 1]
    assert [origin.place[-1] for origin in found.origins] == list("1122")
    assert found.report["kept"] == 2


def test_longer_dialogues_share_all_but_the_last_answer(tmp_path):
    start = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant:"
    system = {"system": "Be brief."}
    other = start.replace("Hello", "Goodbye")
    with pytest.raises(UserError, match="differ before their last answers"):
        load(tmp_path / "p.jsonl", {"chosen": f"{start} Red", "rejected": f"{other} Five"})
    found = load(tmp_path / "p.jsonl", {"chosen": f"{start} Red", "rejected": f"{start} Five"})
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Name a colour.")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    assert found.records[0]["messages"] == [*prompt, CHAT["messages"][1]]
    assert found.records[1]["messages"] == [*prompt, CHAT_BAD["messages"][1]]
    dialogue = {"chosen": f"{HH} Red", "rejected": f"{HH} Five"}
    for raw in (ASKED | system, ASKED | system | {"prompt": [USER]}, dialogue | system):
        first = load(tmp_path / "p.jsonl", raw).records[0]["messages"]
        assert first == [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]


def test_fractions_order_the_pair_and_ties_are_dropped_and_counted(tmp_path):
    values = (1.75, 1.25, 1, 1.5, 0, None, float("nan"))
    rows = [JUDGED | {"preference": value} for value in values]
    same = JUDGED | {"output_1": "Red", "preference": 2}
    empty = JUDGED | {"output_1": "", "preference": 2}
    found = load(tmp_path / "p.jsonl", *rows, same, empty)
    assert found.records[:6] == [GOOD, BAD, BAD, GOOD, BAD, GOOD] and found.p == [0.75, 0.75, 1, 1]
    assert found.report == {
        "kept": 4,
        "fractional": 2,
        "empty answers": 1,
        "ties": 2,
        "without a verdict": 2,
        "equal answers": 1,
    }


def test_both_orders_of_a_judge_are_one_preference(tmp_path):
    """Three pairs: the orders agree, contradict each other, or one has no verdict."""
    rows = []
    for n, values in enumerate([(2, 1.5), (1, 2), (2, None)]):
        about = JUDGED | {"instruction": f"Task {n}.", "annotator": "a"}
        rows += [about | {"preference": value, "swapped": i == 1} for i, value in enumerate(values)]
    found = load(tmp_path / "p.jsonl", *rows, rows[0] | {"annotator": "b"})
    assert found.p == [0.75, 1] and {r["instruction"] for r in found.records} == {"Task 0."}
    assert found.report["ties"] == found.report["without a verdict"] == 1


def test_preference_files_have_weights(tmp_path):
    rows = [JUDGED | {"instruction": f"Task {n}.", "preference": 2} for n in range(4)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    found = load_preferences([f"{tmp_path / 'p.json'}:1.5"])
    assert found.report["kept"] == len(found.p) == 6
    assert len(found.records) == len(found.origins) == 12
    pairs = list(zip(found.records[::2], found.records[1::2], strict=True))
    assert all(a == b | {"output": "Red"} for a, b in pairs)


BROKEN = {
    "SFT data": (
        GOOD,
        "record 1: its fields ('instruction', 'input', 'output') hold no comparison",
    ),
    "no object": (5, "record 1: an object with two answers"),
    "preference": (JUDGED | {"preference": "2"}, "record 1: preference '2': 1 (output_1"),
    "preference of 3": (JUDGED | {"preference": 3}, "preference 3: 1 (output_1"),
    "answer a number": (JUDGED | {"output_2": 5, "preference": 2}, "output_2 is 5, a string"),
    "no prompt": ({"chosen": "Red", "rejected": "Five"}, "has no prompt"),
    "chosen a number": (ASKED | {"chosen": 5}, "must be texts or lists of messages"),
    "an empty turn": (ASKED | {"prompt": [USER], "rejected": ""}, "a turn is empty; 1 of 1"),
    "other questions": (
        {"chosen": f"{HH} Red", "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello."},
        "differ before their last answers; 1 of 1 records are unusable",
    ),
    "all ties": (
        JUDGED | {"preference": 1.5},
        "p.json: no preference to learn from: all ties, equal",
    ),
    "no record": (None, "p.json: no preference to learn from: no records"),
    "all equal": (ASKED | {"chosen": "Five"}, "no preference to learn from"),
}


@pytest.mark.parametrize(("raw", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_preferences_name_the_place_and_the_fault(tmp_path, raw, words):
    file = tmp_path / "p.json"
    file.write_text(json.dumps([raw] if raw else []))
    with pytest.raises(UserError) as error:
        load_preferences([file])
    assert str(file) in str(error.value) and words in str(error.value)


def test_odd_pairs_are_skipped_up_to_a_tenth(tmp_path, capsys):
    other = {"chosen": f"{HH} Red", "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello."}
    found = load(tmp_path / "p.jsonl", *[ASKED] * 9, other)
    assert found.report["kept"] == 9
    assert (
        "1 of 10 records skipped: 1 because chosen and rejected differ" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="2 of 10 records are unusable"):
        load(tmp_path / "p.jsonl", *[ASKED] * 8, other, other)
