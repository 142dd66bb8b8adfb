"""Small byte-level BPE tokenizers, one of each kind, as tokenizer.json files."""

import json
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from alpaca.common.tokenizer_json import tokenizer_json_files
from alpaca.weights.writer import save_model
from bpe import LLAMA3_WORDS, PATTERNS, BPETokenizer
from helpers.commands import ROOT
from helpers.models import small_model

SPECIAL = ["<|end|>", "<|begin|>", "<|im_end|>"]
KINDS = list(PATTERNS)
TELLING = (
    "In  12 lines   345 and\n\n\n  6789,\n IT'S it's 12345 (12)\n"  # each kind splits it otherwise
)


@lru_cache
def trained(kind: str) -> str:
    """The text of a tokenizer.json trained on data/corpus.txt: 600 tokens, all bytes among them."""
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama-bpe")
    first = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")],
    }[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    lines = (ROOT / "data/corpus.txt").read_text().splitlines()[:300]
    tokenizer.train_from_iterator([*lines, *[TELLING] * 30], trainer)
    return tokenizer.to_str()


def content_of(kind: str = "gpt-2") -> dict:
    """A tokenizer.json to change."""
    return json.loads(trained(kind))


def write_bpe_model(folder: Path, kind: str = "smollm") -> Path:
    """A small random model with such a tokenizer."""
    model = small_model(vocab_size=600, max_position_embeddings=512)
    tokenizer = write_bpe(folder.with_name("tokenizer"), content_of(kind))
    save_model(model, model.config, folder, tokenizer=tokenizer.parent)
    return folder


def write_bpe(folder: Path, content: dict | None = None, **config) -> Path:
    """Write a tokenizer.json, and a tokenizer_config.json that names BOS and EOS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content or content_of()))
    config = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[0], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def save_tokenizer(tokenizer: BPETokenizer, folder: Path) -> None:
    folder.mkdir()
    for name, content in tokenizer_json_files(tokenizer).items():
        (folder / name).write_bytes(content)


def assigned() -> list[str]:
    """Every character of this Python's Unicode, but for halves of surrogate pairs. A Python whose
    Unicode is newer than the project's, 15.0, gives those of its oldest."""
    tables = unicodedata if unicodedata.unidata_version <= "15.0.0" else unicodedata.ucd_3_2_0
    codes = map(chr, range(sys.maxunicode + 1))
    return [char for char in codes if tables.category(char) not in ("Cn", "Cs")]


def codes_of(category: str) -> set[int]:
    """The letters (L) or numbers (N) of the table in data/."""
    codes = set()
    for line in (ROOT / "data/unicode_ranges.txt").read_text().splitlines():
        if line.startswith(category):
            for ends in (part.split("-") for part in line.split()[1:]):
                codes |= {*range(int(ends[0], 16), int(ends[-1], 16) + 1)}
    return codes


def tables(tokenizer) -> dict:
    """All that two equal tokenizers have in common."""
    return {k: v for k, v in vars(tokenizer).items() if k not in ("path", "words")}
