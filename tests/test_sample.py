"""The sample data is what its script makes, and the held-out half is held out."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from dataset import encode_record
from tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def make_sample():
    sys.path.insert(0, str(DATA))
    try:
        import make_sample

        yield make_sample
    finally:
        sys.path.remove(str(DATA))


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return json.loads((DATA / "sample_train.json").read_text())


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return json.loads((DATA / "sample_heldout.json").read_text())


def test_the_command_makes_these_very_files(make_sample, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["make_sample.py", "records", "--out", str(tmp_path)])
    make_sample.main()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "sample_heldout.json",
        "sample_train.json",
    ]
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (DATA / file.name).read_bytes(), file.name


def test_every_record_has_its_fields(train, held_out):
    fields = {"instruction", "input", "output", "family"}
    assert all(set(record) == fields for record in train)
    assert all(set(record) == fields | {"new"} for record in held_out)
    assert all(isinstance(v, str) for record in train + held_out for v in record.values())
    assert all(record["instruction"] and record["output"] for record in train + held_out)
    families = {record["family"] for record in train}
    assert len(families) == 22 and {record["family"] for record in held_out} == families


def test_no_question_is_asked_twice(train, held_out):
    asked = Counter((record["instruction"], record["input"]) for record in train + held_out)
    assert max(asked.values()) == 1


def test_half_of_the_held_out_records_are_about_words_no_training_record_has(train, held_out):
    def words(record: dict) -> set[str]:
        return set(re.findall(r"\w+", f"{record['instruction']} {record['input']}"))

    def all_words(record: dict) -> set[str]:
        return words(record) | set(re.findall(r"\w+", record["output"]))

    known = set().union(*map(all_words, train))
    for record in held_out:
        assert (record["new"] == "word") == bool(words(record) - known), record
    assert Counter(record["new"] for record in held_out) == {
        "word": 120,
        "wording": 60,
        "question": 60,
    }


def test_the_held_out_words_stand_in_the_prose(make_sample):
    text = " ".join(json.loads(line)["text"] for line in make_sample.prose(4000, seed=1))
    assert set(make_sample.HELD) <= set(re.findall(r"\w+", text))


def test_the_prose_is_the_same_each_time_and_never_answers_a_request(make_sample):
    once = list(make_sample.prose(2000, seed=3))
    assert once == list(make_sample.prose(2000, seed=3))
    for line in once:
        text = json.loads(line)["text"]
        for answer in re.findall(r"### Response:\n(.*)", text):
            assert answer.endswith(".")  # a sentence of no consequence
        assert not re.search(r"### Response:[^\n]", text)


def test_every_record_fits_and_every_noun_is_one_piece(make_sample, train, held_out):
    tokenizer = Tokenizer(DATA / "tokenizer.model")
    assert max(len(encode_record(r, tokenizer)[0]) for r in train + held_out) <= 512
    for noun in make_sample.NOUNS:
        assert len(tokenizer.encode(noun)) == 1, noun
        assert len(tokenizer.encode("\n" + noun)) == len(tokenizer.newline_ids) + 1, noun
