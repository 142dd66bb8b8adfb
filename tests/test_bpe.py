"""Byte-level BPE: words, merges, special tokens, streams. tests/parity/test_bpe.py compares ids."""

import subprocess
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.bpe import KINDS, SPECIAL, assigned, codes_of, content_of, write_bpe
from helpers.commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from alpaca.common.errors import UserError
from alpaca.common.tokenizer_json import read_tokenizer_json
from bpe import CHARACTERS, BPETokenizer, merge, word_pattern

FEW = settings(max_examples=60, deadline=None, derandomize=True)
UNICODE_DATA = Path("/usr/share/unicode/UnicodeData.txt")
HARD = [" ", "  two  spaces ", "\n\n a", "\t\r\n", "\x00\x1c", "</s> <|im_end|>", "it's IT'S ’s"]
HARD += [
    "12345 6",
    "héllo e\u0301",
    "中文字符。",
    "日本語",
    "🦙🏽‍♀️",
    "עברית",
    "\ufffd\U0010ffff",
    "x" * 300,
]


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request, tmp_path_factory):
    return read_tokenizer_json(write_bpe(tmp_path_factory.mktemp("bpe"), content_of(request.param)))


def tiny(**changes) -> BPETokenizer:
    pieces = ["a", "b", "Ġ", "ab", "Ġab", "<|end|>", "<|user|>"]
    arguments = {"pieces": pieces, "merges": [("a", "b"), ("Ġ", "ab")], "pre": "gpt-2"}
    return BPETokenizer(**arguments | {"eos_id": 5, "control": [5]} | changes)


def streamed(tokenizer, ids, after=()) -> str:
    stream = tokenizer.stream(after)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'d", " say", " ", " 42", ",", " y", "'", "LL", "\n\n", " x", "  "]),
        ("smollm", ["I", "'d", " say", "  ", "4", "2", ",", " y", "'", "LL", "\n\n", " x", "  "]),
        ("llama-bpe", ["I", "'d", " say", " ", " ", "42", ",", " y", "'LL", "\n\n", " x", "  "]),
    ],
)
def test_word_pattern_splits_as_each_model_does(pre, words):
    for highest in (0xFFFF, 0x10FFFF):
        assert word_pattern(pre, highest).findall("I'd say  42, y'LL\n\n x  ") == words


@pytest.mark.parametrize("pre", KINDS)
def test_word_pattern_loses_no_character(pre):
    text = "".join(HARD) + "".join(map(chr, range(0x3000))) + "𝒳𞥐 🦙"
    for highest in (0x10FFFF, 0xFFFF):
        assert "".join(word_pattern(pre, highest).findall(text)) == text


def test_ranges_are_those_of_unicode():
    letters, digits = (codes_of(name) for name in ("L", "N"))
    for char in assigned():
        kind, code = unicodedata.category(char)[0], ord(char)
        assert (code in letters, code in digits) == (kind == "L", kind == "N")


@pytest.mark.skipif(not UNICODE_DATA.exists(), reason="needs Debian's package unicode-data")
def test_ranges_are_what_their_script_writes(tmp_path):
    script = tmp_path / "make_unicode_ranges.py"
    script.write_text((ROOT / "data/make_unicode_ranges.py").read_text())
    subprocess.run([sys.executable, script, UNICODE_DATA], check=True)
    if "15.0" in Path("/usr/share/unicode/DerivedAge.txt").read_text()[:30]:
        written = (tmp_path / "unicode_ranges.txt").read_text()
        assert written == (ROOT / "data/unicode_ranges.txt").read_text()


# ---------------------------------------------------------------- merges


def test_merge_example_of_the_docstring():
    tokenizer = tiny()
    assert (
        tokenizer.encode("ab ab", eos=True) == [3, 4, 5] and tokenizer.decode([3, 4, 5]) == "ab ab"
    )


@FEW
@given(st.text("abc", max_size=30), st.randoms(use_true_random=False))
def test_merge_equals_its_definition(text, rng):
    pairs, known = {}, ["a", "b", "c"]
    for rank in range(12):
        pairs.setdefault((rng.choice(known), rng.choice(known)), rank)
        known = ["a", "b", "c", *(a + b for a, b in pairs)]
    expected = list(text)
    while ranked := [(pairs[p], i) for i, p in enumerate(pairwise(expected)) if p in pairs]:
        _, i = min(ranked)
        expected[i : i + 2] = [expected[i] + expected[i + 1]]
    assert merge(list(text), pairs) == expected


def test_merge_of_a_long_word_takes_seconds_not_hours(tokenizer):
    start = time.monotonic()
    text = "x" * 30_000 + "中" * 10_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - start < 5


def test_words_are_cached_within_bounds(monkeypatch):
    tokenizer = tiny()
    monkeypatch.setattr(bpe, "MAX_WORDS", 2)
    tokenizer.encode("ab ab abba " + "a" * 65)
    assert len(tokenizer.words) <= 2 and "a" * 65 not in tokenizer.words
    assert tokenizer.encode("ab ab") == [3, 4]


# ---------------------------------------------------------------- encode and decode


def test_bytes_have_one_character_each():
    assert len(set(CHARACTERS)) == 256 and CHARACTERS[ord(" ")] == "Ġ" and CHARACTERS[10] == "Ċ"
    assert all(c.isprintable() and not c.isspace() for c in CHARACTERS)


@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_decode_restores_hard_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == streamed(tokenizer, ids)
    assert b"".join(map(tokenizer.piece_bytes, ids)) == text.encode()


@FEW
@given(st.text())
def test_decode_restores_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@FEW
@given(st.data())
def test_stream_of_any_ids_equals_decode(tokenizer, data):
    """Invalid UTF-8, single bytes and special tokens included."""
    token = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 258)
    ids = data.draw(st.lists(token, max_size=20))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    cut = data.draw(st.integers(0, len(ids)))
    stream = tokenizer.stream()
    before = "".join(map(stream.push, ids[:cut]))
    assert before + streamed(tokenizer, ids[cut:], after=ids[:cut]) == tokenizer.decode(ids)


def test_stream_holds_a_character_until_it_is_complete(tokenizer):
    byte = {tokenizer.bytes[i]: i for i in range(tokenizer.vocab_size)}
    stream = tokenizer.stream()
    pushed = [stream.push(byte[bytes([b])]) for b in "🦙".encode()]
    assert pushed == ["", "", "", "🦙"]
    assert stream.push(byte[b"\xe4"]) == "" and stream.push(byte[b"A"]) == "\ufffdA"
    assert stream.push(byte[b"\xe4"]) == "" and stream.flush() == "\ufffd"


def test_special_tokens_are_ids_and_never_text(tokenizer):
    special = [tokenizer.piece(i) for i in sorted(tokenizer.control)]
    assert sorted(special) == sorted(SPECIAL)
    ids = tokenizer.encode("".join(special), bos=True, eos=True)
    assert not tokenizer.control & {*ids[:-1]} and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode([*ids, *tokenizer.control]) == "".join(special)


def test_added_tokens_that_are_not_special_are_found_first():
    tokenizer = tiny(added=[6], pieces=[*"abĠ", "ab", "Ġab", "<|end|>", "b a"])
    assert tokenizer.encode("ab ab") == [0, 6, 1] and tokenizer.decode([0, 6, 1]) == "ab ab"
    assert tiny(added=[6, 5]).added == {6}, "a control token is never found in a text"


def test_bos_is_put_first_if_the_model_expects_it():
    assert tiny(bos_id=6, add_bos=True).encode("ab", bos=True) == [6, 3]
    assert tiny(bos_id=6).encode("ab", bos=True) == [3]


def test_token_text_is_readable(tokenizer):
    byte = {tokenizer.bytes[i]: i for i in range(tokenizer.vocab_size)}
    shown = [tokenizer.token_text(byte[b]) for b in (b" ", b"\xe4", SPECIAL[0].encode())]
    assert shown == [" ", "<0xE4>", SPECIAL[0]] and tokenizer.piece(byte[b" "]) == "Ġ"


def test_missing_bytes_are_dropped_before_merging_and_counted():
    tokenizer = tiny()
    assert tokenizer.encode("acb") == [3] and tokenizer.count_missing("acb é") == 3
    assert tokenizer.decode(tokenizer.encode("acb ab")) == "ab ab"
    assert tiny(unk_id=6).encode("acb") == [0, 6, 1]


def test_ignore_merges_takes_a_whole_word():
    pieces = [*"abĠ", "ab", "Ġab", "<|end|>", "bab"]
    assert tiny(pieces=pieces).encode("bab") == [1, 3]
    assert tiny(pieces=pieces, ignore_merges=True).encode("bab bab") == [6, 2, 1, 3]
    assert tiny(pieces=pieces, pre="llama-bpe").encode("bab") == [6]


def test_encode_after_does_not_change_the_ids_before():
    tokenizer = tiny()
    assert tokenizer.encode_after("ab", " ab") == ([4], False)
    assert tokenizer.encode_after("a", "b ab") == ([1, 4], True)
    assert tokenizer.encode_after("", "ab") == ([3], False)


def test_encode_refuses_half_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match=r"half a surrogate pair is not text: .* at character 2"):
        tokenizer.encode("ab\ud83e")


def test_decode_names_the_tokenizer_of_an_id_it_lacks():
    for ids in ([5, 7], [-1]):
        with pytest.raises(UserError, match=r"tokenizer\.json has only the tokens 0 to 6"):
            tiny().decode(ids)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"pre": "qwen2"}, "'qwen2'"),
        ({"eos_id": 7}, "special token"),
        ({"bos_id": -1}, "special token"),
        ({"add_bos": True}, "special token"),
        ({"control": [99]}, "special token"),
        ({"pieces": ["a", "b", "Ġ", "ab", "Ġab", "a"]}, "empty or repeated"),
        ({"pieces": ["a", "b", "Ġ", "ab", "Ġab", ""]}, "empty or repeated"),
        ({"pieces": ["a", "b", "Ġ", "ab", "Ġab", "\ud800"]}, "surrogate"),
        ({"merges": [("a", "a")]}, "the merge"),
        ({"merges": [("", "ab")]}, "the merge"),
        ({"merges": [("<|end", "|>")]}, "the merge"),
    ],
    ids=str,
)
def test_tokenizer_refuses_inconsistent_tables(changes, error):
    with pytest.raises(UserError, match=error):
        tiny(**changes)
