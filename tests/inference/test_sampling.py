"""Choosing tokens: the distribution that is drawn from is the one that was asked for."""

import math
import random

import pytest
import torch

from alpaca.inference.sampling import GREEDY, SamplingParams, draw, penalize_repetition, sample

LOGITS = torch.tensor([2.0, 0.5, 1.2, -1.0, 0.0, 1.9, -3.0, 0.4])
DRAWS = 20_000


def definition(logits: torch.Tensor, way: SamplingParams) -> list[float]:
    """The probabilities, as the papers define them, in plain Python."""
    weights = [math.exp(x / way.temperature) for x in logits.tolist()]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: way.top_k or len(p)]
    total, kept = sum(p[i] for i in order), []
    for i in order:
        if sum(p[j] for j in kept) >= way.top_p * total and way.top_p < 1:
            break
        kept.append(i)
    mass = sum(p[i] for i in kept)
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


def chi_square(counts: list[int], expected: list[float]) -> tuple[float, int]:
    total, used = sum(counts), [i for i, p in enumerate(expected) if p > 0]
    assert all(counts[i] == 0 for i, p in enumerate(expected) if p == 0), "a filtered token came"
    statistic = sum((counts[i] - total * expected[i]) ** 2 / (total * expected[i]) for i in used)
    return statistic, len(used) - 1


@pytest.mark.parametrize(
    "way",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=0.7, top_k=1),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.5, top_p=0.9),
        SamplingParams(temperature=1.2, top_k=5, top_p=0.7),
        SamplingParams(temperature=1.0, top_k=100),
    ],
    ids=str,
)
def test_draws_follow_the_definition(way):
    numbers = [random.Random(seed).random() for seed in range(DRAWS)]  # as sequences draw them
    rows = LOGITS.expand(DRAWS, -1)
    chosen = sample(rows, [way] * DRAWS, numbers)
    counts = torch.bincount(chosen, minlength=len(LOGITS)).tolist()
    statistic, freedom = chi_square(counts, definition(LOGITS, way))
    # the 99.9th percentile of chi-square, by Wilson and Hilferty
    limit = (
        freedom * (1 - 2 / (9 * max(freedom, 1)) + 3.09 * math.sqrt(2 / (9 * max(freedom, 1)))) ** 3
    )
    assert statistic <= limit, (statistic, limit, counts)


def test_a_wrong_distribution_is_noticed():
    """The statistic has the power to tell temperature 1 from 1.1."""
    numbers = [random.Random(seed).random() for seed in range(DRAWS)]
    way = SamplingParams(temperature=1.1)
    chosen = sample(LOGITS.expand(DRAWS, -1), [way] * DRAWS, numbers)
    counts = torch.bincount(chosen, minlength=len(LOGITS)).tolist()
    assert chi_square(counts, definition(LOGITS, SamplingParams(temperature=1.0)))[0] > 30


def test_temperature_0_is_the_likeliest_and_a_small_one_nearly():
    rows = torch.randn(50, 1000) * 10
    greedy = sample(rows, [GREEDY] * 50, [0.999] * 50)
    assert torch.equal(greedy, rows.argmax(-1))
    cold = sample(rows, [SamplingParams(temperature=1e-6)] * 50, [0.999] * 50)
    assert torch.equal(cold, greedy)
    assert torch.equal(
        sample(rows * 1e4, [SamplingParams(temperature=1e-4)] * 50, [0.5] * 50), greedy
    )


def test_the_borders_of_the_number_drawn():
    """u = 0 is the first token with any probability, u just below 1 the last."""
    row = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    almost = 1 - 2**-53
    for way in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999)):
        assert {sample(row, [way], [u]).item() for u in (0.0, almost)} == {1, 2}


def test_a_product_rounded_up_to_the_whole_is_still_a_token():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert draw(p, torch.ones(1, 1, dtype=torch.float64)).item() == 1


def test_rows_do_not_depend_on_their_company():
    """Also where one row needs the whole vocabulary sorted and its neighbour does not."""
    flat = (torch.randn(5000) * 0.01).bfloat16().float()  # with ties
    steep = (torch.randn(5000) * 5).bfloat16().float()
    rows = torch.stack([flat, steep, flat, steep, steep])
    ways = [
        SamplingParams(temperature=1.0, top_p=0.95),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.0),
        GREEDY,
        SamplingParams(temperature=2.0, top_k=7, top_p=0.99),
    ]
    for seed in range(40):
        numbers = [random.Random(seed * 10 + i).random() for i in range(5)]
        together = sample(rows, ways, numbers).tolist()
        alone = [
            sample(rows[i : i + 1], ways[i : i + 1], numbers[i : i + 1]).item() for i in range(5)
        ]
        assert together == alone


def test_nothing_outside_a_large_nucleus_and_everything_inside():
    """A flat distribution's nucleus is wider than the candidates that are looked at first."""
    row = torch.linspace(0, 1, 4000)[None]
    way = SamplingParams(temperature=1.0, top_p=0.9)
    p = row[0].double().softmax(-1).sort(descending=True).values
    size = int((p.cumsum(-1) < 0.9).sum()) + 1
    lowest = sample(row, [way], [1 - 2**-53]).item()
    assert lowest == 4000 - size
    assert sample(row, [way], [0.0]).item() == 3999


@pytest.mark.parametrize(("k", "top_p"), [(2000, 0.87), (3000, 0.85), (1024, 0.5), (5999, 0.9)])
def test_top_k_beyond_the_candidates_with_top_p(k, top_p):
    """The share is of the k likeliest, however many are looked at first."""
    row = torch.linspace(0, 9, 6000)[None]
    p = row[0].double().softmax(-1).sort(descending=True).values[:k]
    size = int((p.cumsum(-1) < top_p * p.sum()).sum()) + 1
    way = SamplingParams(temperature=1.0, top_k=k, top_p=top_p)
    for rows in (row, torch.cat([row, torch.zeros(1, 6000)])):
        ways = [way, SamplingParams(temperature=1.0, top_p=0.99)][: len(rows)]
        lowest = sample(rows, ways, [1 - 2**-53] * len(rows))[0].item()
        assert lowest == 6000 - size


def test_repetition_penalty_is_the_papers():
    row, seen = torch.tensor([2.0, -1.0, 0.5, -0.25]), torch.tensor([0, 1])
    assert penalize_repetition(row, 2.0, seen).tolist() == [1.0, -2.0, 0.5, -0.25]
    assert row.tolist() == [2.0, -1.0, 0.5, -0.25]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": "text"}, "tuple"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_wrong_values_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        SamplingParams(**wrong)
