"""ROUGE-L of one text against a whole pool, exactly, in a fraction of a millisecond.

    tokenize("The Cat!")          ["the", "cat"]: runs of a-z and 0-9, as rouge_score has them
    rouge_l(a, b)                 F = 2pr / (p + r) of their longest common subsequence (LCS)
    pool = Pool(texts)            pool.scores(text)[i] == rouge_l(text, texts[i]), for every i
    pool.nearest(text, 10)        the ten most alike: [(number in the pool, score), ...]

The textbook table for the LCS of a and b costs len(a) * len(b) steps. Bits hold a whole row of it:
bit j of V says "the LCS does not grow at a[j]". V starts as all ones, and for each token of b, with
M the bits where a has that token,

    V  =  (V + (V & M))  |  (V & ~M)

A one of M starts a carry which runs up through V's ones and stops in the first zero; that is how a
match moves the row's next step down to it. In the end the zeros of V are the length of the LCS
(Hyyrö 2004, "Bit-parallel LCS-length computation revisited"; Crochemore et al. 2001).

`Pool` does this for all its texts at once: a text is a lane, a 64-bit word of one numpy array, and
a token of the candidate updates just the lanes that contain it (where M is 0, V stays). A text of
more than 64 tokens goes on in a lane of the next layer, which takes over the carry.

Memory: 16 bytes for each distinct token of each text, and a vocabulary: 12 to 15 MB for 52,000
instructions of Alpaca's kind, the texts themselves apart.

Shown by tests/test_rougel.py: test_a_pool_has_every_pair_s_f_measure_to_the_bit.
"""

import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

WORD = 64  # bits of a lane
ONES = np.uint64(2**WORD - 1)
TINY = np.finfo(float).tiny
NOWHERE = (np.zeros(0, np.int64), np.zeros(0, np.uint64))


def tokenize(text: str) -> list[str]:
    """rouge_score's tokens (without stemming). All that is not Latin is lost here."""
    return re.findall("[a-z0-9]+", text.lower())


def tokenize_unicode(text: str) -> list[str]:
    """Words of any script; a token a character where words are written without spaces between."""
    spaced = "".join(map(_spaced, unicodedata.normalize("NFKC", text).casefold()))
    return spaced.split()


@lru_cache(maxsize=1 << 16)
def _spaced(character: str) -> str:
    """The character, among spaces if it is a token, a space if it belongs to none."""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    name = unicodedata.name(character, "").split(" ", 1)[0]
    alone = name in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return f" {character} " if alone and unicodedata.category(character)[0] == "L" else character


def rouge_l(a: str, b: str, tokenize: Callable[[str], list[str]] = tokenize) -> float:
    """The F-measure of two texts: the recurrence above on one Python integer, of any length."""
    a, b = tokenize(a), tokenize(b)
    if not a or not b:
        return 0.0
    bits = positions(a)
    row = ones = (1 << len(a)) - 1
    for token in b:
        match = row & bits.get(token, 0)
        row = (row + match | row - match) & ones  # row - match is row & ~bits, without borrowing
    common = len(a) - row.bit_count()
    p, r = common / len(b), common / len(a)
    return 2 * p * r / (p + r) if common else 0.0


def positions(tokens: list[str]) -> dict[str, int]:
    """Which bits each token has: bit j for the j-th token."""
    bits: dict[str, int] = {}
    for place, token in enumerate(tokens):
        bits[token] = bits.get(token, 0) | 1 << place
    return bits


def zeros(row: np.ndarray) -> np.ndarray:
    """How many zeros each lane has."""
    return np.bitwise_count(~row)


class Layer:
    """Tokens 64 k to 64 k + 63 of every text that is so long: a lane for each such text."""

    def __init__(self):
        self.texts = array("i")  # whose lane it is
        self.goes_on = array("i")  # lanes of texts that have one in the next layer too
        self.found: dict[str, tuple[array, array]] = {}  # token -> lanes with it, its bits there

    def add(self, text: int, tokens: list[str], goes_on: bool) -> None:
        lane = len(self.texts)
        for token, mask in positions(tokens).items():
            lanes, masks = self.found.setdefault(token, (array("q"), array("Q")))
            lanes.append(lane)
            masks.append(mask)
        self.texts.append(text)
        if goes_on:
            self.goes_on.append(lane)

    def advance(self, row: np.ndarray, token: str, carry: np.ndarray | None) -> np.ndarray | None:
        """The recurrence, in the lanes that have the token. `carry`, 0 or 1 for every lane, comes
        from the layer before; what is returned goes to the next. (A lane has one zero more for a
        carry out and one less for a carry in.)"""
        goes_on = np.asarray(self.goes_on)
        before = zeros(row[goes_on]) if self.goes_on else None
        lanes, masks = map(np.asarray, self.found.get(token, NOWHERE))
        if carry is None:
            old = row.take(lanes)
            match = old & masks
            total = old + match
            row[lanes] = np.bitwise_or(total, np.subtract(old, match, out=old), out=old)
        else:
            match = np.zeros_like(row)
            match[lanes] = row[lanes] & masks
            row[:] = (row + match + carry) | (row - match)
        if before is None:
            return None
        out = zeros(row[goes_on]).astype(np.int8) - before
        out = out if carry is None else out + carry[goes_on]
        return out.astype(np.uint64) if out.any() else None


class Pool:
    """Texts to compare a candidate with, all at once. Adding is incremental."""

    def __init__(self, texts: Iterable[str] = (), tokenize: Callable[[str], list[str]] = tokenize):
        self.tokenize = tokenize
        self.texts: list[str] = []
        self.lengths = array("q")
        self.layers = [Layer()]
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        tokens = self.tokenize(text)
        for number, start in enumerate(range(0, max(len(tokens), 1), WORD)):
            if number == len(self.layers):
                self.layers.append(Layer())
            goes_on = start + WORD < len(tokens)
            self.layers[number].add(len(self.texts), tokens[start : start + WORD], goes_on)
        self.texts.append(text)
        self.lengths.append(len(tokens))

    def common(self, tokens: list[str]) -> np.ndarray:
        """Length of the longest common subsequence with each text of the pool."""
        rows = [np.full(len(layer.texts), ONES) for layer in self.layers]
        for token in tokens:
            carry = None
            for layer, row in zip(self.layers, rows, strict=True):
                if carry is not None or token in layer.found:
                    carry = layer.advance(row, token, carry)
        common = zeros(rows[0]).astype(np.int64)
        for layer, row in zip(self.layers[1:], rows[1:], strict=True):
            common[np.asarray(layer.texts)] += zeros(row)
        return common

    def scores(self, text: str) -> np.ndarray:
        """ROUGE-L of the text with each text of the pool."""
        tokens = self.tokenize(text)
        common = self.common(tokens)
        p = common / max(len(tokens), 1)
        r = common / np.maximum(self.lengths, 1)
        f = 2 * p
        f *= r
        p += r
        f /= np.maximum(p, TINY, out=p)  # nothing in common: 0 / TINY
        return f

    def nearest(self, text: str, k: int) -> list[tuple[int, float]]:
        """The k texts most alike, best first, the earlier one first among equals."""
        return best(self.scores(text), k)


def best(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    """The k highest scores as (place, score), best first, the earlier one first among equals."""
    k = min(k, len(scores))
    floor = np.partition(scores, len(scores) - k)[len(scores) - k] if k else np.inf
    places = np.flatnonzero(scores >= floor)
    order = places[np.argsort(-scores[places], kind="stable")][:k]
    return [(int(place), float(scores[place])) for place in order]
