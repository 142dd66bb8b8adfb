"""The evaluation set, data/eval_instructions.jsonl: its format, its text, its reference answers."""

import json
import re
import unicodedata

from helpers.commands import ROOT

from alpaca.datagen import lint
from alpaca.datagen.formats import normalize_record
from rougel import Pool

TASKS = [json.loads(line) for line in (ROOT / "data/eval_instructions.jsonl").open("rb")]
SEEDS = [json.loads(line) for line in (ROOT / "data/seed_tasks.jsonl").open("rb")]


def answer(opening: str) -> tuple[str, str]:
    (task,) = [task for task in TASKS if task["instruction"].startswith(opening)]
    return task["instances"][0]["input"], task["instances"][0]["output"]


def test_eval_set_has_the_published_schema_and_clean_text():
    assert len(TASKS) >= 120 and len({task["motivation_app"] for task in TASKS}) >= 50
    for number, task in enumerate(TASKS):
        assert list(task) == ["id", "motivation_app", "instruction", "instances"]
        assert task["id"] == f"user_oriented_task_{number}" and task["instances"]
        assert normalize_record(task)[0]["instruction"] == task["instruction"]
        for one in task["instances"]:
            assert set(one) == {"input", "output"}
            assert task["motivation_app"] and task["instruction"] and one["output"]
            for text in (task["motivation_app"], task["instruction"], one["input"], one["output"]):
                assert text == text.strip() == unicodedata.normalize("NFC", text)
                assert all(c.isascii() or c in "áèßóú¿" for c in text), text
                assert all(c.isprintable() or c == "\n" for c in text.replace("\t", "?"))
                assert not re.search(r"https?:|www\.", text)
    given = sum(bool(one["input"]) for task in TASKS for one in task["instances"])
    assert 50 <= given <= len(TASKS) - 50


def test_eval_set_has_no_duplicates_seeds_or_defects():
    asked = [task["instruction"] for task in TASKS]
    pool, seeds = Pool(asked), Pool([seed["instruction"] for seed in SEEDS])
    for number, text in enumerate(asked):
        scores = pool.scores(text)
        scores[number] = 0
        assert scores.max() < 0.6, (text, asked[scores.argmax()])
        assert seeds.scores(text).max() < 0.7, text
    earlier: set = set()
    found = {task["id"]: lint.find_defects(normalize_record(task), earlier) for task in TASKS}
    assert not {name: defects for name, defects in found.items() if defects}


def test_code_in_reference_answers_does_what_was_asked(capsys):
    def run(opening: str, part: int = 1, upto: str = "\n\n\n") -> dict:
        names: dict = {}
        exec(answer(opening)[part].split(upto)[0], names)  # our own file
        return names

    busy = run("Write a Python function busy", upto="\n\nSorting")["busy"]
    assert (busy([(1, 4), (3, 6), (8, 9)]), busy([(4, 5), (1, 4), (2, 3)]), busy([])) == (6, 4, 0)
    code = answer("This search sometimes never returns")[1]
    names: dict = {}
    exec(code[code.index("def ") :], names)
    assert [names["find"]([2, 4, 4, 7], x) for x in range(9)] == [0, 0, 0, 1, 1, 3, 3, 3, 4]
    code = answer("Code a function gap")[1]
    exec(code[code.index("def ") : code.index("\n\ngap(")], names)
    assert names["gap"]("22:40", "06:15") == 455 and names["gap"]("06:00", "22:01") == 961
    count = run("Rewrite the function without recursion")["count"]
    before = run("Rewrite the function without recursion", 0)["count"]
    assert [count(n) for n in range(20)] == [before(n) for n in range(20)] and count(100_000) > 0
    run("What does this program print", 0)
    printed = answer("What does this program print")[1].split("\n\n")[0]
    assert capsys.readouterr().out == printed + "\n"
    version = answer("I need a regular expression for version")[1].split("\n")[0]
    assert all(re.search(version, text) for text in ("0.0.1", "1.4.12"))
    for text in ("1.04.2", "1.4", "1.4.12.3", "01.1.1", "1.1.02"):
        assert not re.search(version, text)
