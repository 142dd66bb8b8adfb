"""`alpaca chat`: a conversation is remembered, can be reset, and survives a prompt too long."""

import io
import sys
from dataclasses import replace

from helpers.commands import ROOT
from helpers.models import expected

from alpaca.inference.engine import Engine
from alpaca.inference.prefix_tree import PREFIX_MEMORY
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import load_model
from dataset import chat_prompt
from tokenizer import load_tokenizer

TINY = ROOT / "data/tiny-llama"


def chat(command, monkeypatch, lines: list[str], *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return command("chat", "--model-dir", TINY, "--max-new-tokens", 12, *flags)


def test_chat_remembers_and_can_be_reset(command, monkeypatch):
    engine = Engine(load_model(TINY), load_tokenizer(TINY), prefix_memory=PREFIX_MEMORY)
    lines = ["Name a fruit.", "And another.", "", "/reset", "Name a fruit.", "/quit", "ignored"]
    flags = ("--system", "Be brief.", "--temperature", 2.5, "--seed", 9)
    code, out, _ = chat(command, monkeypatch, lines, *flags)
    messages, answers = [{"role": "system", "content": "Be brief."}], []
    for number, text in enumerate(lines[:2]):
        messages.append({"role": "user", "content": text})
        ids = chat_prompt(messages, engine.tokenizer)
        params = SamplingParams(max_new_tokens=12, temperature=2.5, seed=9 + number)
        (answer,) = engine.generate([ids], params)
        messages.append({"role": "assistant", "content": answer.text})
        answers.append(answer.text + "\n")
    histories = messages[:2], messages + messages[1:2]
    prompts = [chat_prompt(history, engine.tokenizer) for history in histories]
    reset, remembered = (engine.generate([p], replace(params, seed=11))[0] for p in prompts)
    assert code == 0 and out == "".join([*answers, reset.text + "\n"])
    assert reset.text != remembered.text, "or the test could not fail"


def test_chat_continues_after_a_prompt_that_is_too_long(command, monkeypatch):
    code, out, _ = chat(command, monkeypatch, ["word " * 900, "Name a fruit."])
    assert code == 0 and "too many" in out and "/reset" in out
    engine = Engine(load_model(TINY), load_tokenizer(TINY))
    assert out.endswith(expected(engine, "Name a fruit.") + "\n")
