"""LoRA adapters on disk, in the two files that PEFT writes.

  adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, …
  adapter_config.json          rank, alpha, target projections, and some forty switches

Most of the switches turn plain LoRA into another method whose tensors have the same names and
shapes. So a field that is not listed here must be empty, or the adapter is refused by name.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from alpaca.common.errors import UserError, errors_at, join_names
from alpaca.common.files import atomic_folder
from alpaca.common.jinja import JINJA_FILE
from alpaca.common.json_files import check_shape, read_json
from alpaca.weights.checkpoint import DTYPES, is_finite, open_file
from alpaca.weights.lora import LoraConfig, ThinLinear, target_shapes, wrap_targets
from alpaca.weights.writer import dump_json
from model import Llama, LlamaConfig

PREFIX = "base_model.model."  # PEFT wraps a model twice
ADAPTER_FILES = "adapter_model.safetensors", "adapter_model.bin"  # today's name, and an older one
NUMBERS = "r", "lora_alpha", "lora_dropout"
PLAIN_LORA = {  # fields with the values that mean plain LoRA
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the base too
}
READ = {*NUMBERS, "target_modules", "use_rslora"}
# about the adapter's origin, or options of methods that are off
READ |= {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"}
READ |= {"peft_version", "qalora_group_size", "revision"}


def read_lora_config(file: Path) -> LoraConfig:
    if not file.exists():
        raise UserError(f"{file.parent}: no {file.name} in it: give the folder of a LoRA adapter")
    fields = read_json(file)
    for name, value in fields.items():
        plain = value in PLAIN_LORA[name] if name in PLAIN_LORA else not value or name in READ
        if not plain:
            raise UserError(f"{file}: {name} {value!r} is not supported")
    check_shape(fields, dict.fromkeys(NUMBERS, int | float) | {"target_modules": [str]}, str(file))
    with errors_at(file):
        numbers = [fields[name] for name in NUMBERS]
        lora = LoraConfig(*numbers, targets=tuple(fields["target_modules"])).check()
    if fields.get("use_rslora"):  # scaled by α / √r, arXiv:2312.03732
        lora = lora._replace(alpha=lora.alpha * math.sqrt(lora.rank))
    return lora


def read_adapter(folder: str | Path, config: LlamaConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter for a model of that shape; its tensors by the names they have in our model."""
    folder = Path(folder)
    lora = read_lora_config(folder / "adapter_config.json")
    files = [folder / name for name in ADAPTER_FILES if (folder / name).exists()]
    if not files:
        raise UserError(f"{folder}: no {' or '.join(ADAPTER_FILES)} in it")
    found: dict[str, Tensor] = {}
    for name, tensor in open_file(files[0]):
        if found.setdefault(name.removeprefix(PREFIX), tensor) is not tensor:
            raise UserError(f"{files[0]}: {name} is there twice, with {PREFIX} and without")
    wanted = {}
    for path, (N, K) in target_shapes(config, lora):
        wanted[f"{path}.lora_A.weight"] = [lora.rank, K]
        wanted[f"{path}.lora_B.weight"] = [N, lora.rank]
    problems = [f"unexpected {name}" for name in found if name not in wanted]
    for name, shape in wanted.items():
        if (tensor := found.get(name)) is None:
            problems.append(f"missing {name}")
        elif list(tensor.shape) != shape:
            problems.append(f"{name} is {list(tensor.shape)} where this model needs {shape}")
        elif tensor.dtype not in (*DTYPES.values(), torch.float64):
            problems.append(f"{name} is {tensor.dtype}, which is not supported")
        elif not is_finite(tensor.float()):
            problems.append(f"{name} holds numbers that are not finite in fp32")
    if problems:
        raise UserError(f"{files[0]}: {join_names(problems)}")
    return lora, {name: found[name].float() for name in wanted}


@torch.no_grad()
def load_adapter(model: Llama, folder: str | Path) -> None:
    """Add a trained adapter to a model, to decode with it. Call it before `optimize_layout`."""
    lora, weights = read_adapter(folder, model.config)
    wrap_targets(model, lora._replace(dropout=0.0))
    for path, module in model.named_modules():
        if type(module) is ThinLinear:
            module.to(model.model.norm.weight.dtype).weight.copy_(weights[f"{path}.weight"])


def save_adapter(
    pairs: Iterable[tuple[str, Tensor]],
    lora: LoraConfig,
    folder: str | Path,
    base: str | Path,
    chat_template: str = "",
) -> None:
    """Write (name, tensor) pairs as a folder that PEFT reads, and the template it is trained in."""
    weights = {PREFIX + name: tensor.detach().float().cpu().contiguous() for name, tensor in pairs}
    if bad := [name for name, tensor in weights.items() if not is_finite(tensor)]:
        raise UserError(f"{join_names(bad)} would be written with NaN or infinity in it")
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        **dict(zip(NUMBERS, lora, strict=False)),
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
    }
    with atomic_folder(folder) as partial:
        # not save_file: its file could be read by its owner only
        (partial / ADAPTER_FILES[0]).write_bytes(save(weights, {"format": "pt"}))
        dump_json(partial / "adapter_config.json", fields)
        if chat_template:
            (partial / JINJA_FILE).write_text(chat_template, encoding="utf-8")
