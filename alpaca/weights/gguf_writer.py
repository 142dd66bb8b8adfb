"""Writes a model as one GGUF file, for llama.cpp and software that is built on it.

    alpaca convert runs/tiny/model tiny.gguf --type q8_0
    alpaca convert llama-7b alpaca.gguf --type q4_0 --adapter runs/alpaca-lora/adapter

The metadata is written first, since shapes give all sizes; then one tensor after another. Norms
stay F32. In a Q4_0 file the head and a tied embedding are Q8_0: rounding them costs the most.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from alpaca.common.errors import UserError, join_names
from alpaca.common.files import atomic_file
from alpaca.common.gguf_bpe import ADD_BOS, metadata_from_bpe
from alpaca.common.gguf_file import pack_header
from alpaca.common.sentencepiece_file import SCORES, TOKENS, TYPES, UNUSED, metadata_from_model
from alpaca.weights.checkpoint import EMBEDDING, HEAD, as_dtype, is_finite, parameter_shapes
from alpaca.weights.gguf import (
    BLOCK,
    CONFIG_KEYS,
    END_KEYS,
    GGUF_NAMES,
    HEAD_WIDTHS,
    KINDS,
    PLAIN,
    ROPE_FACTORS,
    rope_factors,
    tensor_size,
)
from alpaca.weights.meta_format import interleave
from bpe import BPETokenizer
from model import LlamaConfig
from tokenizer import load_tokenizer

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
KIND_NUMBERS = {kind: number for number, kind in KINDS.items()}
SHORT_NAMES = {ours: short for short, ours in GGUF_NAMES.items()}
CHUNK = 1 << 18  # numbers that are rounded at a time


# ---------------------------------------------------------------- metadata


def model_metadata(config: LlamaConfig, name: str, file_type: str) -> dict[str, Any]:
    fields = {key: field for key, field in CONFIG_KEYS.items() if key.startswith("llama.")}
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": 2,
        "llama.vocab_size": config.vocab_size,
        **dict.fromkeys(HEAD_WIDTHS, config.head_dim),
        **{key: getattr(config, field) for key, field in fields.items()},
    }


def tokenizer_metadata(source: Path, config: LlamaConfig) -> dict[str, Any]:
    """The tokenizer, padded to a token for each embedding, as llama.cpp requires, and the model's
    other EOS ids, which llama.cpp calls the ends of a turn (eot) and of a message (eom)."""
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, BPETokenizer):
        metadata = metadata_from_bpe(tokenizer)
    else:
        model = tokenizer.sentencepiece.serialized_model_proto()
        metadata = metadata_from_model(model, str(source))
        metadata[ADD_BOS] = tokenizer.add_bos
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    if len(others := [token for token in ends if token != metadata[END_KEYS[0]]]) > 2:
        raise UserError(f"{source}: {len(ends)} EOS ids, but a GGUF file holds at most 3")
    metadata |= zip(END_KEYS[1:], others, strict=False)
    for index in range(len(metadata[TOKENS]), config.vocab_size):
        for name, value in ((TOKENS, f"[PAD{index}]"), (SCORES, 0.0), (TYPES, UNUSED)):
            if name in metadata:
                metadata[name].append(value)
    return metadata


# ---------------------------------------------------------------- tensors


def quantize(numbers: Tensor, kind: str, name: str) -> Tensor:
    """fp32 (N, 32) → uint8 (N, bytes of a block), as gguf.py's `dequantize` reads it."""
    largest = numbers.gather(1, numbers.abs().argmax(dim=1, keepdim=True))  # (N, 1)
    scale = largest.abs() / 127 if kind == "Q8_0" else largest / -8
    q = numbers * torch.where(scale == 0, 0, 1 / scale)  # (N, 32)
    stored = as_dtype(scale, torch.float16, name).view(torch.uint8)  # (N, 2)
    if kind == "Q8_0":  # to the nearest, halves away from zero
        whole = q.abs().floor()
        q = (whole + (2 * (q.abs() - whole)).floor()) * q.sign()
        return torch.cat([stored, q.to(torch.int8).view(torch.uint8)], dim=1)
    q = (q + 8.5).to(torch.uint8).clamp_(max=15)
    low, high = q.chunk(2, dim=1)  # (N, 16) each
    return torch.cat([stored, low | high << 4], dim=1)


def gguf_name(name: str) -> str:
    """`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`."""
    layer, short = re.findall(r"^(?:model\.layers\.(\d+)\.)?(.*)\.weight$", name)[0]
    return f"blk.{layer}.{SHORT_NAMES[short]}.weight" if layer else f"{SHORT_NAMES[short]}.weight"


def kind_of(name: str, shape: torch.Size, file_type: str, tied: bool) -> str:
    if len(shape) == 1:
        return "F32"
    is_head = name == HEAD or (name == EMBEDDING and tied)
    return "Q8_0" if file_type == "q4_0" and is_head else file_type.upper()


def write_tensor(file: IO, name: str, weight: Tensor, kind: str) -> None:
    if not is_finite(weight):
        raise UserError(f"{name} would be written with NaN or infinity in it")
    for numbers in weight.flatten().split(CHUNK):
        if kind in PLAIN:
            content = as_dtype(numbers, PLAIN[kind], name).view(torch.uint8)
        else:
            content = quantize(numbers.float().view(-1, BLOCK), kind, name)
        file.write(content.numpy())


def save_gguf(
    pairs: Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    path: Path,
    file_type: str,
    metadata: dict[str, Any],
) -> None:
    """Write the metadata of config and tokenizer, and (name, tensor) pairs in any order."""
    tied = config.tie_word_embeddings
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kinds, entries = {}, {}
    if config.rope_scaling:
        factors = rope_factors(config, config.rope_scaling)
        entries[ROPE_FACTORS] = list(factors.shape), KIND_NUMBERS["F32"], factors.nbytes
    for name, shape in parameter_shapes(config).items():
        kinds[name] = kind = kind_of(name, shape, file_type, tied)
        if not (size := tensor_size(list(shape), kind)):
            rows = f"rows of {shape[-1]} are not whole blocks of {BLOCK}"
            raise UserError(f"{name}: {rows}: use --type f16")
        entries[gguf_name(name)] = list(shape), KIND_NUMBERS[kind], size
    metadata = model_metadata(config, path.stem, file_type) | metadata
    start, positions, size = pack_header(metadata, entries)
    with atomic_file(path) as file:
        file.write(start)
        file.truncate(size)
        if config.rope_scaling:
            file.seek(positions[ROPE_FACTORS])
            write_tensor(file, ROPE_FACTORS, factors, "F32")
        for name, weight in pairs:
            if count := heads.get(name.split(".")[-2]):
                weight = interleave(weight, count)
            file.seek(positions[gguf_name(name)])
            write_tensor(file, name, weight.detach(), kinds.pop(name))
        assert not kinds, f"missing {join_names(kinds)}"
