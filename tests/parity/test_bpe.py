"""Byte-level BPE: ids against Hugging Face's library `tokenizers`.

ALPACA_TOKENIZERS names a folder with published tokenizers, each in a folder of its own with its
tokenizer.json and tokenizer_config.json; they are compared on much more text. The library's
`encode_special_tokens` reads a special token's name as text, as this project always does."""

import os
import random
from pathlib import Path

import pytest
from helpers.bpe import (
    KINDS,
    SPECIAL,
    TELLING,
    assigned,
    codes_of,
    content_of,
    save_tokenizer,
    write_bpe,
)
from helpers.parity import apart

from alpaca.common.tokenizer_json import read_tokenizer_json
from bpe import CHARACTERS, BPETokenizer, word_pattern

REAL = sorted(Path(os.environ.get("ALPACA_TOKENIZERS", "/nowhere")).glob("*/tokenizer.json"))
SPACES = [*" \t\n\r\x0b\x85\xa0\u2028\u3000\x1c", "\r\n", "\n\n", "  "]
WORDS = [
    "hello",
    " the",
    *SPECIAL,
    "<|eot_id|>",
    "</s>",
    "I'd",
    "I'LL",
    "'ſ",
    "12",
    "١٢",
    "x²",
    "_",
]
WORDS += [
    "👩‍👩‍👧‍👦",
    "🦙🏽‍♀️",
    "中文字符",
    "العربية",
    "ไทย",
    "𝒳",
    "1st",
    "'re're",
    "ß",
    "\ufffd",
    "!!!\n",
]


def every_character() -> list[str]:
    """Those of this Python and the letters and numbers of Unicode 15, but for the planes of private
    use: each alone, and between a letter and a number."""
    codes = codes_of("L") | codes_of("N") | {*map(ord, assigned())}
    lines = [f"{chr(code)} a{chr(code)}1\n" for code in sorted(codes) if code < 0xF0000]
    return ["".join(lines[i : i + 64]) for i in range(0, len(lines), 64)]


def random_texts(count: int) -> list[str]:
    rng, every = random.Random(0), assigned()
    pools = [every[:128], every[:128], every[:3000], every, SPACES, WORDS]
    return [
        "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(60)))
        for _ in range(count)
    ]


def compare(ours: BPETokenizer, file: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True
    for text in texts:
        ids = ours.encode(text)
        differ = ids != theirs.encode(text, add_special_tokens=False).ids
        apart("texts whose ids differ: tokenizers, byte-level BPE", differ, 0)
        assert ours.decode(ids) == theirs.decode(ids)
        if not ours.missing:
            assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_library_of_hugging_face(tmp_path, kind):
    content = content_of(kind)
    content["added_tokens"].append(
        {"id": 600, "content": "<tool>", "special": False, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    )
    file = write_bpe(tmp_path, content)
    ours = read_tokenizer_json(file)
    every = "".join(assigned()[::499])
    texts = [f"{c} {c}a1{c}'s<tool>" for c in every] + random_texts(100) + [TELLING]
    compare(ours, file, texts)
    save_tokenizer(ours, tmp_path / "new")
    compare(ours, tmp_path / "new" / "tokenizer.json", texts[::10])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_character_is_split_as_by_the_library(tmp_path, kind):
    """Small tokenizers have the same ids for many a wrong split, so the words are compared."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(write_bpe(tmp_path, content_of(kind)))).pre_tokenizer
    for text in every_character():
        words = word_pattern(kind, 0xFFFF if max(text) <= "\uffff" else 0x10FFFF).findall(text)
        words = [word.encode().decode("latin-1").translate(CHARACTERS) for word in words]
        expected = [word for word, _ in theirs.pre_tokenize_str(text)]
        apart("texts that are split otherwise: tokenizers", words != expected, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_differ_where_a_text_is_split_as_for_another_model(tmp_path, kind):
    """The control: the texts of these tests tell the three kinds apart."""
    ours = read_tokenizer_json(write_bpe(tmp_path, content_of(kind)))
    right = ours.encode(TELLING)
    for other in {*KINDS} - {kind}:
        ours.pre = other
        assert ours.encode(TELLING) != right


def test_bytes_that_the_vocabulary_lacks_are_dropped_alike(tmp_path):
    content = content_of()
    lost = {"Ī", "ħ", "Ĭ", "x"}  # bytes of llamas and digits, and a letter
    vocab = [piece for piece in content["model"]["vocab"] if not lost & {*piece}]
    content["model"]["vocab"] = {piece: i for i, piece in enumerate(vocab)}
    merges = [
        pair if isinstance(pair, list) else pair.split() for pair in content["model"]["merges"]
    ]
    content["model"]["merges"] = [pair for pair in merges if not lost & {*"".join(pair)}]
    file = write_bpe(tmp_path, content)
    ours = read_tokenizer_json(file)
    assert len(ours.missing) == 4
    compare(ours, file, random_texts(100))


def test_written_files_are_read_by_transformers(tmp_path):
    from transformers import AutoTokenizer

    content = content_of("llama-bpe")
    ours = read_tokenizer_json(write_bpe(tmp_path / "a", content, add_bos_token=True))
    save_tokenizer(ours, tmp_path / "b")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in random_texts(50):
        if not any(name in text for name in SPECIAL):
            assert theirs(text).input_ids == ours.encode(text, bos=True)


@pytest.mark.skipif(not REAL, reason="ALPACA_TOKENIZERS names no folder of tokenizers")
@pytest.mark.slow
@pytest.mark.parametrize("file", REAL, ids=[file.parent.name for file in REAL])
def test_ids_of_published_tokenizers_equal_the_library(file):
    code = "".join(
        p.read_text(errors="replace") for p in sorted(Path(os.__file__).parent.glob("*.py"))
    )
    texts = every_character() + random_texts(10_000)
    texts += [code[i : i + 4000] for i in range(0, 1_000_000, 4000)] + [code[:1_000_000]]
    compare(read_tokenizer_json(file), file, texts)
