"""A watermark in the choice of words, and the detector that finds it without the model.

    alpaca watermark detect --tokenizer data/tokenizer.model README.md
    alpaca watermark power --out power.svg

Each token seeds a generator, which deals a share gamma of the vocabulary onto a green list for the
token that comes next. While text is made, green tokens get delta added to their logits. Who knows
the key deals the same lists again, finds g of T tokens green, and asks how far above chance it is:

    z = (g - gamma T) / sqrt(T gamma (1 - gamma))

Text that nobody marked has z around 0, with standard deviation 1: above 4 comes once in 30,000.
Where all tokens are equally likely to the model, the green ones get this share of the probability,

    gamma e^delta / (1 - gamma + gamma e^delta)        71 % for gamma 0.25 and delta 2

and z grows as sqrt(T). Where the model is sure of a token there is little to choose: the share is
then at least this one times the spike entropy of its distribution (theorem 4.2 of the paper), which
is 1 if all are equally likely and, for the same gamma and delta, 0.35 if only one is.

  - The lists are those of `simple_1` in github.com/jwkirchenbauer/lm-watermarking and `lefthash`
    in transformers, both on a CPU: their detectors find our text, and ours finds theirs. (On a GPU
    they deal other lists, with CUDA's generator.)
  - The vocabulary is the width of the model's logits, also where the tokenizer has fewer pieces.
  - A pair of tokens counts once, however often it returns. The prompt is not needed.
  - The key is all that is secret, and the default is everybody's. Who has it can find the mark,
    avoid it, or forge it.

Kirchenbauer et al., "A Watermark for Large Language Models": arXiv:2301.10226.

Shown by tests/test_watermark.py: test_transformers_marks_the_same_and_detects_the_same.
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

from alpaca.common import charts
from alpaca.common.cli import Parser, positive, run_subcommand
from alpaca.common.errors import UserError, run_command
from alpaca.common.files import atomic_file
from alpaca.weights.checkpoint import read_config
from tokenizer import Tokenizer

KEY = 15485863
MEMORY = 2**27  # bytes of green lists to keep, a bit a token: all 32,000 lists of LLaMA's


class Watermark:
    def __init__(self, vocab_size: int, gamma: float = 0.25, delta: float = 2.0, key: int = KEY):
        self.vocab_size, self.gamma, self.delta, self.key = vocab_size, gamma, delta, key
        some = f"gamma {gamma}: of {vocab_size} tokens it must make at least one green, but not all"
        problems = {
            some: not 1 <= vocab_size * gamma <= vocab_size - 1,
            "delta must be above 0: it is what marks the text": not 0 < delta < math.inf,
            "key must be above 0 and below 2**32": not 0 < key < 2**32,
            # The generator takes 32 bits of the seed: then two tokens would have one list.
            "key has too many factors of 2": vocab_size * math.gcd(key, 2**32) > 2**32,
        }
        if wrong := [text for text, is_so in problems.items() if is_so]:
            raise UserError(wrong[0])
        most = MEMORY // math.ceil(vocab_size / 8)
        self.green_list = lru_cache(max(1, most))(self.deal)

    def deal(self, previous: int) -> bytes:
        """A bit for each token, the lowest of a byte first: is it green after `previous`?"""
        generator = torch.Generator().manual_seed(self.key * previous)  # threads share none
        dealt = torch.randperm(self.vocab_size, generator=generator, device="cpu")
        green = np.zeros(self.vocab_size, bool)
        green[dealt[: int(self.vocab_size * self.gamma)].numpy()] = True
        return np.packbits(green, bitorder="little").tobytes()

    def bias(self, logits: Tensor, ids: Tensor) -> Tensor:
        """New logits (B, V), those green after each row's last id, ids (B, T), raised by delta.

        They may be fewer than the vocabulary: those of rows without a piece are often cut off."""
        B, width = logits.shape
        if width > self.vocab_size:
            raise UserError(f"{width} logits, but green lists for {self.vocab_size} tokens")
        lists = np.frombuffer(b"".join(map(self.green_list, ids[:, -1].tolist())), np.uint8)
        # numpy has an instruction for it; shifts and masks would cost four times as much
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
        """Is it green? For each token after the first, to colour them."""
        return [self.is_green(*pair) for pair in self.pairs(ids)]

    def detect(self, ids: list[int]) -> dict[str, float]:
        """z, its one-sided p-value (by the normal distribution), and what they come from.

        BOS, if there, is a token like any other: leave it out."""
        pairs = sorted(set(self.pairs(ids)))  # sorted: no list is dealt twice
        if not pairs:
            raise UserError(f"a text of {len(ids)} tokens: it takes two to show a watermark")
        green, scored = sum(self.is_green(*pair) for pair in pairs), len(pairs)
        z = (green - self.gamma * scored) / math.sqrt(scored * self.gamma * (1 - self.gamma))
        p = math.erfc(z / math.sqrt(2)) / 2
        return {"z": z, "p": p, "green": green, "scored": scored, "fraction": green / scored}

    def expected_z(self, scored: int, spike_entropy: float = 1.0) -> float:
        """The mean z of marked text, or a lower bound on it if the spike entropy is below 1."""
        share = self.gamma / (self.gamma + (1 - self.gamma) * math.exp(-self.delta))
        above = max(0.0, spike_entropy * share - self.gamma)  # no less than without a mark
        return above * math.sqrt(scored / (self.gamma * (1 - self.gamma)))

    def verdict(self, found: dict[str, float], threshold: float = 4.0) -> str:
        """In plain words. Nothing is said of a text so short that a mark need not show."""
        mean = self.expected_z(found["scored"])
        free = f"at this length marked text has z = {mean:.1f} on average if all words were free"
        if mean < threshold:
            return f"too short to tell: {free}, and {threshold:g} is asked for"
        if found["z"] > threshold:
            return f"watermarked: unmarked text comes so far with probability {found['p']:.1g}"
        return f"no watermark found: {free}, less if many were not"


# ---------------------------------------------------------------- commands


def read_text(file: str) -> str:
    raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as mistake:
        raise UserError(f"{file}: not UTF-8 at byte {mistake.start}") from None
    if not text.strip():
        raise UserError(f"{file}: no text in it")
    return text


def vocabulary(told: int | None, path: Path, tokenizer: Tokenizer) -> int:
    """The width of the model's logits: as told, or as its folder says, or else all pieces."""
    size = told or tokenizer.vocab_size
    if not told and (path / "config.json").exists():
        size = read_config(path).vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(f"a vocabulary of {size}, but {path} has {tokenizer.vocab_size} pieces")
    return size


def detect_command(args) -> None:
    tokenizer = Tokenizer(args.tokenizer)
    size = vocabulary(args.vocab_size, args.tokenizer, tokenizer)
    watermark = Watermark(size, args.gamma, args.delta, args.key)
    found = watermark.detect(tokenizer.encode(read_text(args.file)))
    verdict = watermark.verdict(found, args.threshold)
    if args.json:
        return print(json.dumps({**found, "verdict": verdict}))
    print(f"z        {found['z']:.2f}")
    print(f"p-value  {found['p']:.2g}")
    print(f"green    {found['fraction']:.1%} of the tokens, {args.gamma:.1%} by chance")
    print(f"scored   {found['scored']} tokens, repeated pairs once")
    print(verdict)


def power_command(args) -> None:
    """The z to expect of marked text against its length."""
    watermark, T = Watermark(32000, args.gamma, args.delta), range(201)
    lines = {f"S = {S:g}": [(t, watermark.expected_z(t, S)) for t in T] for S in (1.0, 0.8, 0.6)}
    lines["z = 4"] = [(t, 4.0) for t in T]
    how = f"gamma {args.gamma:g}, delta {args.delta:g}, spike entropy S"
    with atomic_file(args.out, "w") as file:
        file.write(charts.line_chart(f"z of marked text: {how}", "tokens scored", lines))


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    detect = verbs.add_parser("detect", help="is a text marked?")
    figure = verbs.add_parser("power", help="a figure of z against length")
    for verb, command in ((detect, detect_command), (figure, power_command)):
        verb.set_defaults(command=command)
        add = verb.add_argument
        add("--gamma", type=float, default=0.25, help="share of green tokens (default: 0.25)")
        add("--delta", type=float, default=2.0, help="added to green logits (default: 2)")
    add("--out", type=Path, required=True, help="the SVG to write")
    add, count, above_0 = detect.add_argument, positive(int), positive(float)
    add("file", metavar="FILE", help="UTF-8 text without its prompt; - is standard input")
    add("--tokenizer", type=Path, required=True, help="a tokenizer.model or a model's folder")
    vocabulary = "width of the model's logits (default: as in the folder, or else all pieces)"
    add("--vocab-size", type=count, metavar="N", help=vocabulary)
    add("--key", type=int, default=KEY, help=f"that the text was marked with (default: {KEY})")
    add("--threshold", type=above_0, default=4.0, help="marked is what has z above (default: 4)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    run_subcommand(parse_args())


if __name__ == "__main__":
    run_command(main)
