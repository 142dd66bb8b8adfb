"""The sample data is what its script writes, and the held-out half is held out."""

import json
import re
import sys
from collections import Counter

import pytest
from helpers.commands import ROOT

from dataset import encode_record
from tokenizer import load_tokenizer

DATA = ROOT / "data"
TRAIN = json.loads((DATA / "sample_train.json").read_text())
HELD_OUT = json.loads((DATA / "sample_heldout.json").read_text())


@pytest.fixture(scope="module")
def make_sample():
    sys.path.insert(0, str(DATA))
    try:
        import make_sample

        yield make_sample
    finally:
        sys.path.remove(str(DATA))


def test_command_reproduces_the_files(make_sample, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["make_sample.py", "records", "--out", str(tmp_path)])
    make_sample.main()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["sample_heldout.json", "sample_train.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_fresh_records_ask_what_no_file_asks(make_sample, monkeypatch, tmp_path):
    flags = ["--count", "80", "--seed", "9", "--out", str(tmp_path / "fresh.json")]
    monkeypatch.setattr(sys, "argv", ["make_sample.py", "fresh", *flags])
    make_sample.main()
    fresh = json.loads((tmp_path / "fresh.json").read_text())
    assert Counter(r["new"] for r in fresh) == {"word": 40, "wording": 20, "question": 20}
    asked = {(r["instruction"], r["input"]) for r in TRAIN + HELD_OUT}
    assert asked.isdisjoint((r["instruction"], r["input"]) for r in fresh)
    assert {r["family"] for r in fresh} == {r["family"] for r in TRAIN}


def test_records_are_complete_unique_and_short():
    fields, tokenizer = {"instruction", "input", "output", "family"}, load_tokenizer(DATA)
    assert all(set(record) == fields for record in TRAIN)
    assert all(set(record) == fields | {"new"} for record in HELD_OUT)
    for record in TRAIN + HELD_OUT:
        assert all(isinstance(value, str) for value in record.values())
        assert record["instruction"] and record["output"]
        assert len(encode_record(record, tokenizer)[0]) <= 512
    families = {record["family"] for record in TRAIN}
    assert len(families) == 22 and {record["family"] for record in HELD_OUT} == families
    questions = Counter((record["instruction"], record["input"]) for record in TRAIN + HELD_OUT)
    assert max(questions.values()) == 1


def test_half_of_the_held_out_records_have_a_word_of_no_training_record():
    def words(*texts: str) -> set[str]:
        return set(re.findall(r"\w+", " ".join(texts)))

    known = set().union(*(words(r["instruction"], r["input"], r["output"]) for r in TRAIN))
    for record in HELD_OUT:
        new = words(record["instruction"], record["input"]) - known
        assert (record["new"] == "word") == bool(new), record
    counts = Counter(record["new"] for record in HELD_OUT)
    assert counts == {"word": 120, "wording": 60, "question": 60}


def test_prose_has_the_held_out_words_and_answers_no_request(make_sample):
    lines = list(make_sample.prose(4000, seed=1))
    assert lines[:100] == list(make_sample.prose(100, seed=1))
    texts = [json.loads(line)["text"] for line in lines]
    assert set(make_sample.HELD) <= set(re.findall(r"\w+", " ".join(texts)))
    for text in texts:
        assert all(answer.endswith(".") for answer in re.findall(r"### Response:\n(.*)", text))
        assert not re.search(r"### Response:[^\n]", text)


def test_prose_command_writes_jsonl_and_repeats_lists(make_sample, monkeypatch, tmp_path):
    flags = ["--lines", "50", "--echoes", "1", "--out", str(tmp_path / "prose.jsonl")]
    monkeypatch.setattr(sys, "argv", ["make_sample.py", "prose", *flags])
    make_sample.main()
    for line in (tmp_path / "prose.jsonl").read_text().splitlines():
        copies = json.loads(line)["text"].split("\n")
        assert len(copies) > 1 and len(set(copies)) == 1


def test_every_noun_is_one_token(make_sample):
    tokenizer = load_tokenizer(DATA)
    for noun in make_sample.NOUNS:
        assert len(tokenizer.encode(noun)) == 1, noun
        assert len(tokenizer.encode("\n" + noun)) == len(tokenizer.encode("\n")) + 1, noun
