"""Reads Meta's own LLaMA releases as Hugging Face checkpoints.

A release folder holds `params.json` and `consolidated.00.pth`, `.01`, …, one for each GPU that the
model was split over (7B one, 13B two, 30B four, 65B eight). Three things differ from Hugging Face:

  - Names: `layers.0.attention.wq` is `model.layers.0.self_attn.q_proj`.
  - Every matrix is split along one axis and each file holds a slice.
  - Rotary embedding rotates pairs of neighbouring channels (x0, y0, x1, y1, …), Hugging Face's
    pairs that are half a head apart (x0, x1, …, y0, y1, …). `half_split` reorders the rows of wq
    and wk once; queries and keys get the same order, so their dot products do not change.

Vocabulary and ffn width are not in `params.json`; they follow from the tensors' shapes. The context
length is in neither, and `context_length` infers it from the release. LLaMA 1, Llama 2 and
CodeLlama are read; Llama 3, whose tokenizer is not a SentencePiece model, is not.
"""

import re
from typing import Any

import torch
from torch import Tensor

from alpaca.common.errors import UserError
from model import LlamaConfig

META_NAMES = {  # Meta's name → Hugging Face's, and the axis it is split along (None: not split)
    "tok_embeddings": ("model.embed_tokens", 1),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}
REFUSED = ("moe", "sliding_window", "quantization_args", "lora_args", "use_scaled_rope")


def config_fields(params: dict[str, Any], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    """config.json's fields, from params.json and the shapes of the tensors in the files."""
    if unknown := [name for name in REFUSED if params.get(name)]:
        raise UserError(f"{unknown[0]} is not supported")
    theta = params.get("rope_theta", 10000.0)
    if theta not in (1e4, 1e6):
        raise UserError(f"rope_theta {theta} is neither LLaMA's nor CodeLlama's: not supported")
    for name in ("dim", "n_layers", "n_heads"):
        if type(params.get(name)) is not int or params[name] < 1:
            raise UserError(f"{name} is {params.get(name)!r}, where a number was expected")
    names = ("tok_embeddings", "layers.0.attention.wq", "layers.0.feed_forward.w1")
    shapes = [shards[0].get(f"{name}.weight", torch.empty(0)).shape for name in names]
    if bad := [name for name, shape in zip(names, shapes, strict=True) if len(shape) != 2]:
        raise UserError(f"consolidated.00.pth: no matrix {bad[0]}.weight in it")
    (vocabulary, _), (queries, _), (ffn, _) = shapes
    needed, remainder = divmod(params["dim"], max(queries, 1))
    if remainder or not needed:
        raise UserError(f"dim is {params['dim']}, not a multiple of attention.wq's {queries} rows")
    if len(shards) != needed:
        raise UserError(f"{len(shards)} of {needed} consolidated.*.pth files are there")
    return {
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": ffn * len(shards),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads"),
        "max_position_embeddings": context_length(params),
        "rms_norm_eps": params.get("norm_eps", 1e-6),
        "rope_theta": theta,
    }


def context_length(params: dict[str, Any]) -> int:
    """CodeLlama, which has a rope_theta of its own: 16384. Llama 2: 4096; it is recognized by its
    eps, which of LLaMA 1 only the 65B has. Otherwise 2048. One early release of Llama 2 7B chat
    came with the params.json of LLaMA 1 7B, so it needs `alpaca convert --positions 4096`."""
    if params.get("rope_theta", 1e4) != 1e4:
        return 16384
    llama2 = params.get("norm_eps") == 1e-5 and (params["dim"] != 8192 or "n_kv_heads" in params)
    return 4096 if llama2 else 2048


def half_split(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head from (x0, y0, x1, y1, …) to (x0, x1, …, y0, y1, …)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head back again, to (x0, y0, x1, y1, …)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rename_tensors(shards: list[dict[str, Tensor]], config: LlamaConfig) -> dict[str, tuple]:
    """Hugging Face name → (shape, dtype, function that joins the tensor's slices)."""
    heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}
    found = {}
    for name in shards[0]:
        layer, short = re.findall(r"(?s)^(layers\.\d+\.)?(.*?)(?:\.weight)?$", name)[0]
        parts = [shard[name] for shard in shards]
        if short not in META_NAMES:  # `open_checkpoint` reports it as unexpected
            found[name] = (parts[0].shape, parts[0].dtype, lambda part=parts[0]: part)
            continue
        ours, axis = META_NAMES[short]
        prefix = f"model.{layer}" if layer else ""
        found[f"{prefix}{ours}.weight"] = join_slices(name, parts, axis, heads.get(short))
    return found


def join_slices(name: str, parts: list[Tensor], axis: int | None, heads: int | None) -> tuple:
    """One tensor of all files: its slices joined, or the copy that every file has."""
    first, shape = parts[0], list(parts[0].shape)
    fits = all((part.dtype, part.shape) == (first.dtype, first.shape) for part in parts)
    fits &= len(shape) == 2 if axis is not None else all(torch.equal(p, first) for p in parts)
    if not fits:
        raise UserError(f"{name}: the consolidated.*.pth files are not of one model")
    if axis is not None:
        shape[axis] *= len(parts)

    def read() -> Tensor:
        whole = first if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)
        return whole if heads is None else half_split(whole, heads)

    return torch.Size(shape), first.dtype, read
