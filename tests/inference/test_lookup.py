"""Guessed tokens change no answer, and save steps where an answer repeats its prompt."""

from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.decoding import TOKENIZER, new_model, prompts_of

from alpaca.inference import lookup
from alpaca.inference.engine import Engine
from alpaca.inference.lookup import PromptLookup
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.watermark import Watermark
from model import Decoder, Llama

PARAMS = [
    SamplingParams(max_new_tokens=60),
    SamplingParams(max_new_tokens=60, temperature=0.7, seed=3),
    SamplingParams(max_new_tokens=60, temperature=1.0, top_k=3, seed=4, logprobs=2),
    SamplingParams(max_new_tokens=60, repetition_penalty=1.05, stop=("e",)),
    SamplingParams(max_new_tokens=7),
]


@torch.no_grad()
def repeating_model() -> Llama:
    """With few likely tokens and little attention, its answers run in circles."""
    model = new_model(max_position_embeddings=200)
    model.lm_head.weight[16:] *= 0.1
    model.lm_head.weight[TOKENIZER.eos_id] = 0
    for block in model.model.layers:
        block.self_attn.o_proj.weight.mul_(0.02)
    return model


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("watermark", [None, Watermark(1024)])
def test_guesses_change_no_token(monkeypatch, params, watermark):
    model, prompts, calls = repeating_model(), prompts_of(5, 30, 150), []
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "guess", lambda self: [])
        engine = Engine(model, TOKENIZER, watermark=watermark)
        expected = [engine.generate([p], params)[0] for p in prompts]
    forward = Decoder.forward

    def spy(self, ids, *rest, **named):
        calls.append(ids.shape[1])
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(Decoder, "forward", spy)
    engine = Engine(model, TOKENIZER, watermark=watermark)
    found = [engine.generate([p], params)[0] for p in prompts]
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.text) == (other.ids, other.text)
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    if params is PARAMS[0] and not watermark:
        assert 8 in calls[1:] and len(calls) < 0.7 * sum(len(one.ids) for one in found)


def test_rejected_guesses_leave_nothing_in_the_cache(monkeypatch):
    """Every guess is wrong, and of the greatest length."""
    model, prompts = repeating_model(), prompts_of(5, 40)
    expected = [answer.ids for answer in Engine(model, TOKENIZER, 2).generate(prompts)]
    monkeypatch.setattr(PromptLookup, "guess", lambda self, ids, limit: [3] * min(limit, 15))
    engine = Engine(model, TOKENIZER)
    assert [engine.generate([p])[0].ids for p in prompts] == expected


def test_lookup_proposes_what_followed_the_latest_occurrence():
    found = PromptLookup([1, 2, 3, 4, 2, 3, 5, 6, 7, 2])
    assert found.guess([], 9) == [], "7 2 is new"
    assert found.guess([3], 9) == [5, 6, 7] and found.guess([3], 2) == [5, 6]
    assert found.guess([3, 4], 9) == [2, 3, 5] and found.guess([3, 4, 4], 9) == []
    assert PromptLookup([1]).guess([], 9) == PromptLookup([1]).guess([7], 9) == []
    assert PromptLookup([1]).guess([7, 7, 7], 9) == [7] * 3, "what follows may overlap"


def test_guesses_grow_when_right_and_pause_when_wrong():
    found, text = PromptLookup([*range(100)]), [*range(3)]
    lengths = []
    for _ in range(4):
        lengths.append(len(found.guess(text, 50)))
        text = [*range(len(text) + lengths[-1])]
        found.learn(text, all_right=True, saved=True)
    assert lengths == [3, 7, 15, 15]
    found, tried = PromptLookup([5] * 10), []
    for length in range(3, 90):
        if found.guess([5] * length, 50):
            tried.append(length)
            found.learn([5] * length, all_right=False, saved=False)
    gaps = [b - a for a, b in pairwise(tried)]
    assert gaps == [1, 2, 4, 8, 16, 32] and lookup.LONGEST_PAUSE == 32


@pytest.mark.parametrize(("wrong", "pause"), [(True, 32), (False, 1)])
def test_guesses_pause_unless_they_save_time(monkeypatch, wrong, pause):
    """By a clock in which a pass takes as long as a step: one right token saves half of it."""
    ticks, guess = count(), PromptLookup.guess
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr("alpaca.inference.engine.time", clock)
    if wrong:
        monkeypatch.setattr(PromptLookup, "guess", lambda *args: [9 for _ in guess(*args)])
    engine = Engine(repeating_model(), TOKENIZER)
    sequence = engine.add(prompts_of(30)[0], SamplingParams(max_new_tokens=120))
    engine.finish([sequence])
    assert sequence.lookup.pause == pause
