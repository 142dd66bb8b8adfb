"""An adapter on disk: the two files that PEFT writes, read strictly.

  adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, …
  adapter_config.json          rank, alpha, which projections, and some forty switches

Most of the switches ask for another method than plain LoRA, though tensors may have the same names
and shapes. So a field that is not known here must be empty, or the adapter is refused by name; and
so is one that lacks a tensor, has one too many, or was made for a model of another shape.

Shown by tests/test_lora.py: test_we_load_pefts.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor, nn

from alpaca.common.errors import UserError, join_names
from alpaca.common.files import atomic_folder, read_json
from alpaca.weights.checkpoint import open_file, parameter_shapes, write_json
from model import LlamaConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT wraps a model twice, and its names tell
FILES = "adapter_model.safetensors", "adapter_model.bin"  # the second is how it was once saved
NUMBERS = "r", "lora_alpha", "lora_dropout"
READ = {*NUMBERS, "target_modules", "use_rslora"}
ONLY = {  # fields of which some values ask for plain LoRA
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian"),  # others change the base, too
}
UNIMPORTANT = {  # about how it came to be, or belonging to switches that are off
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}


class Lora(NamedTuple):
    """What is learned beside which weights; the defaults are alpaca-lora's published run's."""

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ATTENTION

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self) -> "Lora":
        odd = [str(name) for name in self.targets if name not in TARGETS]
        if odd or not self.targets:
            what = join_names(odd) or "none"
            raise UserError(f"targets of an adapter are {', '.join(TARGETS)}, not {what}")
        for name, value, fits in (
            ("rank", self.rank, self.rank >= 1),
            ("alpha", self.alpha, 0 < self.alpha < math.inf),
            ("dropout", self.dropout, 0 <= self.dropout < 1),
        ):
            if not fits:
                range = "from 0 to below 1" if name == "dropout" else "above 0"
                raise UserError(f"{name} of an adapter must be {range}, not {value}")
        return self


def adapted(config: LlamaConfig, lora: Lora) -> Iterator[tuple[str, tuple[int, int]]]:
    """The projections that an adapter changes, and the shapes (N, K) of their weights."""
    for name, shape in parameter_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.rpartition(".")[2] in lora.targets:
            yield stem, tuple(shape)


def read_settings(file: Path) -> Lora:
    fields = read_json(file)
    for name, value in fields.items():
        known = name in READ | UNIMPORTANT or (not value and name not in ONLY)
        if not known and value not in ONLY.get(name, ()):
            raise UserError(f"{file}: {name} {value!r} is not supported")
    targets, numbers = fields.get("target_modules"), [fields.get(name) for name in NUMBERS]
    if not isinstance(targets, list):
        raise UserError(f"{file}: target_modules {targets!r} is not a list of projections")
    for name, value, kinds in zip(
        NUMBERS, numbers, ((int,), (int, float), (int, float)), strict=True
    ):
        if type(value) not in kinds:
            raise UserError(f"{file}: {name} is {value!r}, where a number was expected")
    try:
        lora = Lora(*numbers, tuple(targets)).check()
    except ValueError as mistake:
        raise UserError(f"{file}: {mistake}") from None
    if fields.get("use_rslora"):  # scaled by alpha / √rank, arXiv:2312.03732
        lora = lora._replace(alpha=lora.alpha * math.sqrt(lora.rank))
    return lora


def read_adapter(folder: str | Path, config: LlamaConfig) -> tuple[Lora, dict[str, Tensor]]:
    """An adapter for a model of that shape; its tensors by the names they have in our model."""
    folder = Path(folder)
    lora = read_settings(folder / "adapter_config.json")
    files = [folder / name for name in FILES if (folder / name).exists()]
    if not files:
        raise UserError(f"{folder}: neither {' nor '.join(FILES)} is there")
    found: dict[str, Tensor] = {}
    for name, tensor in open_file(files[0]):
        if found.setdefault(name.removeprefix(PREFIX), tensor) is not tensor:
            raise UserError(f"{files[0]}: {name} is there twice, with {PREFIX} and without")
    wanted = {}
    for stem, (N, K) in adapted(config, lora):
        wanted[f"{stem}.lora_A.weight"] = [lora.rank, K]
        wanted[f"{stem}.lora_B.weight"] = [N, lora.rank]
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    for name in (name for name in wanted if name in found):
        if list(found[name].shape) != wanted[name]:
            shapes = f"{list(found[name].shape)} where this model needs {wanted[name]}"
            problems.append(f"{name} is {shapes}")
        elif not found[name].is_floating_point() or found[name].itemsize < 2:
            problems.append(f"{name} is {found[name].dtype}, of which no adapter is made")
        elif not found[name].isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        raise UserError(f"{files[0]}: {join_names(problems, 3)}")
    return lora, {name: found[name].float() for name in wanted}


def save_adapter(
    source: nn.Module | Iterable[tuple[str, Tensor]],
    lora: Lora,
    folder: str | Path,
    base: str | Path | None = None,
) -> None:
    """Write a folder that PEFT reads, from what a model learns or from (name, tensor) pairs."""
    if isinstance(source, nn.Module):
        source = ((name, own) for name, own in source.named_parameters() if own.requires_grad)
    weights = {PREFIX + name: own.detach().float().cpu().contiguous() for name, own in source}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
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
        # not save_file, which makes it unreadable for everybody else
        (partial / FILES[0]).write_bytes(save(weights, {"format": "pt"}))
        write_json(partial / "adapter_config.json", fields)
