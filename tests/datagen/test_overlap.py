"""Twins: an evaluation set's questions in training data, and the wording that is no overlap."""

import json

import pytest
from helpers.commands import ROOT

from alpaca.datagen.formats import load_records
from alpaca.datagen.overlap import find_twins, questions_of
from rougel import rouge_l

SKY = "Why does the sky look blue on a clear day and red in the evening?"  # 14 words
LONG = (
    "A baker sells 48 rolls in April and half as many in May, when the shop was closed for two "
    "weeks because of the heat. How many rolls did she sell in both months together?"
)


def record(instruction: str, input: str = "", output: str = "It is so.") -> dict:
    return {"instruction": instruction, "input": input, "output": output}


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def kinds(records: list[dict], *items: str, **options) -> list[tuple[int, int, str]]:
    return [(twin.record, twin.item, twin.kind) for twin in find_twins(records, items, **options)]


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{i}" for i in range(count))


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (SKY, "equal"),
        (SKY.upper(), "equal"),
        (f"  {SKY.replace(' ', '  ')}!\n", "equal"),
        (SKY.replace("day and", "day; and"), "equal"),
        (SKY.replace("clear", "sunny"), "similar"),
        (SKY.replace("evening", "morning"), "similar"),
        ("Why do roses look red on a sunny day and black in the dark?", None),
        ("Write a poem about the blue sky.", None),
    ],
)
def test_question_is_found_however_it_is_written(asked, kind):
    assert kinds([record("Name a fruit."), record(asked)], SKY) == ([(1, 0, kind)] if kind else [])


def test_input_belongs_to_the_question():
    records = [
        record("Translate into French.", "The cat sleeps."),
        record("Translate into French."),
    ]
    assert kinds(records, "translate into French:\n\nthe cat sleeps") == [(0, 0, "equal")]
    assert kinds(records, "Translate into French.") == [(1, 0, "equal")]


def test_scripts_other_than_latin_are_compared():
    records = [record("Почему небо голубое?"), record("空はなぜ青いのですか。")]
    assert kinds(records, "空はなぜ青いのですか", "почему небо голубое") == [
        (0, 1, "equal"),
        (1, 0, "equal"),
    ]
    assert kinds([record("🙂"), record("?!")], "🙂", "?!") == [], "no words"


def test_seven_words_must_be_equal_and_eight_similar():
    for count, found in ((7, []), (8, [(0, 0, "similar")])):
        changed = words(count).replace("w3", "other")
        assert rouge_l(words(count), changed) > 0.7
        assert kinds([record(changed)], words(count)) == found


def test_rouge_l_of_exactly_0_7_is_no_twin():
    ten = words(7) + " a b c"
    assert rouge_l(ten, words(10)) == 0.7
    assert kinds([record(ten)], words(10)) == []
    assert kinds([record(words(8) + " a b c")], words(10)) == [(0, 0, "similar")]  # 0.76


def test_long_text_that_contains_the_question_is_found():
    around = [words(60, "before"), words(60, "after")]
    for item, found in ((words(15), [(0, 0, "contained")]), (words(14), [])):  # 8 and 7 grams
        assert kinds([record(f"{around[0]} {item} {around[1]}")], item) == found
    for place in (record("Go on.", output=f"{around[0]} {LONG}"), {"text": f"{LONG} {around[0]}"}):
        assert kinds([place], LONG) == [(0, 0, "contained")]
    assert kinds([record("Go on.", output=" ".join(around))], LONG) == []


def test_seven_of_ten_grams_are_enough():
    """Of 107 words' 100 8-grams the record has 70, 71 or 69."""
    for length, found in ((77, [0.7]), (78, [0.71]), (76, [])):
        text = f"{words(90, 'x')} {words(length)} {words(90, 'y')}"
        twins = find_twins([record("Go on.", output=text)], [words(107)])
        assert [twin.score for twin in twins] == found


@pytest.mark.parametrize(("count", "found"), [(10, 1), (11, 0)])
def test_wording_of_more_than_ten_questions_is_a_template(count, found):
    """An item that differs from `count` records in one word only."""
    template = "Please write down the name of the one city that is the capital of {} today."
    records = [record(template.format(f"land{i}")) for i in range(count)]
    item = template.format("Chad")
    assert len(kinds(records, item)) == found * count
    long = [record(f"Go on {i}.", output=f"{i} {LONG} {i}") for i in range(count)]
    assert len(kinds(long, LONG)) == found * count
    assert kinds([*records, record(item)], item)[-1] == (count, 0, "equal")


def test_a_question_with_many_answers_is_no_template():
    changed = record(SKY.replace("clear", "sunny"))
    records = [changed | {"output": str(i)} for i in range(20)]
    assert len(kinds(records, SKY)) == 20
    assert len(kinds([record("Go on.", output=f"{i} {LONG} {i}") for i in range(20)], LONG)) == 20


def test_what_an_item_has_beside_its_template_is_looked_for():
    template, own = words(40, "t"), words(20, "own")
    records = [record(f"{template} {i}") for i in range(11)]
    records += [record("Go on.", output=f"{words(7, 'a')} {own} {words(60, 'b')}")]
    assert kinds(records, f"{words(7, 'a')} {own} {template}") == [(11, 0, "contained")]


def test_conversation_is_compared_as_a_whole_and_by_message():
    talk = chat("Hello!", "Hi.", SKY, "Because.", "And at night?", "It is black.")
    assert questions_of(talk)[0] == f"Hello!\n\n{SKY}\n\nAnd at night?"
    assert kinds([talk], SKY, questions_of(talk)[0], "and at NIGHT") == [
        (0, i, "equal") for i in range(3)
    ]
    assert kinds([chat("Go on.", f"{words(50)} {LONG}")], LONG) == [(0, 0, "contained")]


def test_without_rouge_similar_questions_are_left_out():
    records = [record(SKY), record(SKY.replace("clear", "sunny")), record("x", output=LONG)]
    assert kinds(records, SKY, LONG, rouge=False) == [(0, 0, "equal"), (2, 1, "contained")]


def test_sample_data_has_only_facts_asked_in_other_words():
    """Of 240 held-out records, 120 have a word of no training record: none of these has a twin."""
    train, held_out = (load_records(ROOT / f"data/sample_{n}.json") for n in ("train", "heldout"))
    raw = json.loads((ROOT / "data/sample_heldout.json").read_text())
    asked = [questions_of(item)[0] for item in held_out]
    assert find_twins(train, asked, rouge=False) == []
    twins = find_twins(train, asked)
    assert twins and {twin.kind for twin in twins} == {"similar"}
    assert all(raw[twin.item]["new"] != "word" for twin in twins)
