"""Byte-level BPE (bpe.py) ↔ the tokenizer in the metadata of a GGUF file.

The file has the pieces in the order of their ids, the merges in the order of their ranks, each as
"a b", a type for each piece (see sentencepiece_file.py) and, as `pre`, the name of the expression
that splits a text. As in llama.cpp, this name decides whether words of the vocabulary are merged
and, by default, whether BOS comes first.
"""

from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.json_files import check_shape
from alpaca.common.sentencepiece_file import ADDED, CONTROL, NORMAL, TOKENS, TYPES, drop_padding
from bpe import BPETokenizer

MERGES, PRE = "tokenizer.ggml.merges", "tokenizer.ggml.pre"
BOS, EOS = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"
ADD_BOS = "tokenizer.ggml.add_bos_token"
PRE_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # synonyms


def is_bpe(metadata: dict[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.model") == "gpt2"


def bpe_from_metadata(metadata: dict[str, Any], place: str) -> BPETokenizer:
    """The tokenizer; an error message begins with `place`."""
    shape = {PRE: str, TOKENS: [str], TYPES: [int], MERGES: [str], EOS: int, BOS: int | None}
    check_shape(metadata, shape | {ADD_BOS: bool | None}, place)
    pieces, types = drop_padding(metadata[TOKENS], metadata[TYPES])
    pre = PRE_NAMES.get(metadata[PRE]) or metadata[PRE]
    merges = [tuple(pair.split(" ")) for pair in metadata[MERGES]]
    if len(types) != len(pieces) or any(len(pair) != 2 for pair in merges):
        raise UserError(f"{place}: its tokens, types and merges do not fit together")
    return BPETokenizer(
        pieces,
        merges,
        pre,
        metadata[EOS],
        metadata.get(BOS),
        control=[i for i, kind in enumerate(types) if kind == CONTROL],
        added=[i for i, kind in enumerate(types) if kind == ADDED],
        add_bos=metadata.get(ADD_BOS, pre == "llama-bpe"),
        path=place,
    )


def metadata_from_bpe(tokenizer: BPETokenizer) -> dict[str, Any]:
    if tokenizer.ignore_merges != (tokenizer.pre == "llama-bpe"):
        raise UserError(f"{tokenizer.path}: llama.cpp ignores merges only for Llama 3's tokenizer")
    types = dict.fromkeys(tokenizer.control, CONTROL) | dict.fromkeys(tokenizer.added, ADDED)
    ids = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    ranks = tokenizer.ranks
    return {
        "tokenizer.ggml.model": "gpt2",
        PRE: tokenizer.pre,
        TOKENS: list(tokenizer.pieces),
        TYPES: [types.get(token, NORMAL) for token in range(tokenizer.vocab_size)],
        MERGES: [" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)],
        ADD_BOS: tokenizer.add_bos,
        "tokenizer.ggml.add_space_prefix": False,
        **{name: token for name, token in ids.items() if token is not None},
    }
