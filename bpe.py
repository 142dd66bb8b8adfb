"""Byte-level byte-pair encoding: text ↔ ids, as in GPT-2, SmolLM2 and Llama 3.

    pieces, merges = ["a", "b", "Ġ", "ab", "Ġab", "<|end|>"], [("a", "b"), ("Ġ", "ab")]
    tokenizer = BPETokenizer(pieces, merges, pre="gpt-2", eos_id=5)
    tokenizer.encode("ab ab", eos=True)     # [3, 4, 5]
    tokenizer.decode([3, 4, 5])             # "ab ab"

A text becomes ids in four steps:

  1. A regular expression splits it into words: "I'd say  42" → "I", "'d", " say", " ", " 42".
  2. The bytes of a word are written as 256 printable characters: a space as Ġ, a newline as Ċ.
  3. Merges join neighbouring pieces, in the order in which training found them:
         Ġ s a y   --(a, y)-->   Ġ s ay   --(Ġ, s)-->   Ġs ay   --(Ġs, ay)-->   Ġsay
  4. Each piece that remains is a token of the vocabulary.

The ids equal those of the library `tokenizers` with `encode_special_tokens`: what a user types is
text, even if it spells <|im_end|>. Words repeat, so each is merged once and its ids are cached.

BPE: arXiv:1508.07909; on bytes: GPT-2 (Radford et al., 2019).
"""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path

from alpaca.common.errors import UserError, check_unicode
from templates import ALPACA, Template

MAX_WORDS, MAX_WORD = 1 << 17, 64  # words in the cache, and characters of one

# ---------------------------------------------------------------- 1. text → words

GPT2_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts each digit out first, so what is left ends before it.
SMOLLM_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Keyed by the names in GGUF files (tokenizer.ggml.pre).
PATTERNS = {"gpt-2": GPT2_WORDS, "smollm": SMOLLM_WORDS, "llama-bpe": LLAMA3_WORDS}
# Unicode's white space; Python's \s also matches U+001C to U+001F.
WHITESPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
BEYOND_FFFF = re.compile("[\U00010000-\U0010ffff]")


@lru_cache
def word_pattern(pre: str, highest: int) -> re.Pattern:
    """The expression for texts without characters above `highest`: fewer ranges are faster.

    Python's `re` lacks \\p{L} (letters) and \\p{N} (numbers), so their ranges are written out."""
    classes = {r"\p{L}": "", r"\p{N}": "", r"\s": WHITESPACE}
    table = (Path(__file__).parent / "data/unicode_ranges.txt").read_text(encoding="utf-8")
    for category, *ranges in map(str.split, table.splitlines()):
        for ends in (ends.split("-") for ends in ranges if category != "#"):
            if int(ends[0], 16) <= highest:
                classes[rf"\p{{{category}}}"] += "-".join(f"\\U{end:0>8}" for end in ends)

    def write_out(found: re.Match) -> str:
        text = found[0].replace(r"\S", r"[^\s]")
        text = text if text.startswith("[") else f"[{text}]"
        return re.sub(r"\\p\{.\}|\\s", lambda name: classes[name[0]], text)

    return re.compile(re.sub(r"\[[^]]*\]|\\p\{.\}|\\[sS]", write_out, PATTERNS[pre]))


# ---------------------------------------------------------------- 2. bytes ↔ printable characters


def byte_characters() -> str:
    """GPT-2's character for each byte: itself if it is printable, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(b if b in printable else 256 + others.index(b)) for b in range(256))


CHARACTERS = byte_characters()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def to_bytes(piece: str) -> bytes:
    try:
        return bytes(map(BYTES.__getitem__, piece))
    except KeyError:  # an added token: the vocabulary holds its plain text
        return piece.encode()


# ---------------------------------------------------------------- 3. merges


def merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join the neighbours of the lowest rank, the leftmost first, until none has a rank.

    A heap holds the pairs to join, each as one integer: rank · count + position. A joined piece has
    the position of its left half; `after` and `before` hold the positions of each piece's
    neighbours. An entry whose pair has changed since is skipped."""
    count, rank_of = len(pieces), ranks.get
    pieces = [*pieces, ""]  # a sentinel behind the last piece and, as pieces[-1], before the first
    after, before = [*range(1, count + 1), 0], list(range(-1, count))
    queue = [ranks[pair] * count + i for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
    heapify(queue)
    while queue:
        key = heappop(queue)
        left = key % count
        right = after[left]
        pair = pieces[left], pieces[right]
        if rank_of(pair) != key // count:
            continue
        pieces[left], pieces[right] = pair[0] + pair[1], ""
        after[left], before[after[right]] = after[right], left
        for start in (before[left], left):
            rank = rank_of((pieces[start], pieces[after[start]]))
            if rank is not None:
                heappush(queue, rank * count + start)
    return [piece for piece in pieces if piece]


class WordCache(dict):
    """Word → ids."""

    def __init__(self, encode_word: Callable[[str], list[int]]):
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode_word(word)
        if len(word) <= MAX_WORD:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


# ---------------------------------------------------------------- the tokenizer


class BPETokenizer:
    template: Template | None = ALPACA  # see `load_tokenizer`

    def __init__(
        self,
        pieces: Sequence[str],  # the vocabulary: pieces[i] has the id i
        merges: Iterable[tuple[str, str]],
        pre: str,  # how a text is split: a key of PATTERNS
        eos_id: int,
        bos_id: int | None = None,
        unk_id: int | None = None,  # for bytes that the vocabulary lacks; None drops them
        control: Iterable[int] = (),  # special tokens: never matched in a text, decoded to nothing
        added: Iterable[int] = (),  # other added tokens: matched in a text before it is split
        add_bos: bool = False,  # whether the model expects BOS before a text
        ignore_merges: bool | None = None,  # do not merge words of the vocabulary; None: by `pre`
        path: str | Path = "tokenizer.json",  # what errors name
    ):
        if pre not in PATTERNS:
            raise UserError(f"{path}: pre-tokenizer {pre!r} is not one of {', '.join(PATTERNS)}")
        self.pieces, self.pre, self.path = list(pieces), pre, path
        self.vocab_size = len(self.pieces)
        self.bos_id, self.eos_id, self.unk_id, self.add_bos = bos_id, eos_id, unk_id, add_bos
        self.control = {*control, bos_id, eos_id} - {None}
        self.added = set(added) - self.control
        self.ignore_merges = pre == "llama-bpe" if ignore_merges is None else ignore_merges
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        special = {*self.control, *self.added, unk_id or 0, -1 if add_bos and bos_id is None else 0}
        if not 0 <= min(special) <= max(special) < self.vocab_size:
            raise UserError(f"{path}: the id of a special token is not in the vocabulary")
        if len({"", *self.pieces}) != self.vocab_size + 1:
            raise UserError(f"{path}: a piece of the vocabulary is empty or repeated")
        self.special_ids = {self.pieces[token]: token for token in self.control | self.added}
        self.ids = {p: i for i, p in enumerate(self.pieces) if i not in self.control or i == unk_id}
        for a, b in self.ranks:
            if not a or not b or a + b not in self.ids:
                raise UserError(f"{path}: the vocabulary lacks what the merge {a, b} makes")
        try:
            self.bytes = [to_bytes(piece) for piece in self.pieces]
        except UnicodeEncodeError:
            raise UserError(f"{path}: half a surrogate pair in the vocabulary") from None
        self.missing = bytes(BYTES[c] for c in CHARACTERS if c not in self.ids)
        longest_first = sorted((self.pieces[token] for token in self.added), key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.words = WordCache(self.encode_word)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """`bos` puts BOS first, if the model expects it; `eos` puts EOS last."""
        check_unicode(text)
        pattern = word_pattern(self.pre, 0x10FFFF if BEYOND_FFFF.search(text) else 0xFFFF)
        ids = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        for part in self.added_pattern.split(text) if self.added else [text]:
            if self.added and self.ids.get(part) in self.added:
                ids.append(self.ids[part])
            else:
                ids += chain.from_iterable(map(self.words.__getitem__, pattern.findall(part)))
        return ids + [self.eos_id] * eos

    def encode_word(self, word: str) -> list[int]:
        word = word.encode().decode("latin-1").translate(CHARACTERS)
        if self.ignore_merges and word in self.ids:
            return [self.ids[word]]
        unknown = [] if self.unk_id is None else [self.pieces[self.unk_id]]
        pieces = chain.from_iterable([c] if c in self.ids else unknown for c in word)
        return [self.ids[piece] for piece in merge(list(pieces), self.ranks)]

    def encode_after(self, before: str, text: str) -> tuple[list[int], bool]:
        """The ids of `text` after `before`, whose ids do not change, and whether a token that spans
        both was prevented."""
        head, ids = self.encode(before), self.encode(before + text)
        if ids[: len(head)] == head:
            return ids[len(head) :], False
        return self.encode(text), True

    def special_id(self, name: str) -> int:
        if name not in self.special_ids:
            raise UserError(f"{self.path} has no {name}: choose another --template")
        return self.special_ids[name]

    def count_missing(self, text: str) -> int:
        """How many bytes of a text have no token: `encode` drops them."""
        return len(text.encode()) - len(text.encode().translate(None, self.missing))

    def decode(self, ids: list[int]) -> str:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"{self.path} has only the tokens 0 to {self.vocab_size - 1}")
        return b"".join(map(self.text_bytes, ids)).decode("utf-8", "replace")

    def text_bytes(self, token: int) -> bytes:
        return b"" if token in self.control else self.bytes[token]

    def stream(self, after: Sequence[int] = ()) -> "BPEStream":
        """A decoder that takes one id at a time; its text continues that of the ids `after`."""
        return BPEStream(self, after)

    def piece(self, token: int) -> str:
        """A token as the vocabulary has it: "Ġthe", "<|im_end|>"."""
        return self.pieces[token]

    def token_text(self, token: int) -> str:
        """A token as a person reads it: " the", "<|im_end|>", "<0xE4>"."""
        try:
            return self.bytes[token].decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in self.bytes[token])

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of a token's text."""
        return self.bytes[token]


class BPEStream:
    """Ids → text, one id at a time, complete characters only; invalid bytes become U+FFFD."""

    def __init__(self, tokenizer: BPETokenizer, after: Sequence[int]):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in after:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that became complete with this token; often empty."""
        return self.decoder.decode(self.tokenizer.text_bytes(token))

    def flush(self) -> str:
        """The rest when no more ids follow."""
        return self.decoder.decode(b"", final=True)
