"""`alpaca generate`: one prompt template, streamed answers."""

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
    code, out, err = command("watermark", "--tokenizer", folder, text)
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


def test_user_errors_are_one_line(command, tmp_path):
    for args, word in (
        ((), "instruction"),
        (("\ud800",), "half a surrogate pair"),
        (("a", "--n", 10**10), "--n: 10000000000 is more than 10,000"),
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
