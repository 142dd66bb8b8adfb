"""ROUGE-L of a pair and of a pool, against the textbook table of the LCS."""

import doctest
import random

import numpy as np
import pytest

import rougel
from rougel import WORD, Pool, most_similar, rouge_l, tokenize, tokenize_unicode


def textbook(a: str, b: str) -> float:
    """The F-measure by the table of len(a) x len(b) entries."""
    a, b = tokenize(a), tokenize(b)
    above = [0] * (len(b) + 1)
    for token in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if token == other else max(above[j + 1], row[j]))
        above = row
    p, r = above[-1] / max(len(b), 1), above[-1] / max(len(a), 1)
    return 2 * p * r / (p + r) if above[-1] else 0.0


def words(rng: random.Random, count: int, vocabulary="abcdef") -> str:
    return " ".join(rng.choices(vocabulary, k=count))


def test_worked_example_of_the_docstring_holds():
    assert doctest.testmod(rougel) == (0, 2)


@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 5, 12, 12), (31, 32, 33, 2), (63, 64, 65, 127, 128, 129, 200, 3), (9, 300, 12, 0, 200)],
)
def test_pair_and_pool_equal_the_textbook(sizes):
    rng = random.Random(len(sizes))
    for vocabulary in ("ab", "abcdefgh", [f"w{i}" for i in range(400)]):
        texts = [words(rng, size, vocabulary) for size in sizes]
        for candidate in (words(rng, rng.choice(sizes), vocabulary), texts[1], texts[-1], "a w1"):
            expected = [textbook(candidate, text) for text in texts]
            assert Pool(texts).scores(candidate).tolist() == expected
            assert [rouge_l(candidate, text) for text in texts] == expected


def test_pool_carries_through_all_lanes_of_one_token():
    pool = Pool(["a " * (4 * WORD + 3), "a " * WORD, "a"])
    for size in (1, WORD, WORD + 1, 300):
        assert pool.lcs(["a"] * size).tolist() == [min(size, 4 * WORD + 3), min(size, WORD), 1]


def test_pool_equals_pairs_for_tokens_in_a_third_of_the_lanes():
    rng = random.Random(1)
    sizes = [6] * 1100 + [70] * 1100 + [40] * 9 + [6] * 9 + [0]
    texts = [words(rng, size, "abcdeeefghij") for size in sizes]
    pool = Pool(texts)
    assert len(pool.layers) == 3
    for layer in pool.layers:
        assert None in [lanes for lanes, _ in layer.masks.values()]
    for candidate in (words(rng, 10), words(rng, 70), "e " * 80, texts[-2]):
        assert pool.scores(candidate).tolist() == [rouge_l(candidate, text) for text in texts]


def test_score_at_the_threshold_rounds_as_rouge_score_does():
    """F is 0.7 in exact arithmetic; an instruction is dropped if the rounded F is above it."""
    shapes = {(10, 10, 7): False, (20, 20, 14): False, (12, 8, 7): True, (33, 27, 21): True}
    for (m, n, common), above in shapes.items():
        a = " ".join(f"w{i}" for i in range(m))
        b = " ".join(f"w{i}" if i < common else f"v{i}" for i in range(n))
        assert Pool([b]).scores(a)[0] == rouge_l(a, b)
        assert (rouge_l(a, b) > 0.7) == above


def test_pool_grown_text_by_text_equals_one_made_at_once():
    rng = random.Random(2)
    texts = [words(rng, rng.randint(0, 90)) for _ in range(60)]
    grown = Pool()
    for number, text in enumerate(texts):
        assert len(grown) == number
        assert grown.scores(text).tolist() == Pool(texts[:number]).scores(text).tolist()
        grown.add(text)


def test_text_without_tokens_scores_zero():
    pool = Pool(["", "!?", "cat", "猫"])
    assert pool.scores("…").tolist() == [0] * 4
    assert pool.scores("cat").tolist() == [0, 0, 1, 0]
    assert rouge_l("", "") == rouge_l("cat", "") == 0 and len(Pool().scores("cat")) == 0


def test_most_similar_are_the_best_and_earliest_first():
    scores = Pool(["a b c", "x", "a b", "a b c", "a"]).scores("a b c")
    assert most_similar(scores, 3) == [(0, 1.0), (3, 1.0), (2, 0.8)]
    assert [index for index, _ in most_similar(scores, 99)] == [0, 3, 2, 4, 1]
    assert most_similar(scores, 0) == most_similar(scores[:0], 3) == []
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.integers(0, 5, 40) / 4
        order = sorted(range(40), key=lambda index: (-scores[index], index))
        assert [index for index, _ in most_similar(scores, 7)] == order[:7]


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
def test_tokenize_unicode_reads_other_scripts(text, tokens):
    assert tokenize_unicode(text) == tokens
    assert rouge_l(text, text, tokenize_unicode) == 1.0
    assert Pool([text], tokenize_unicode).scores(text).tolist() == [1.0]
    assert Pool([text]).scores(text)[0] in (0.0, 1.0)  # the default tokenizer drops other scripts


def test_tokenize_unicode_of_ascii_equals_its_slow_path():
    for code in range(128):
        text = f"An {chr(code)} a{chr(code)}b 7"
        assert tokenize_unicode(text) == tokenize_unicode(f"{text} é")[:-1], code
