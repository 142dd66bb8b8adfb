"""SentencePiece's tokenizer.model ↔ the tokenizer in the metadata of a GGUF file.

A tokenizer.model is a protocol buffer: fields end to end, each a key (field number · 8 + wire type)
and a value. Wire type 0 is an integer, 7 bits a byte, lowest first, with the top bit where more
follow; 1 and 5 are 8 and 4 bytes; 2 is a length and as many bytes, which may be fields again. The
token "▁co" with score -41 is

    0A 05 E2 96 81 63 6F    field 1, 5 bytes: "▁co"
    15 00 00 24 C2          field 2, 4 bytes: -41.0 as fp32

These fields matter: 1 the tokens (1 text, 2 score, 3 type), 2 training (3 kind, 35 bytes are
tokens, 40 to 42 ids and 45 to 47 texts of unknown, bos and eos), 3 normalization (2 table, 3 a
space is put first, 4 spaces are merged). GGUF has texts, scores and types as three lists. The
rest must be as in LLaMA's tokenizer, the only kind that llama.cpp implements, or it is refused.
"""

import struct
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.json_files import check_shape

BPE = 2  # kind of model
NORMAL, CONTROL, ADDED, UNUSED, BYTE = 1, 3, 4, 5, 6  # types of tokens; 2 is unknown
TOKENS, SCORES, TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
SPECIAL = [f"tokenizer.ggml.{name}_token_id" for name in ("unknown", "bos", "eos")]


# ---------------------------------------------------------------- protocol buffers


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The integer at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def read_fields(message: bytes) -> dict[int, list[Any]]:
    """Field number → its values: integers, or bytes."""
    fields, at = {}, 0
    while at < len(message):
        key, at = read_varint(message, at)
        if key & 7 == 0:
            value, at = read_varint(message, at)
        else:
            size, at = read_varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def pack_varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def pack_field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, float):
        return pack_varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return pack_varint(number << 3) + pack_varint(value)
    content = value.encode() if isinstance(value, str) else value
    return pack_varint(number << 3 | 2) + pack_varint(len(content)) + content


# ---------------------------------------------------------------- both ways


def metadata_from_model(model: bytes, place: str) -> dict[str, Any]:
    """The metadata of a tokenizer.model that SentencePiece has accepted."""
    fields = read_fields(model)
    training, normalization = (read_fields(b"".join(fields.get(n, []))) for n in (2, 3))
    if training.get(3) != [BPE] or any(normalization.get(2, [])) or normalization.get(4) != [0]:
        raise UserError(f"{place}: not BPE without normalization, which a GGUF file needs")
    tokens = [read_fields(token) for token in fields[1]]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        TOKENS: [token[1][-1].decode() for token in tokens],
        SCORES: [struct.unpack("<f", token[2][-1])[0] if 2 in token else 0.0 for token in tokens],
        TYPES: [token.get(3, [NORMAL])[-1] for token in tokens],
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": normalization.get(3, [1])[-1] == 1,
    }
    ids = zip(SPECIAL, (40, 41, 42), (0, 1, 2), strict=True)
    return metadata | {name: training.get(field, [usual])[-1] for name, field, usual in ids}


def drop_padding(tokens: list[str], *others: list) -> list[list]:
    """The lists without the entries at their end that pad the vocabulary to the embeddings."""
    count = len(tokens)
    while count and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return [values[: count - len(tokens) or None] for values in (tokens, *others)]


def model_from_metadata(metadata: dict[str, Any], place: str) -> bytes:
    """A tokenizer.model; an error message begins with `place`."""
    if (kind := metadata.get("tokenizer.ggml.model")) != "llama":
        raise UserError(f"{place}: a tokenizer of kind {kind!r} is not supported")
    check_shape(metadata, {TOKENS: [str], SCORES: [float], TYPES: [int]}, place)
    tokens, scores, types = drop_padding(*(metadata[name] for name in (TOKENS, SCORES, TYPES)))
    ids = [metadata.get(name, usual) for usual, name in enumerate(SPECIAL)]
    known = all(i in range(len(tokens)) for i in ids) and all(t in range(1, 7) for t in types)
    if not known or len(scores) != len(tokens) or len(types) != len(tokens):
        raise UserError(f"{place}: its tokens, scores and types do not fit together")
    model = b"".join(
        pack_field(1, pack_field(1, token) + pack_field(2, score) + pack_field(3, type_))
        for token, score, type_ in zip(tokens, scores, types, strict=True)
    )
    training = pack_field(3, BPE) + pack_field(4, len(tokens)) + pack_field(35, int(BYTE in types))
    for field, index in zip((40, 41, 42), ids, strict=True):
        training += pack_field(field, index) + pack_field(field + 5, tokens[index])
    space = int(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalization = pack_field(1, "identity") + pack_field(3, space) + pack_field(4, 0)
    return model + pack_field(2, training) + pack_field(3, normalization)
