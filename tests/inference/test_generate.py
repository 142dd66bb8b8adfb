"""`alpaca generate`: one prompt template, streamed answers, files that resume."""

import io
import json
import re
import sys

import pytest
import torch
from helpers.bpe import write_bpe_model
from helpers.commands import ROOT, assert_refused
from helpers.models import expected

from alpaca import CHECKOUT
from alpaca.common.files import lock_output
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights import loading
from alpaca.weights.loading import load_model
from templates import format_prompt
from tokenizer import load_tokenizer

TINY = ROOT / "data/tiny-llama"  # a base model: it seldom ends an answer


@pytest.fixture(scope="module")
def engine():
    return Engine(load_model(TINY, dtype=torch.float32), load_tokenizer(TINY))


def generate(command, *args):
    """In fp32, unless the last --dtype says otherwise: there no layout changes a token."""
    flags = "--model-dir", TINY, "--max-new-tokens", 12, "--dtype", "fp32"
    return command("generate", *flags, *args)


def test_answer_continues_the_prompt_template(command, engine, asked):
    code, out, err = generate(command, "Name a fruit.")
    assert (code, out, err) == (0, expected(engine, "Name a fruit.") + "\n", "")
    with_input = generate(command, "Name a fruit.", "--input", "Not an apple.")[1]
    assert with_input == expected(engine, "Name a fruit.", "Not an apple.") + "\n"
    assert asked[0] == asked[1] != asked[2] == asked[3]


def test_model_with_byte_level_bpe_answers(command, tmp_path):
    folder = write_bpe_model(tmp_path / "model")
    engine = Engine(load_model(folder), load_tokenizer(folder))
    words = ("generate", "--model-dir", folder, "--max-new-tokens", 12, "Sag 5 schöne <|end|>!")
    code, out, _ = command(*words)
    assert (code, out) == (0, expected(engine, words[-1]) + "\n")
    answer = json.loads(command(*words, "--json")[1])
    assert answer["text"] == out[:-1] and len(answer["tokens"]) == 12
    text = tmp_path / "text.txt"
    text.write_text("Is this text marked? " * 20)
    code, out, err = command("watermark", "detect", "--tokenizer", folder, text)
    assert code == 0 and "z  " in out, err


def test_instruction_from_stdin(command, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n"))
    assert generate(command, "-")[1] == expected(engine, "Name a fruit.") + "\n"


def test_default_model_is_that_of_make_train(command, engine, tmp_path, monkeypatch):
    assert CHECKOUT / "runs/tiny/model" == loading.DEFAULT_MODEL
    monkeypatch.setattr(loading, "DEFAULT_MODEL", TINY)
    out = command("generate", "--dtype", "fp32", "Name a fruit.", "--max-new-tokens", 12)[1]
    assert out == expected(engine, "Name a fruit.") + "\n"
    monkeypatch.setattr(loading, "DEFAULT_MODEL", tmp_path / "none")
    assert_refused(command("generate", "Name a fruit."), "make train", "--model-dir")


def test_sampling_flags_reach_the_engine(command, engine):
    out = generate(command, "Name a fruit.", "--temperature", 0.9, "--seed", 3, "--stop", "e")[1]
    params = {"temperature": 0.9, "seed": 3, "stop": ("e",)}
    assert out == expected(engine, "Name a fruit.", **params) + "\n"
    out = generate(command, "Name a fruit.", "--temperature", 1.2, "--n", 3, "--seed", 5)[1]
    assert re.split(r"--- \d ---\n", out)[1:] == [
        expected(engine, "Name a fruit.", temperature=1.2, seed=5 + i) + "\n" for i in range(3)
    ]


def test_json_has_tokens_and_logprobs(command, engine):
    out = generate(command, "Name a fruit.", "--json", "--n", 2)[1]
    first, second = map(json.loads, out.splitlines())
    assert first == second and first["text"] == expected(engine, "Name a fruit.")
    assert len(first["tokens"]) == len(first["logprobs"]) > 0
    assert first["finish_reason"] in ("stop", "length") and max(first["logprobs"]) <= 0


def test_model_flags_and_stats(command):
    prompt_ids = load_tokenizer(TINY).encode(format_prompt("Name a fruit."), bos=True)
    wide = Engine(load_model(TINY, dtype=torch.float32), load_tokenizer(TINY))
    (answer,) = wide.generate([prompt_ids], SamplingParams(max_new_tokens=12, logprobs=0))
    for dtype, same in (("fp32", True), ("bf16", False)):
        out = generate(command, "Name a fruit.", "--json", "--dtype", dtype)[1]
        close = json.loads(out)["logprobs"] == pytest.approx(answer.logprobs, abs=2e-4)
        assert close is same
    code, out, err = generate(command, "Name a fruit.", "--bits", 4, "--stats")
    assert code == 0 and len(out) > 1 and "tokens/s" in err


def test_file_is_answered_in_order_and_resumes(command, tmp_path):
    # in bf16, some CPUs round a row differently when it is alone and in a batch
    engine = Engine(load_model(TINY, dtype=torch.float32), load_tokenizer(TINY))
    words = (("a", ""), ("b", "x y"), ("c", ""), ("d", "中"), ("e", ""))
    questions = [{"instruction": f"Say {word}.", "input": given} for word, given in words]
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({**q, "output": "unused"}) + "\n" for q in questions))
    answers = [
        {**q, "output": expected(engine, **q, temperature=1.5, seed=4 + i)}
        for i, q in enumerate(questions)
    ]
    flags = ("--file", file, "--dtype", "fp32", "--temperature", 1.5, "--seed", 4)
    code, printed, _ = generate(command, *flags, "--max-batch-size", 2)
    assert code == 0 and [json.loads(line) for line in printed.splitlines()] == answers
    assert generate(command, *flags, "--out", out, "--max-batch-size", 3)[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    assert [{k: json.loads(line)[k] for k in answers[0]} for line in lines] == answers
    complete = out.read_text()
    out.write_text("".join(lines[:2]) + lines[2][:20])
    assert generate(command, *flags, "--out", out, "--max-batch-size", 2)[0] == 0
    assert out.read_text() == complete
    before = out.stat().st_mtime_ns
    assert generate(command, *flags, "--out", out)[0] == 0
    assert out.stat().st_mtime_ns == before, "everything was answered already"

    listed = tmp_path / "q.json"
    listed.write_text(json.dumps(questions[1:]))
    other = generate(command, *flags, "--file", listed, "--out", out)
    assert_refused(other, "line 1", "differs in instruction")
    cooler = generate(command, *flags, "--out", out, "--temperature", 1)
    assert_refused(cooler, "line 1", "sampling")
    assert_refused(generate(command, *flags, "--out", file), "q.jsonl is an input", "output")
    with lock_output(out):
        assert_refused(generate(command, *flags, "--out", out), "another process is writing")
    file.write_text(json.dumps(questions[0]))
    assert_refused(generate(command, *flags, "--out", out), "line 2", "more answers")


def test_file_errors_name_the_place(command, tmp_path):
    file = tmp_path / "q.jsonl"
    for text, words in (
        ('{"instruction": "a"}\n{"task": "b"}\n', ("line 2: instruction is missing", "a string")),
        ('{"instruction": "a", "input": 7}\n', ("line 1: input is 7", "a string or null")),
        ("{nonsense\n", ("line 1", "not JSON")),
        ('{"instruction": "\\ud800"}\n', ("instruction 1", "half a surrogate pair")),
        (json.dumps({"instruction": "word " * 900}) + "\n", ("instruction 1", "too many")),
        ("", ("no instructions",)),
    ):
        file.write_text(text)
        assert_refused(generate(command, "--file", file), *words)
    assert_refused(generate(command, "--file", tmp_path / "none"), "none")


def test_user_errors_are_one_line(command, tmp_path):
    for args, word in (
        ((), "--file"),
        (("a", "--file", "b"), "--file"),
        (("a", "--out", "b"), "--file"),
        (("--file", "b", "--n", 2), "--n"),
        (("a", "--n", 10**10), "--n: 10000000000 is more than 10,000"),
        (("--file", "b", "--json"), "--json"),
        (("a", "--rows", 2), "--max-batch-size"),
        (("a", "--stop", ""), "stop"),
        (("a", "--max-new-tokens", 0), "--max-new-tokens"),
        (("word " * 900,), "too many"),
        (("a", "--model-dir", tmp_path / "none"), "none"),
        (("a", "--model-dir", __file__), "neither a folder nor a GGUF file"),
        (("a", "--model-dir", "meta-llama/Llama-3.2-1B"), "hf download meta-llama/Llama-3.2-1B"),
        (("a", "--adapter", tmp_path), "no adapter_config.json in it"),
    ):
        assert_refused(generate(command, *args), word)
    infinite = ("--temperature", 1, "--repetition-penalty", 1e-300)
    code, _, err = generate(command, "a", *infinite)
    assert code == 2 and "not numbers" in err and err.count("\n") == 1
    code, out, _ = generate(command, "a", "--temperature", 1, "--top-k", 10**30)
    assert code == 0 and out
