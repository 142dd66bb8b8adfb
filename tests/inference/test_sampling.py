"""Sampling: the distribution that tokens are drawn from is the one that was asked for."""

import math
import random

import pytest
import torch

from alpaca.common.cli import Parser
from alpaca.common.errors import UserError
from alpaca.inference.sampling import (
    GREEDY,
    SamplingParams,
    add_sampling_arguments,
    draw,
    penalize_repetition,
    sample,
    sampling_from_args,
)

LOGITS = torch.tensor([2.0, 0.5, 1.2, -1.0, 0.0, 1.9, -3.0, 0.4])
DRAWS = 20_000
ALMOST_1 = 1 - 2**-53


def definition(params: SamplingParams) -> list[float]:
    """The probabilities as the papers define them, in plain Python."""
    weights = [math.exp(x / params.temperature) for x in LOGITS.tolist()]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: -p[i])[: params.top_k or len(p)]
    total, nucleus = sum(p[i] for i in order), []
    for i in order:
        if sum(p[j] for j in nucleus) >= params.top_p * total and params.top_p < 1:
            break
        nucleus.append(i)
    mass = sum(p[i] for i in nucleus)
    return [p[i] / mass if i in nucleus else 0.0 for i in range(len(p))]


def chi_square(params: SamplingParams, expected: list[float]) -> tuple[float, int]:
    """How far the counts of many draws are from the expected, and the degrees of freedom."""
    uniforms = [random.Random(seed).random() for seed in range(DRAWS)]  # as sequences draw them
    tokens = sample(LOGITS.expand(DRAWS, -1), [params] * DRAWS, uniforms)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    assert all(counts[i] == 0 for i, p in enumerate(expected) if p == 0), "a filtered token"
    terms = [(n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in zip(counts, expected, strict=True) if p]
    return sum(terms), len(terms) - 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.5),
        SamplingParams(0.7, top_k=1),
        SamplingParams(1.0, top_k=3),
        SamplingParams(1.5, top_p=0.9),
        SamplingParams(1.2, top_k=5, top_p=0.7),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}",
)
def test_sample_follows_the_definition(params):
    statistic, freedom = chi_square(params, definition(params))
    # the 99.9th percentile of chi-square, by Wilson and Hilferty
    v = 2 / (9 * max(freedom, 1))
    assert statistic <= freedom * (1 - v + 3.09 * math.sqrt(v)) ** 3


def test_chi_square_notices_a_wrong_temperature():
    assert chi_square(SamplingParams(1.1), definition(SamplingParams(1.0)))[0] > 30


def test_temperature_0_is_greedy_and_a_small_one_nearly():
    logits = torch.randn(50, 1000) * 10
    greedy = sample(logits, [GREEDY] * 50, [0.999] * 50)
    assert torch.equal(greedy, logits.argmax(-1))
    for small in (1e-6, 1e-308):
        assert torch.equal(sample(logits, [SamplingParams(small)] * 50, [0.999] * 50), greedy)


def test_smallest_and_largest_uniform_give_a_token():
    """u = 0 is the first token with any probability, u just below 1 the last."""
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for params in (SamplingParams(1.0), SamplingParams(1.0, top_p=0.999)):
        assert {sample(logits, [params], [u]).item() for u in (0.0, ALMOST_1)} == {1, 2}
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)  # a product that rounds up to 1:
    assert draw(p, torch.ones(1, 1, dtype=torch.float64)).item() == 1


def test_sequences_do_not_depend_on_each_other():
    """Even where one needs the whole vocabulary sorted and its neighbour does not."""
    flat = (torch.randn(5000) * 0.01).bfloat16().float()  # with ties
    steep = (torch.randn(5000) * 5).bfloat16().float()
    logits = torch.stack([flat, steep, flat, steep, steep])
    params = [
        SamplingParams(1.0, top_p=0.95),
        SamplingParams(0.8, top_p=0.9),
        SamplingParams(1.0),
        GREEDY,
        SamplingParams(2.0, top_k=7, top_p=0.99),
    ]
    for seed in range(40):
        uniforms = [random.Random(seed * 10 + i).random() for i in range(5)]
        each = zip(logits.split(1), params, uniforms, strict=True)
        alone = [sample(row, [one], [u]).item() for row, one, u in each]
        assert sample(logits, params, uniforms).tolist() == alone


@pytest.mark.parametrize(
    ("scale", "k", "top_p"),
    [(1, 0, 0.9), (9, 0, 0.7), (9, 2000, 0.87), (9, 3000, 0.85), (9, 1024, 0.5), (9, 5999, 0.9)],
)
def test_nucleus_of_a_large_vocabulary_is_exact(scale, k, top_p):
    """All of the nucleus and nothing else, though only 1,024 candidates are looked at first."""
    logits = torch.linspace(0, scale, 6000)[None]  # rising: 5,999 is the likeliest token
    p = logits[0].double().softmax(-1).flip(0)[: k or 6000]
    size = int((p.cumsum(-1) < top_p * p.sum()).sum()) + 1
    params = [SamplingParams(1.0, top_k=k, top_p=top_p), SamplingParams(1.0, top_p=0.99)]
    for batch in (logits, torch.cat([logits, torch.zeros(1, 6000)])):
        B = len(batch)
        assert sample(batch, params[:B], [ALMOST_1] * B)[0].item() == 6000 - size
        assert sample(batch, params[:B], [0.0] * B)[0].item() == 5999


def test_repetition_penalty_is_the_papers():
    logits, seen = torch.tensor([2.0, -1.0, 0.5, -0.25]), torch.tensor([0, 1])
    assert penalize_repetition(logits, 2.0, seen).tolist() == [1.0, -2.0, 0.5, -0.25]
    assert logits.tolist() == [2.0, -1.0, 0.5, -0.25]


def test_sampling_arguments_become_params():
    parser = Parser()
    add_sampling_arguments(parser)
    assert sampling_from_args(parser.parse_args([])) == SamplingParams()
    flags = "--temperature 0.9 --top-k 50 --top-p 0.8 --repetition-penalty 1.3 --seed 3"
    flags += " --max-new-tokens 7 --stop a --stop b"
    expected = SamplingParams(0.9, 50, 0.8, 1.3, 3, 7, ("a", "b"))
    assert sampling_from_args(parser.parse_args(flags.split())) == expected


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "temperature": [-0.1, math.nan, math.inf], "top_k": [-1], "top_p": [0.0, 1.1],
        "repetition_penalty": [0.0], "seed": [-1], "stop": ["text", ("",)],
        "max_new_tokens": [0], "logprobs": [-1],
    }.items(),
)  # fmt: skip
def test_params_name_a_wrong_value(field, values):
    for value in values:
        with pytest.raises(UserError, match=field):
            SamplingParams(**{field: value})
