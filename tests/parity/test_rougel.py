"""ROUGE-L equals the rouge_score package's, in every bit."""

import random

import pytest
from helpers.parity import apart
from hypothesis import given, settings
from hypothesis import strategies as st

from rougel import Pool, rouge_l, tokenize

reason = "the package rouge_score is not installed"
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=reason)

few_words = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)
lengths = st.sampled_from([0, 1, 5, 63, 64, 65, 127, 128, 129, 200])


def peer(a: str, b: str) -> float:
    return rouge_scorer._score_lcs(tokenize(a), tokenize(b)).fmeasure


@given(st.text(max_size=80))
def test_tokenize_equals_rouge_score(text):
    peer = rouge_scorer.tokenizers.DefaultTokenizer(use_stemmer=False)
    assert tokenize(text) == peer.tokenize(text)


def test_rouge_l_equals_the_public_scorer():
    a, b = "Name three ways to cook an egg.", "List three ways to poach the egg!"
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    assert rouge_l(a, b) == scorer.score(a, b)["rougeL"].fmeasure == 8 / 14


@given(few_words, few_words)
def test_rouge_l_equals_rouge_score(a, b):
    apart("ROUGE-L of a pair: rouge_score", abs(rouge_l(a, b) - peer(a, b)), 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(few_words, max_size=20), few_words)
def test_pool_equals_rouge_score(texts, candidate):
    for score, text in zip(Pool(texts).scores(candidate), texts, strict=True):
        apart("ROUGE-L of a text with a pool: rouge_score", abs(score - peer(candidate, text)), 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(lengths, max_size=6), lengths, st.integers(0, 2**32))
def test_pool_of_long_texts_equals_rouge_score(sizes, size, seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(rng.choice(["ab", "abcdefgh"]), k=count)) for count in sizes]
    candidate = " ".join(rng.choices("abcdef", k=size))
    assert Pool(texts).scores(candidate).tolist() == [peer(candidate, text) for text in texts]
