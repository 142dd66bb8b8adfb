"""Compiled decoding gives the same tokens."""

import pytest
from helpers.decoding import TOKENIZER, new_model, plain_greedy, prompts_of

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams


@pytest.mark.slow
def test_compiled_decoding_is_the_same():
    model, prompts = new_model(num_hidden_layers=1), prompts_of(5, 9)
    expected = [plain_greedy(model, prompt, 8) for prompt in prompts]
    engine = Engine(model, TOKENIZER, max_batch_size=2, max_length=20, compile=True)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=8))
    assert [answer.ids for answer in answers] == expected
