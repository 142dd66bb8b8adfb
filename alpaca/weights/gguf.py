"""Reads llama.cpp's GGUF files as Hugging Face checkpoints (alpaca/common/gguf_file.py parses the
format).

Names differ from Hugging Face's (`blk.0.attn_q` is `model.layers.0.self_attn.q_proj`), queries and
keys are in Meta's order (meta_format.py), and a tied head is left out. F32, F16 and BF16 are plain
numbers, mapped from the file. Four quantized kinds are read. Each stores 32 or 256 consecutive
weights of a row as a block of small integers q with an fp16 scale d; in fp32, a weight w is

    Q8_0   d, 32 × int8        w = d q            34 bytes, 8.5 bits a weight
    Q4_0   d, 32 × 4 bits      w = d (q - 8)      18 bytes, 4.5 bits
    Q4_1   d, m, 32 × 4 bits   w = d q + m        20 bytes, 5 bits
    Q6_K   256 × 6 bits, d     w = d s (q - 32)   210 bytes, 6.6 bits; s: int8, one for 16 numbers

Byte i of the 4-bit integers holds integer i in its low half and integer i + 16 in its high half.
llama.cpp's 4-bit files have Q6_K for the head or tied embedding. gguf_writer.py writes Q8_0 with
d = max |w| / 127, and Q4_0 with d = w / -8, where w has the largest |w| of its block: q - 8 ranges
from -8 to 7, so this w becomes -8 exactly.
"""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError, errors_at, join_names
from alpaca.common.gguf_file import GGUF, check_spans
from alpaca.weights.config_json import typed_config
from alpaca.weights.meta_format import half_split
from alpaca.weights.presets import LLAMA3_SCALING
from model import LlamaConfig, rotary_frequencies

KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16"}
KINDS |= {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
KINDS |= {16: "IQ2_XXS", 18: "IQ3_XXS", 20: "IQ4_NL", 21: "IQ3_S", 23: "IQ4_XS"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = 32  # numbers of a block, except Q6_K's
BLOCKS = {"Q8_0": (BLOCK, 34), "Q4_0": (BLOCK, 18), "Q4_1": (BLOCK, 20), "Q6_K": (256, 210)}
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}
CONFIG_KEYS = {  # metadata → config.json
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.rope.freq_base": "rope_theta",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
}
END_KEYS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]  # end an answer
NEEDED = list(CONFIG_KEYS)[:6]  # the others have defaults
ROPE_FACTORS = "rope_freqs.weight"
HEAD_WIDTHS = ("llama.attention.value_length", "llama.rope.dimension_count")
KNOWN_KEYS = {"llama.vocab_size", "llama.tensor_data_layout", *HEAD_WIDTHS, *CONFIG_KEYS}


# ---------------------------------------------------------------- blocks ↔ numbers


def tensor_size(shape: list[int], kind: str) -> int:
    """Bytes of a tensor's data; 0 if it is empty or its rows do not divide into whole blocks."""
    count = math.prod(shape)
    if kind in PLAIN:
        return count * PLAIN[kind].itemsize
    numbers, size = BLOCKS[kind]
    return 0 if not shape or shape[-1] % numbers else count // numbers * size


def dequantize(blocks: Tensor, kind: str) -> Tensor:
    """uint8 (N, bytes of a block) → fp32 (N, numbers of a block)."""
    if kind == "Q6_K":
        return dequantize_6_bits(blocks)
    scale = blocks[:, :2].view(torch.float16).float()  # (N, 1)
    if kind == "Q8_0":
        return blocks[:, 2:].view(torch.int8).float().mul_(scale)
    halves = blocks[:, -BLOCK // 2 :]  # (N, 16), two integers in a byte
    numbers = torch.cat([halves & 15, halves >> 4], dim=1).float()  # (N, 32)
    if kind == "Q4_0":
        return numbers.sub_(8).mul_(scale)
    return numbers.mul_(scale).add_(blocks[:, 2:4].view(torch.float16).float())


def dequantize_6_bits(blocks: Tensor) -> Tensor:
    """Each half of a block has 64 bytes with the low 4 bits of 128 numbers, number i + 64 above i;
    then each half has 32 bytes with their high 2 bits, number i + 32 above i."""
    low, high, scales, scale = blocks.split([128, 64, 16, 2], dim=1)
    low = low.view(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 2, 4, 32)  # (N, 2, 4, 32)
    shifts = torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8)  # (4, 1)
    high = high.view(-1, 2, 1, 32) >> shifts & 3  # (N, 2, 4, 32)
    scales = scale.view(torch.float16) * scales.view(torch.int8).float()  # (N, 16)
    numbers = (low | high << 4).view(-1, 16, 16).float().sub_(32)  # (N, scales, numbers of one)
    return numbers.mul_(scales[:, :, None]).view(-1, 256)  # (N, 256)


# ---------------------------------------------------------------- a file as a checkpoint


def rope_factors(config: LlamaConfig, scaling: dict[str, Any]) -> Tensor:
    """(D/2): plain rotary frequencies divided by Llama 3.1's, the tensor rope_freqs.weight."""
    plain, slower = (replace(config, rope_scaling=each) for each in (None, scaling))
    return rotary_frequencies(plain) / rotary_frequencies(slower)


def read_scaling(file: GGUF, config: LlamaConfig) -> dict[str, Any]:
    """config.json's rope_scaling. A GGUF file has only the resulting factors: the largest is
    `factor`, and the other settings are the same in all releases of Llama 3."""
    count, (shape, kind, start) = config.head_dim // 2, file.tensors[ROPE_FACTORS]
    if (shape, kind) == ([count], 0) and start + 4 * count <= len(file.data):
        factors = read_tensor(file, shape, "F32", start, 4 * count, None)
        scaling = LLAMA3_SCALING | {"factor": factors.max().item()}
        if scaling["factor"] < 1e6 and torch.allclose(factors, rope_factors(config, scaling)):
            return scaling
    raise UserError(f"{ROPE_FACTORS} is not Llama 3's, the only rope scaling that is supported")


def gguf_config(file: GGUF) -> LlamaConfig:
    """The architecture, if model.py computes everything that the metadata asks for."""
    metadata, embedding = file.metadata, file.tensors.get("token_embd.weight")
    with errors_at(file.path):
        if metadata.get("split.count", 1) not in (0, 1):
            raise UserError("part of a split file: join its parts with `llama-gguf-split --merge`")
        if (architecture := metadata.get("general.architecture")) != "llama":
            raise UserError(f"architecture {architecture!r} is not supported, only 'llama' is")
        for name, value in metadata.items():
            if name.startswith("llama.") and name not in KNOWN_KEYS and value not in (0, "none"):
                raise UserError(f"{name} {value!r} is not supported")
        if missing := [name for name in NEEDED if name not in metadata]:
            raise UserError(f"{join_names(missing)} is missing")
        if embedding is None or not embedding.shape:
            raise UserError("token_embd.weight is missing")
        fields = {ours: metadata[name] for name, ours in CONFIG_KEYS.items() if name in metadata}
        for field, value in fields.items():
            if isinstance(value, float):  # 9.999999747378752e-06 is 1e-05 in fp32
                fields[field] = float(str(np.float32(value)))
        if len(ends := {metadata[k] for k in END_KEYS if type(metadata.get(k)) is int}) > 1:
            fields["eos_token_id"] = sorted(ends)
        fields["tie_word_embeddings"] = "output.weight" not in file.tensors
        config = typed_config({**fields, "vocab_size": embedding.shape[0]})
        if ROPE_FACTORS in file.tensors:
            config = replace(config, rope_scaling=read_scaling(file, config))
        for name in HEAD_WIDTHS:
            if (width := metadata.get(name, config.head_dim)) != config.head_dim:
                raise UserError(f"{name} {width!r} is not supported, only {config.head_dim} is")
    return config


def gguf_tensors(file: GGUF, config: LlamaConfig) -> dict[str, tuple]:
    """Hugging Face name → (shape, dtype, function that reads the tensor)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    sizes, found = {}, {}
    for name, (shape, number, start) in file.tensors.items():
        kind = KINDS.get(number, str(number))
        if kind not in PLAIN and kind not in BLOCKS:
            known = f"only {', '.join((*PLAIN, *BLOCKS))} are read: get the F16 or Q8_0 file"
            raise UserError(f"{file.path}: {name} is of kind {kind}, {known}")
        sizes[name] = tensor_size(shape, kind)
        if name == ROPE_FACTORS:  # `gguf_config` has read it
            continue
        parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        if not parts or parts[2] not in GGUF_NAMES:
            raise UserError(f"{file.path}: unexpected {name}")
        ours = f"model.layers.{parts[1]}." * bool(parts[1]) + f"{GGUF_NAMES[parts[2]]}.weight"
        read = partial(read_tensor, file, shape, kind, start, sizes[name], heads.get(parts[2]))
        found[ours] = torch.Size(shape), PLAIN.get(kind, torch.float32), read
    check_spans(file, sizes)
    return found


def read_tensor(
    file: GGUF, shape: list[int], kind: str, start: int, size: int, heads: int | None
) -> Tensor:
    content = torch.frombuffer(file.data, dtype=torch.uint8, offset=start, count=size)
    if kind in PLAIN:
        weight = content.view(PLAIN[kind]).view(shape)
    else:
        weight = dequantize(content.view(-1, BLOCKS[kind][1]), kind).view(shape)
    return half_split(weight, heads) if heads else weight
