"""Decoding on a Mac's GPU, as far as helpers/mps.py simulates it; nothing was run on one."""

import pytest
import torch
from helpers.commands import ROOT, assert_refused
from helpers.mps import FakeMps
from torch.torch_version import TorchVersion

from alpaca.capability.loglikelihood import Choices, log_likelihoods
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams, sample
from alpaca.inference.watermark import Watermark
from alpaca.weights.loading import load_model, optimize_layout
from tokenizer import load_tokenizer

BASE = ROOT / "data/tiny-llama"
GREEDY = SamplingParams(max_new_tokens=6)
PARAMS = [
    SamplingParams(max_new_tokens=4, repetition_penalty=1.3, logprobs=2),
    SamplingParams(max_new_tokens=4, temperature=0.9, seed=1),
    SamplingParams(max_new_tokens=4, temperature=0.9, top_k=40, top_p=0.9),
]


def answers(device: str, bits: int) -> tuple:
    model = load_model(BASE, bits=bits, device=device, dtype=torch.float32)
    tokenizer = load_tokenizer(BASE)
    if device == "mps":
        model = optimize_layout(model)
    assert model.model.norm.weight.device.type == device
    marking = Engine(model, tokenizer, 2, 64, watermark=Watermark(model.config.vocab_size))
    prompts = [tokenizer.encode(text, bos=True) for text in ("One two three", "The red fox")]
    found = [s.ids for params in PARAMS for s in marking.generate(prompts, params)]
    engine = Engine(model, tokenizer, 1, 64, prefix_memory=1 << 20)
    repeated = tokenizer.encode("a b c d a b c d a b c", bos=True)  # to guess from
    found += [engine.generate([[*repeated, n]], GREEDY)[0].ids for n in (5, 6)]
    choices = [Choices(prompt, [[5], [6, 7]]) for prompt in prompts]
    scores = dict(log_likelihoods(model, choices, prompts[0][:1]))
    return found, scores[0] + scores[1]


@pytest.mark.robust
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_answers_are_those_of_the_cpu(bits):
    with FakeMps():
        found, scores = answers("mps", bits)
    assert (found, pytest.approx(scores, rel=1e-4)) == answers("cpu", bits)


def test_simulated_gpu_refuses_what_a_real_one_does():
    with FakeMps() as mps:
        x = torch.ones(3, device="mps")
        assert x.is_mps and mps.has(x[1:] + 1) and not mps.has(x.cpu()) and not torch.ones(2).is_mps
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.tensor([1.0], dtype=torch.float64, device=x.device)
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        tokens = sample(torch.zeros(1, 9, device="mps"), PARAMS[1:2], [0.5])
        assert tokens.is_mps and tokens.tolist() == [4]


def test_missing_gpu_and_old_torch_are_refused(command, monkeypatch):
    words = ("generate", "--model-dir", BASE, "--device", "mps", "Name a color.")
    assert_refused(command(*words), "--device mps: torch finds no such GPU here")
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))
    assert_refused(command(*words), "--device mps needs torch 2.13")
