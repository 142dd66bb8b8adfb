"""Rewards that compare an answer with the reference of its record."""

import random
import re
from decimal import Decimal

import pytest
from helpers.benchmarks import solution

from alpaca.common.errors import UserError
from alpaca.datagen.checkers import load_checker, stated_number


def reward(spec: str, reference: str, answer: str) -> float:
    return load_checker(spec)({"instruction": "?", "input": "", "output": reference}, answer)


@pytest.mark.parametrize(
    ("spec", "reference", "answer", "expected"),
    [
        ("exact", "ZINC", " ZINC\n", 1),
        ("exact", "a b\nc", "a  b c", 1),
        ("exact", "ZINC", "zinc", 0),
        ("exact", "two words", "twowords", 0),
        ("exact", "two", "two words", 0),
        ("number", "48/2 = <<48/2=24>>24 clips.\n#### 72", "So 48 and 24 are 72.", 1),
        ("number", "#### 1,234", "$1234.00", 1),
        ("number", "12", "In all 12. That is 3 more.", 0),
        ("number", "-3", "5 - 8 = -3", 1),
        ("number", "3", "-3", 0),
        ("number", "5", "12-5", 1),
        ("number", "0.5", "It is .5", 1),
        ("number", "4", "3,4", 1),
        ("number", "1234567", "1,234,567", 1),
        ("number", "1,234,567", "about 567", 0),
        ("number", "2345", "1,2345", 1),
        ("number", "5", "#### 5\nI needed 3 steps.", 1),
        ("number", "5", "####5, then 3", 0),
        ("number", "1234.5", "It is $1,234.50.", 1),
        ("number", "-5", "He loses -$5", 1),
        ("number", "-5", "He loses \u22125 km", 1),
        ("number", "5", "12-$5", 1),
        ("number", "30", "30% of them, or 30 kg", 1),
        ("number", "1.2", "#### 1.2.3", 1),
        ("number", "72", "#### 72.", 1),
        ("number", "7", "#### seven", 0),
        ("number", "7", "seven", 0),
        ("number", "7", "", 0),
        ("regex", r"(?i)\bred\b", "It is Red.", 1),
        ("regex", r"^red$", "It is red.", 0),
    ],
)
def test_checker_rewards_what_agrees_with_the_reference(spec, reference, answer, expected):
    assert reward(spec, reference, answer) == expected


def test_the_number_of_a_solution_is_that_of_gsm8ks_expression():
    rng = random.Random(0)
    for text in (solution(rng) for _ in range(100)):
        (expected,) = re.findall(r"#### (\-?[0-9\.\,]+)", text)
        assert stated_number(text) == Decimal(expected.replace(",", ""))
        assert load_checker("number")({"instruction": "?", "input": "", "output": text}, text) == 1


def test_checker_takes_the_last_answer_of_a_conversation():
    turns = [("user", "a"), ("assistant", "1"), ("user", "b"), ("assistant", "2")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert [load_checker("exact")(record, answer) for answer in "12"] == [0, 1]


def test_checker_may_be_a_function_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\n"
        "def short(record, answer): return -len(answer) / len(record['output'])\n"
        "def right(record, answer): return answer == record['output']\n"
        "def broken(record, answer): return math.nan\n"
        "def none(record, answer): pass\n"
    )
    assert reward(f"{file}:short", "four", "ab") == -0.5
    assert reward(f"{file}:right", "a", "a") == 1 and reward(f"{file}:right", "a", "b") == 0
    for name, words in (
        ("broken", "returned nan: a finite number"),
        ("none", "returned None"),
        ("missing", "defines no function missing"),
        ("math", "defines no function math"),
    ):
        with pytest.raises(UserError, match=words):
            reward(f"{file}:{name}", "a", "a")


def test_checker_errors_say_what_to_do(tmp_path):
    for spec, words in (
        ("excat", "one of exact, number, regex or FILE.py:NAME"),
        ("exact:1", "one of exact"),
        (f"{tmp_path}/no.py", "FILE.py:NAME"),
    ):
        with pytest.raises(UserError, match=words):
            load_checker(spec)
    with pytest.raises(UserError, match="no number in the reference 'seven'"):
        reward("number", "seven", "7")
    with pytest.raises(UserError, match="no regular expression"):
        reward("regex", "(", "7")
