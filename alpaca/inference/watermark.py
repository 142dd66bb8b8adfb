"""A watermark in sampled text, and the detector that finds it without the model.

    alpaca watermark --tokenizer data/tokenizer.model README.md

Each token seeds a generator that puts a share gamma of the vocabulary on a green list for the token
after it. During generation, delta is added to the logits of green tokens. A detector with the same
key builds the same lists, counts g green ones among T tokens, and tells how many standard
deviations that is above chance:

    z = (g - gamma T) / sqrt(T gamma (1 - gamma))

Text without the watermark has z of mean 0 and standard deviation 1: z > 4 happens once in 30,000.
If all tokens are equally likely to the model, the green ones get the share

    gamma e^delta / (1 - gamma + gamma e^delta)        71 % for gamma 0.25 and delta 2

of the probability, and z grows as sqrt(T). If the model is more certain, it is at least this share
times the spike entropy of its distribution (theorem 4.2): 1 if uniform, here 0.35 if one-hot.

The lists equal those of `simple_1` in github.com/jwkirchenbauer/lm-watermarking and of `lefthash`
in transformers on a CPU, so each detector finds the other's text. The key is the only secret, and
the default key is public: with it anybody can detect, remove or forge the watermark.

Kirchenbauer et al., "A Watermark for Large Language Models": arXiv:2301.10226.
"""

import argparse
import json
import math
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.common.files import read_text
from alpaca.common.gguf_file import is_gguf
from alpaca.weights.checkpoint import read_config
from tokenizer import load_tokenizer

KEY = 15485863
THRESHOLD = 4.0  # a text with a larger z is called watermarked
CACHE_BYTES = 2**27  # of green lists, one bit per token: enough for all 32,000 lists of LLaMA


class Watermark:
    """`vocab_size` is the width of the model's logits, even if the tokenizer has fewer tokens."""

    def __init__(self, vocab_size: int, gamma: float = 0.25, delta: float = 2.0, key: int = KEY):
        self.vocab_size, self.gamma, self.delta, self.key = vocab_size, gamma, delta, key
        some = 1 <= vocab_size * gamma <= vocab_size - 1
        problems = {
            f"gamma {gamma} must make some of {vocab_size} tokens green, but not all": not some,
            "delta must be above 0: it is what marks the text": not 0 < delta < math.inf,
            "key must be above 0 and below 2**32": not 0 < key < 2**32,
            # the generator uses 32 bits of key · token: two tokens would share a list
            "key has too many factors of 2": vocab_size * math.gcd(key, 2**32) > 2**32,
        }
        for problem, found in problems.items():
            if found:
                raise UserError(problem)
        self.cached_lists = min(vocab_size, CACHE_BYTES // math.ceil(vocab_size / 8))
        self.green_list = lru_cache(self.cached_lists)(self.make_green_list)

    def make_green_list(self, previous: int) -> bytes:
        """A bit per token, the lowest of each byte first: is it green after `previous`?"""
        generator = torch.Generator().manual_seed(self.key * previous)  # not shared by threads
        permutation = torch.randperm(self.vocab_size, generator=generator, device="cpu")
        green = np.zeros(self.vocab_size, bool)
        green[permutation[: int(self.vocab_size * self.gamma)].numpy()] = True
        return np.packbits(green, bitorder="little").tobytes()

    def bias(self, logits: Tensor, ids: Tensor) -> Tensor:
        """A copy of logits (B, V) with delta added where green after the last id of ids (B, T).

        The logits may be fewer than the vocabulary, if those without a token were cut off."""
        B, width = logits.shape
        if width > self.vocab_size:
            raise UserError(f"{width} logits, but green lists for {self.vocab_size} tokens")
        lists = np.frombuffer(b"".join(map(self.green_list, ids[:, -1].tolist())), np.uint8)
        # four times faster than shifts and masks in torch
        green = np.unpackbits(lists.reshape(B, -1), axis=1, count=width, bitorder="little")
        return logits.add(torch.from_numpy(green).to(logits.device), alpha=self.delta)

    def is_green(self, previous: int, token: int) -> bool:
        return bool(self.green_list(previous)[token >> 3] >> (token & 7) & 1)

    def pairs(self, ids: list[int]) -> list[tuple[int, int]]:
        ids = [int(token) for token in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"ids {min(ids)} to {max(ids)}, but {self.vocab_size} tokens")
        return list(pairwise(ids))

    def green_mask(self, ids: list[int]) -> list[bool]:
        """For each token after the first: is it green?"""
        return [self.is_green(*pair) for pair in self.pairs(ids)]

    def detect(self, ids: list[int]) -> dict[str, float]:
        """z, its one-sided p-value (normal approximation), and the counts behind them.

        A pair of tokens counts once, however often it occurs. The prompt is not needed. BOS counts
        like any other token, so leave it out."""
        pairs = sorted(set(self.pairs(ids)))  # sorted: each green list is built once
        if not pairs:
            raise UserError(f"a text of {len(ids)} tokens: two are needed to show a watermark")
        green, scored = sum(self.is_green(*pair) for pair in pairs), len(pairs)
        z = (green - self.gamma * scored) / math.sqrt(scored * self.gamma * (1 - self.gamma))
        p = math.erfc(z / math.sqrt(2)) / 2
        return {"z": z, "p": p, "green": green, "scored": scored, "fraction": green / scored}

    def expected_z(self, scored: float, spike_entropy: float = 1.0) -> float:
        """The mean z of watermarked text; a lower bound on it if the spike entropy is below 1."""
        share = self.gamma / (self.gamma + (1 - self.gamma) * math.exp(-self.delta))
        excess = max(0.0, spike_entropy * share - self.gamma)
        return excess * math.sqrt(scored / (self.gamma * (1 - self.gamma)))

    def verdict(self, result: dict[str, float]) -> str:
        """The result of `detect` in words. A text too short to show a watermark gets no verdict."""
        mean = self.expected_z(result["scored"])
        typical = f"watermarked text of this length has z = {mean:.1f} on average"
        if mean < THRESHOLD:
            return f"too short to tell: {typical}, below the threshold {THRESHOLD:g}"
        if result["z"] > THRESHOLD:
            return f"watermarked: without a watermark this has probability {result['p']:.1g}"
        return f"no watermark found: {typical}, less if the model was sure of its words"


# ---------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="UTF-8 text without its prompt; - reads standard input")
    add("--tokenizer", type=Path, required=True, help="the model, or its tokenizer's file")
    add("--key", type=int, default=KEY, help=f"key of the watermark (default: {KEY})")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    is_model = (args.tokenizer / "config.json").exists() or is_gguf(args.tokenizer)
    source = read_config(args.tokenizer) if is_model else tokenizer  # it may have more embeddings
    watermark = Watermark(source.vocab_size, key=args.key)
    text = sys.stdin.read() if args.file == "-" else read_text(args.file)
    if not text.strip():
        raise UserError(f"{args.file}: no text in it")
    result = watermark.detect(tokenizer.encode(text))
    verdict = watermark.verdict(result)
    if args.json:
        return print(json.dumps({**result, "verdict": verdict}))
    print(f"z        {result['z']:.2f}")
    print(f"p-value  {result['p']:.2g}")
    print(f"green    {result['fraction']:.1%} of the tokens, {watermark.gamma:.1%} by chance")
    print(f"scored   {result['scored']} tokens, repeated pairs once")
    print(verdict)
