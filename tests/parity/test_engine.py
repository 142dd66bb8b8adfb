"""Greedy decoding against transformers' generate."""

import torch
from helpers.decoding import TOKENIZER, prompts_of
from helpers.models import hf_model, small_config
from helpers.parity import apart

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import load_model


def test_greedy_tokens_are_those_of_transformers_generate(tmp_path):
    theirs = hf_model(small_config(vocab_size=1024))
    theirs.save_pretrained(tmp_path)
    engine = Engine(load_model(tmp_path), TOKENIZER, max_batch_size=3)
    prompts = prompts_of(5, 12, 23)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=30))
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    for prompt, answer in zip(prompts, answers, strict=True):
        out = theirs.generate(torch.tensor([prompt]), **options)
        expected = out[0, len(prompt) :].tolist()
        assert len(answer.ids) == len(expected)
        differing = sum(a != b for a, b in zip(answer.ids, expected, strict=True))
        apart("greedy tokens that differ: transformers' generate", differing, 0)
