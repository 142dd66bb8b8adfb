"""Hugging Face's config.json: read strictly, written for every version of transformers.

A field that a reader ignores may change what the model computes: a rotary embedding stretched to
longer contexts, a bias, a window on attention. The weights would load, every shape would fit, and
the answers would be quietly worse. So SUPPORTED lists the fields that matter with the values for
which model.py computes the right thing; any other value is refused by name.

There are two spellings. transformers 4 writes `rope_theta` and `rope_scaling` at the top level,
transformers 5 puts both into `rope_parameters`; folders edited by hand have all three.
"""

from typing import Any

import torch

from alpaca.common.errors import UserError, join_names
from alpaca.common.json_files import check_shape
from model import LlamaConfig

SUPPORTED = {
    "model_type": ("llama", "mistral"),  # without a window, Mistral is a LLaMA
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size")
REQUIRED += ("num_hidden_layers", "num_attention_heads")
LLAMA3_ROPE = {
    "factor": int | float,
    "low_freq_factor": int | float,
    "high_freq_factor": int | float,
    "original_max_position_embeddings": int,
}
LIMITS = {  # others: 1 to 1 << 20. A model of a damaged config could take hours to build
    "num_hidden_layers": (1, 1000),
    "max_position_embeddings": (2, 1 << 24),  # prompt and answer; fp32 integers are exact so far
    "rope_theta": (1, 1e30),  # beyond, fp32 has no number for the angles
    "rms_norm_eps": (1e-30, 1),  # below, fp32 divides a row of zeros by zero
    "initializer_range": (0, 100),
    "bos_token_id": (-1, 1 << 20),  # -1: SentencePiece has none
    "eos_token_id": (-1, 1 << 20),
}


def parse_rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of Llama 3.1's rotary embedding; None for the plain one."""
    kinds = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
    if not kinds:
        return None
    if kinds != {"llama3"}:
        names = join_names(map(repr, kinds))
        raise UserError(f"rope scaling {names} is not supported, only llama3")
    check_shape(rope, LLAMA3_ROPE, "rope scaling")
    if not rope["low_freq_factor"] < rope["high_freq_factor"] or rope["factor"] < 1:
        rule = "low_freq_factor must be below high_freq_factor, and factor at least 1"
        raise UserError(f"rope scaling {rope}: {rule}")
    return {"rope_type": "llama3"} | {name: rope[name] for name in LLAMA3_ROPE}


def config_from_json(fields: dict[str, Any]) -> LlamaConfig:
    """The architecture in a config.json, if model.py computes everything that it asks for."""
    flat = fields | {"rope_scaling": None}
    for key in ("rope_parameters", "rope_scaling"):  # transformers 5; transformers 4
        rope = fields.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{key} is {rope!r}, where an object was expected")
        flat |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        flat["rope_scaling"] = flat["rope_scaling"] or parse_rope_scaling(rope)
    for name, values in SUPPORTED.items():
        if flat.get(name) not in values:
            only = "models without it are read" if values[0] is None else f"{values[0]!r} is"
            raise UserError(f"{name} {flat.get(name)!r} is not supported, only {only}")
    return typed_config(flat)


def typed_config(fields: dict[str, Any]) -> LlamaConfig:
    """A LlamaConfig, if the types and sizes of all fields are valid."""
    if missing := [name for name in REQUIRED if fields.get(name) is None]:
        raise UserError(f"{join_names(missing)} is missing")
    names = LlamaConfig.__dataclass_fields__
    known = {name: fields[name] for name in names if fields.get(name) is not None}
    for name, value in known.items():
        if name == "rope_scaling":  # `parse_rope_scaling` has checked it
            continue
        default = names[name].default
        kind = int if default is None else type(default)
        low, high = LIMITS.get(name, (1, 1 << 20))
        several = name == "eos_token_id" and isinstance(value, list) and value
        for one in value if several else [value]:
            if type(one) is not kind and (kind, type(one)) != (float, int):
                raise UserError(f"{name} is {value!r}, where {kind.__name__} was expected")
            if kind is not bool and not low <= one <= high:
                raise UserError(f"{name} is {value!r}, not from {low} to {high}")
        known[name] = value if isinstance(value, list) else kind(value)
    try:
        return LlamaConfig(**known)
    except ValueError as error:
        raise UserError(str(error)) from None


def config_to_json(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The spelling that transformers 4 and 5 both read, checked as `typed_config` checks it."""
    typed_config(vars(config))
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    given = {name: value for name, value in vars(config).items() if value is not None}
    return {**fixed, **given, "torch_dtype": str(dtype).removeprefix("torch.")}
