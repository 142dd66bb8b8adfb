"""Several answers to each instruction: each has its own seed, in any batch and after a resume."""

import json

import pytest
import torch
from helpers.commands import ROOT, assert_refused

from alpaca.common.files import lock_output
from alpaca.inference.answer import answer_in_order
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams, derive_seed
from alpaca.weights.loading import load_model
from dataset import chat_prompt, encode_prompt
from tokenizer import load_tokenizer

TINY = ROOT / "data/tiny-llama"
TURNS = [("user", "Hi."), ("assistant", "Hello."), ("user", "Name a fruit."), ("assistant", "Pear")]
RECORDS = [
    {"instruction": "Count the words.", "input": "cat dog", "output": "two"},
    {"messages": [{"role": role, "content": text} for role, text in TURNS]},
    {"instruction": "Name a tree.", "input": "", "output": "oak"},
]


@pytest.fixture(scope="module")
def engine():
    return Engine(load_model(TINY, dtype=torch.float32), load_tokenizer(TINY))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(RECORDS))
    return file


def draw(command, data, out, *more):
    flags = ("--model-dir", TINY, "--dtype", "fp32", "--max-new-tokens", 6, "--temperature", 1.5)
    return command("samples", "--data", data, "--out", out, *flags, *more)


def outputs(out) -> list[list[str]]:
    return [json.loads(line)["outputs"] for line in out.read_text().splitlines()]


def expected(engine, seed: int, n: int) -> list[list[str]]:
    """Each sample decoded alone."""
    prompts = [encode_prompt(*list(RECORDS[i].values())[:2], engine.tokenizer) for i in (0, 2)]
    prompts.insert(1, chat_prompt(RECORDS[1]["messages"][:3], engine.tokenizer))
    found = []
    for i, ids in enumerate(prompts):
        params = [
            SamplingParams(temperature=1.5, max_new_tokens=6, seed=derive_seed(seed, i, j))
            for j in range(n)
        ]
        found.append([engine.generate([ids], each)[0].text for each in params])
    return found


def test_samples_are_each_decoded_with_their_own_seed(command, engine, data, tmp_path):
    for size in (1, 5):
        out = tmp_path / f"{size}.jsonl"
        code, _, err = draw(command, data, out, "--n", 3, "--seed", 4, "--max-batch-size", size)
        assert code == 0, err
        assert outputs(out) == expected(engine, 4, 3)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line, record in zip(lines, RECORDS, strict=True):
        assert {name: line[name] for name in record} == record
        assert line["generator"] == "tiny-llama" and line["sampling"]["seed"] == 4
    assert len({text for line in lines for text in line["outputs"]}) > 5


def test_more_samples_or_another_seed_keep_or_change_all_of_them(command, data, tmp_path):
    for name, more in (("a", ()), ("b", ("--n", 6)), ("c", ("--seed", 1))):
        assert draw(command, data, tmp_path / name, *more)[0] == 0
    a, b, c = (outputs(tmp_path / name) for name in "abc")
    assert [texts[:4] for texts in b] == a and all(len(texts) == 6 for texts in b)
    seeds = {derive_seed(seed, i, j) for seed in range(9) for i in range(9) for j in range(9)}
    assert a != c and len(seeds) == 9**3


def test_few_requests_wait_at_once(engine):
    """Of many records, those are encoded whose answers are decoded next."""
    taken, params = [], SamplingParams(max_new_tokens=3)

    def requests():
        for i in range(30):
            taken.append(i)
            yield [1, 5 + i], [params] * 2

    answers = answer_in_order(engine, requests())
    first = next(answers)
    assert len(first) == 2 and len(taken) <= 3
    assert len(list(answers)) == 29 and len(taken) == 30


def test_samples_resume_with_the_same_settings_only(command, data, tmp_path):
    out = tmp_path / "o.jsonl"
    assert draw(command, data, out)[0] == 0
    complete = out.read_text()
    lines = complete.splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:30])
    code, _, err = draw(command, data, out, "--max-batch-size", 2)
    assert code == 0 and out.read_text() == complete, err
    for flag, value, setting in (
        ("--n", 5, "n"),
        ("--seed", 1, "sampling"),
        ("--temperature", 1, "sampling"),
        ("--name", "x", "generator"),
    ):
        what = f"line 1: from a run that differs in {setting}: use another --out"
        assert_refused(draw(command, data, out, flag, value), what)
    with lock_output(tmp_path / "new.jsonl"):
        assert_refused(draw(command, data, tmp_path / "new.jsonl"), "another process is writing")
    data.write_text(json.dumps(RECORDS[1:]))
    assert_refused(draw(command, data, out), "line 1: from a run that differs in instruction")
    data.write_text(json.dumps(RECORDS[:2]))
    assert_refused(draw(command, data, out), "line 3: more answers than records")


def test_samples_refuse_what_has_no_answers(command, data, tmp_path):
    out = tmp_path / "o.jsonl"
    assert_refused(draw(command, data, out, "--temperature", 0), "--temperature above 0")
    assert_refused(draw(command, data, out, "--n", 0), "--n")
    data.write_text(json.dumps([*RECORDS, {"text": "Once upon a time"}]))
    assert_refused(draw(command, data, out), "plain text")
    assert not out.exists()
    long = RECORDS[2] | {"instruction": "word " * 900}
    data.write_text(json.dumps([long, RECORDS[2]]))
    code, _, err = draw(command, data, out)
    assert code == 0 and "record 1 gets no answers" in err
    assert [len(texts) for texts in outputs(out)] == [0, 4]
