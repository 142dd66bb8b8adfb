"""ROUGE-L: equal to rouge_score's, for one text and for a whole pool at once."""

import random

import numpy as np
import pytest
from helpers.parity import apart
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from rougel import WORD, Pool, best, rouge_l, tokenize, tokenize_unicode

few_words = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)
lengths = st.sampled_from([0, 1, 5, 63, 64, 65, 127, 128, 129, 200])


def peer(a: str, b: str) -> float:
    return rouge_scorer._score_lcs(tokenize(a), tokenize(b)).fmeasure


def words(rng: random.Random, count: int, of: str = "abcdef") -> str:
    return " ".join(rng.choice(of) for _ in range(count))


@given(st.text(max_size=80))
def test_tokens_are_rouge_score_s(text):
    assert tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_the_public_scorer_of_rouge_score_agrees():
    a, b = "Name three ways to cook an egg.", "List three ways to poach the egg!"
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    assert rouge_l(a, b) == scorer.score(a, b)["rougeL"].fmeasure == 8 / 14


@pytest.mark.parity
@given(few_words, few_words)
def test_a_pair_has_rouge_score_s_f_measure_to_the_bit(a, b):
    apart("ROUGE-L of a pair: rouge_score", abs(rouge_l(a, b) - peer(a, b)), 0)


def test_alpaca_s_threshold_keeps_what_scores_exactly_0_7():
    """2l / (m + n) rounds to something above 0.7 for many shapes where 2pr / (p + r) does not."""
    for m, n, common in [(10, 10, 7), (20, 20, 14), (12, 8, 7), (33, 27, 21), (53, 47, 35)]:
        a = " ".join(f"w{i}" for i in range(m))
        b = " ".join(f"w{i}" if i < common else f"v{i}" for i in range(n))
        assert Pool([b]).scores(a)[0] == rouge_l(a, b) == peer(a, b)


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(st.lists(few_words, max_size=20), few_words)
def test_a_pool_has_every_pair_s_f_measure_to_the_bit(texts, candidate):
    for score, text in zip(Pool(texts).scores(candidate), texts, strict=True):
        apart("ROUGE-L of a text with a pool: rouge_score", abs(score - peer(candidate, text)), 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(lengths, max_size=6), lengths, st.integers(0, 2**32))
def test_carries_run_through_texts_of_many_lanes(sizes, size, seed):
    rng = random.Random(seed)
    texts = [words(rng, count, rng.choice(["ab", "abcdefgh"])) for count in sizes]
    candidate = words(rng, size)
    assert Pool(texts).scores(candidate).tolist() == [peer(candidate, text) for text in texts]


def test_one_token_again_and_again_carries_all_the_way():
    pool = Pool(["a " * (4 * WORD + 3), "a " * WORD, "a"])
    for size in (1, WORD, WORD + 1, 300):
        assert pool.common(["a"] * size).tolist() == [min(size, 4 * WORD + 3), min(size, WORD), 1]


def test_a_very_long_text_among_short_ones():
    rng = random.Random(1)
    vocabulary = [f"w{i}" for i in range(400)]
    texts = [words(rng, size, vocabulary) for size in (9, 1500, 12, 0, 700)]
    pool = Pool(texts)
    for candidate in (texts[1], words(rng, 300, vocabulary), texts[4], "w1 w2"):
        expected = [rouge_l(candidate, text) for text in texts]
        assert pool.scores(candidate).tolist() == expected
    assert pool.scores(texts[1])[1] == 1.0


def test_adding_one_by_one_is_the_same_as_all_at_once():
    rng = random.Random(2)
    texts = [words(rng, rng.randint(0, 90)) for _ in range(200)]
    grown = Pool()
    for number, text in enumerate(texts):
        assert len(grown) == number
        scores = grown.scores(text)
        assert (
            scores.shape == (number,)
            and scores.tolist() == Pool(texts[:number]).scores(text).tolist()
        )
        grown.add(text)


def test_what_has_no_token_scores_zero_and_not_nan():
    pool = Pool(["", "!?", "cat", "猫"])
    assert pool.scores("…").tolist() == [0] * 4
    assert pool.scores("cat").tolist() == [0, 0, 1, 0]
    assert rouge_l("", "") == rouge_l("cat", "") == 0 and len(Pool().scores("cat")) == 0


def test_nearest_are_the_best_first_and_the_earlier_among_equals():
    pool = Pool(["a b c", "x", "a b", "a b c", "a"])
    assert pool.nearest("a b c", 3) == [(0, 1.0), (3, 1.0), (2, 0.8)]
    assert [place for place, _ in pool.nearest("a b c", 99)] == [0, 3, 2, 4, 1]
    assert Pool().nearest("a", 3) == [] and pool.nearest("a", 0) == []
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.integers(0, 5, 40) / 4
        order = sorted(range(40), key=lambda place: (-scores[place], place))
        assert [place for place, _ in best(scores, 7)] == order[:7]


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("翻译这句话", list("翻译这句话")),
        ("東京へ行く", list("東京へ行く")),
        ("Sag's auf Deutsch: Äpfel!", ["sag", "s", "auf", "deutsch", "äpfel"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("Ｆｕｌｌ width, naïve", ["full", "width", "naïve"]),
        ("напиши 3 слова", ["напиши", "3", "слова"]),
        ("اكتب جملة", ["اكتب", "جملة"]),
    ],
)
def test_the_unicode_tokenizer_reads_other_scripts(text, tokens):
    assert tokenize_unicode(text) == tokens
    assert rouge_l(text, text, tokenize_unicode) == 1.0
    assert Pool([text], tokenize_unicode).scores(text).tolist() == [1.0]
    assert Pool([text]).scores(text)[0] in (0.0, 1.0)  # the default loses what is not Latin


def test_the_dedupe_of_a_pool_is_three_orders_faster_than_pair_by_pair():
    """A weak form of bench/dedupe.py's claim, which a busy machine cannot turn red."""
    import time

    rng = random.Random(3)
    vocabulary = [f"w{int(rng.paretovariate(0.6))}" for _ in range(3000)]
    texts = [words(rng, rng.randint(4, 18), vocabulary) for _ in range(20_000)]
    pool = Pool(texts)
    pool.scores(texts[0])
    start = time.perf_counter()
    for text in texts[:20]:
        pool.scores(text)
    ours = (time.perf_counter() - start) / 20
    tokens = [tokenize(text) for text in texts[:1000]]
    start = time.perf_counter()
    for one in tokens:
        rouge_scorer._score_lcs(tokens[0], one)
    theirs = (time.perf_counter() - start) * 20
    assert theirs > 300 * ours
