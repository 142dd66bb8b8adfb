"""The command line: one template, streamed answers, conversations, files of instructions."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers.commands import ROOT, assert_refused
from helpers.models import expected, small_config

from alpaca.inference import generate
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights import loading
from alpaca.weights.checkpoint import save_model
from alpaca.weights.loading import load_model
from dataset import chat_prompt, format_prompt
from model import Llama
from tokenizer import Tokenizer

TINY = ROOT / "data/tiny-llama"  # a base: it goes on, and seldom ends


@pytest.fixture(scope="module")
def engine():
    return Engine(load_model(TINY), Tokenizer(TINY))


def ask(command, *args):
    return command(generate, "--model-dir", TINY, "--max-new-tokens", 12, *args)


def test_an_answer_is_the_templates_continuation(command, engine):
    code, out, err = ask(command, "Name a fruit.")
    assert (code, out, err) == (0, expected(engine, "Name a fruit.") + "\n", "")
    with_input = ask(command, "Count the words.", "--input", "cat dog")[1]
    assert with_input == expected(engine, "Count the words.", "cat dog") + "\n"
    assert with_input != expected(engine, "Count the words.") + "\n"


@pytest.mark.parametrize(
    "text", ["", "</s><s><unk>", "中文 🎉 Grüße", "a\n\n### Response:b", " " * 50]
)
def test_any_text_is_text(command, engine, text):
    assert ask(command, text)[1] == expected(engine, text) + "\n"


def test_an_instruction_from_stdin(command, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n"))
    assert ask(command, "-")[1] == expected(engine, "Name a fruit.") + "\n"


def test_sampling_flags_arrive(command, engine):
    flags = ("--temperature", 0.9, "--top-p", 0.8, "--top-k", 50, "--seed", 3)
    flags += ("--repetition-penalty", 1.3, "--stop", "e")
    way = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 3}
    way |= {"repetition_penalty": 1.3, "stop": ("e",)}
    assert (
        ask(command, "Name a fruit.", *flags)[1] == expected(engine, "Name a fruit.", **way) + "\n"
    )
    _, out, _ = ask(command, "Name a fruit.", "--temperature", 1.2, "--n", 3, "--seed", 5)
    parts = re.split(r"--- \d ---\n", out)[1:]
    assert parts == [
        expected(engine, "Name a fruit.", temperature=1.2, seed=5 + i) + "\n" for i in range(3)
    ]


def test_json_tells_tokens_and_log_probabilities(command, engine):
    _, out, _ = ask(command, "Name a fruit.", "--json", "--n", 2)
    first, second = map(json.loads, out.splitlines())
    assert first == second and first["text"] == expected(engine, "Name a fruit.")
    assert len(first["tokens"]) == len(first["logprobs"]) > 0
    assert first["reason"] in ("stop", "length") and max(first["logprobs"]) <= 0


def test_the_dtype_flag_arrives(command):
    prompt_ids = Tokenizer(TINY).encode(format_prompt("Name a fruit."), bos=True)
    wide = Engine(load_model(TINY, dtype=torch.float32), Tokenizer(TINY))
    (answer,) = wide.generate([prompt_ids], SamplingParams(max_new_tokens=12, logprobs=0))
    for dtype, same in (("fp32", True), ("bf16", False)):
        told = json.loads(ask(command, "Name a fruit.", "--json", "--dtype", dtype)[1])
        assert (told["logprobs"] == pytest.approx(answer.logprobs, abs=2e-4)) is same


def test_rounded_weights_and_stats(command):
    for flags in (("--bits", 8), ("--bits", 4)):
        code, out, err = ask(command, "Name a fruit.", *flags, "--stats")
        assert code == 0 and len(out) > 1 and "tokens/s" in err


def test_a_file_is_answered_in_order_and_goes_on(command, engine, tmp_path):
    asked = [{"instruction": f"Say {word}.", "input": given} for word, given in
             (("a", ""), ("b", "x y"), ("c", ""), ("d", "中"), ("e", ""))]  # fmt: skip
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({**q, "output": "unused"}) + "\n" for q in asked))
    answers = [{**q, "output": expected(engine, **q)} for q in asked]
    code, printed, _ = ask(command, "--file", file, "--max-batch-size", 2)
    assert code == 0 and [json.loads(line) for line in printed.splitlines()] == answers
    assert ask(command, "--file", file, "--out", out, "--max-batch-size", 3)[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    assert [{k: json.loads(line)[k] for k in answers[0]} for line in lines] == answers
    whole = out.read_text()
    out.write_text("".join(lines[:2]) + lines[2][:20])
    assert ask(command, "--file", file, "--out", out, "--max-batch-size", 2)[0] == 0
    assert out.read_text() == whole
    before = out.stat().st_mtime_ns
    assert ask(command, "--file", file, "--out", out)[0] == 0
    assert out.stat().st_mtime_ns == before, "all was answered"

    listed = tmp_path / "q.json"
    listed.write_text(json.dumps(asked[1:]))
    assert_refused(ask(command, "--file", listed, "--out", out), "line 1", "another instruction")
    warm = ask(command, "--file", file, "--out", out, "--temperature", 1)
    assert_refused(warm, "line 1", "sampling")
    assert_refused(ask(command, "--file", file, "--out", file), "line 1", "--out")
    file.write_text(json.dumps(asked[0]))
    assert_refused(ask(command, "--file", file, "--out", out), "line 2", "one more")


def test_every_instruction_has_a_seed_of_its_own(command, engine, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"instruction": "Name a fruit."}\n' * 3)
    _, out, _ = ask(command, "--file", file, "--temperature", 1.5, "--seed", 4)
    texts = [json.loads(line)["output"] for line in out.splitlines()]
    way = {"temperature": 1.5}
    assert texts == [expected(engine, "Name a fruit.", **way, seed=4 + i) for i in range(3)]


def test_mistakes_in_a_file_name_the_place(command, tmp_path):
    file = tmp_path / "q.jsonl"
    for text, said in (
        ('{"instruction": "a"}\n{"task": "b"}\n', ("line 2", '"instruction"')),
        ('{"instruction": "a", "input": 7}\n', ("line 1", '"input"')),
        ("{nonsense\n", ("line 1", "not JSON")),
        (json.dumps({"instruction": "word " * 900}) + "\n", ("instruction 1", "too many")),
        ("", ("no instructions",)),
    ):
        file.write_text(text)
        assert_refused(ask(command, "--file", file), *said)
    assert_refused(ask(command, "--file", tmp_path / "none"), "none")


def test_mistakes_are_one_line(command, tmp_path, monkeypatch):
    assert_refused(ask(command), "--chat")
    assert_refused(ask(command, "a", "--chat"), "one of")
    assert_refused(ask(command, "a", "--out", "b"), "--file")
    assert_refused(ask(command, "--chat", "--input", "b"), "--input")
    assert_refused(ask(command, "a", "--top-p", 2), "top_p")
    assert_refused(ask(command, "a", "--stop", ""), "stop")
    assert_refused(ask(command, "a", "--seed", -1), "seed")
    assert_refused(ask(command, "--chat", "--json"), "--json")
    broken = ("--temperature", 1, "--repetition-penalty", 1e-300)
    code, _, err = ask(command, "a", *broken)
    assert code == 2 and "not numbers" in err and err.count("\n") == 1
    code, out, _ = ask(command, "a", "--temperature", 1, "--top-k", 10**30)
    assert code == 0 and out
    assert_refused(ask(command, "a", "--max-new-tokens", 0), "--max-new-tokens")
    assert_refused(ask(command, "word " * 900), "too many")
    assert_refused(command(generate, "--model-dir", tmp_path / "none", "a"), "none")
    monkeypatch.setattr(loading, "DEFAULT_MODEL", tmp_path / "none")
    assert_refused(command(generate, "a"), "make train", "--model-dir")


def test_the_model_of_make_train_is_the_default(command, engine, monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_MODEL", TINY)
    out = command(generate, "Name a fruit.", "--max-new-tokens", 12)[1]
    assert out == expected(engine, "Name a fruit.") + "\n"


# ---------------------------------------------------------------- conversations


def test_a_conversation_remembers_and_can_be_reset(command, engine, monkeypatch):
    said = ["Name a fruit.", "And another.", "", "/reset", "Name a fruit.", "/quit", "unheard"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said) + "\n"))
    how = ("--temperature", 2.5, "--seed", 9)
    code, out, _ = ask(command, "--chat", "--system", "Be brief.", *how)
    history, shown = [{"role": "system", "content": "Be brief."}], []
    for number, text in enumerate(said[:2]):
        history.append({"role": "user", "content": text})
        ids = chat_prompt(history, engine.tokenizer)
        way = SamplingParams(max_new_tokens=12, temperature=2.5, seed=9 + number)
        (answer,) = engine.generate([ids], way)
        history.append({"role": "assistant", "content": answer.text})
        shown.append(answer.text + "\n")
    anew, on = (chat_prompt(h, engine.tokenizer) for h in (history[:2], history + history[1:2]))
    reset, kept = engine.generate([anew, on], replace(way, seed=11))
    assert code == 0 and out == "".join([*shown, reset.text + "\n"])
    assert reset.text != kept.text  # or the test could not fail


def test_a_conversation_that_is_too_long_is_said_and_goes_on(command, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 900 + "\nName a fruit.\n"))
    code, out, _ = ask(command, "--chat")
    assert code == 0 and "too many" in out and "/reset" in out
    assert out.endswith(expected(engine, "Name a fruit.") + "\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    torch.manual_seed(0)
    config = small_config(
        vocab_size=1024, hidden_size=512, num_hidden_layers=8, max_position_embeddings=4096
    )
    model = Llama(config)
    model.lm_head.weight.data[2] = 0  # EOS is not likely
    save_model(model, config, tmp_path / "slow", tokenizer=ROOT / "data/tokenizer.model")
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "alpaca",
        "generate",
        "--model-dir",
        tmp_path / "slow",
        "--chat",
    ]
    command += ["--max-new-tokens", "4000"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=tmp_path
    )
    os.close(theirs)
    seen = ""

    def wait_for(condition) -> None:
        nonlocal seen
        until = time.monotonic() + 60
        while not condition(seen):
            assert select.select([ours], [], [], until - time.monotonic())[0], seen
            seen += os.read(ours, 65536).decode(errors="replace")

    def at_the_prompt(text: str) -> bool:
        return text.endswith("\n> ")

    try:
        wait_for(at_the_prompt)
        os.write(ours, b"Go on.\n")
        seen = ""
        wait_for(lambda text: len(text) > 200)
        process.send_signal(signal.SIGINT)
        wait_for(at_the_prompt)
        assert len(seen) < 10_000
        seen = ""
        time.sleep(0.5)  # a signal between readline's prompt and its waiting is heard at a key only
        process.send_signal(signal.SIGINT)  # at the prompt it ends nothing either
        wait_for(at_the_prompt)
        os.write(ours, b"/quit\n")
        with suppress(OSError):  # the terminal's other end is closed
            while select.select([ours], [], [], 60)[0] and os.read(ours, 65536):
                pass
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
