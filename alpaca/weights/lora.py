"""LoRA: fine-tune a large model by training two thin matrices beside each large one.

    torchrun fsdp_train.py --lora --bits 4 --model-dir llama-7b --data alpaca_data.json
    alpaca generate --model-dir llama-7b --adapter runs/alpaca-lora/adapter "Name a color."
    alpaca merge --base llama-7b --adapter runs/alpaca-lora/adapter --out alpaca-7b

The change that fine-tuning makes to a weight W (N, K) has low rank, or so experiments say. Then it
can be trained as a product of rank r from the start, while W is frozen:

    y = W x + α/r · B A dropout(x)        A (r, K) starts random, B (N, r) starts as zero

  - B is 0, so training starts from exactly the base model's logits.
  - 7B with r = 16 on q, k, v and o trains 16.8M numbers, whose gradients and moments take 0.2 GB.
  - W needs no gradient of its own, so it may be bf16, or integers of 8 or 4 bits (QLoRA). Such a
    layer is dequantized when it is used, forward and backward, and not stored in between.
  - Merged (merge.py), W + α/r · B A is one matrix, and decoding costs nothing extra.

adapter.py reads and writes adapters as PEFT does. Papers: LoRA arXiv:2106.09685, QLoRA 2305.14314.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpaca.common.errors import UserError, join_names
from alpaca.weights.checkpoint import parameter_shapes
from alpaca.weights.quantize import WeightSource
from alpaca.weights.quantized_linear import Int4Linear, Int8Linear
from model import Llama, LlamaConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LARGEST = 1 << 20  # rank and alpha; no model is wider


class LoraConfig(NamedTuple):
    """The size of A and B, and the projections that get them. The defaults are alpaca-lora's."""

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ATTENTION

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self) -> "LoraConfig":
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            what = join_names(unknown) or "none"
            raise UserError(f"LoRA targets are {', '.join(TARGETS)}, not {what}")
        if type(self.rank) is not int or not 1 <= self.rank <= LARGEST:
            raise UserError(f"LoRA rank must be from 1 to {LARGEST}, not {self.rank}")
        if not 0 < self.alpha <= LARGEST:
            raise UserError(f"LoRA alpha must be above 0 and at most {LARGEST}, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout must be from 0 to below 1, not {self.dropout}")
        return self


def target_shapes(config: LlamaConfig, lora: LoraConfig) -> Iterator[tuple[str, torch.Size]]:
    """The projections that LoRA changes, and the shapes (N, K) of their weights."""
    for name, shape in parameter_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.rpartition(".")[2] in lora.targets:
            yield stem, shape


# ---------------------------------------------------------------- one layer


class ThinLinear(nn.Linear):
    """A or B: trained in fp32, multiplied in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class LoraLinear(nn.Module):
    """A frozen layer that multiplies by W (N, K), with A and B beside it."""

    def __init__(self, base: Any, lora: LoraConfig):
        super().__init__()
        self.base, self.scale, self.dropout = base, lora.scale, nn.Dropout(lora.dropout)
        device = next(iter(base.state_dict().values())).device
        self.lora_A = ThinLinear(base.in_features, lora.rank, bias=False, device=device)
        self.lora_B = ThinLinear(lora.rank, base.out_features, bias=False, device=device)
        init_A(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x)) * self.scale)


@torch.no_grad()
def init_A(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    bound = weight.shape[1] ** -0.5  # as for any nn.Linear
    return weight.uniform_(-bound, bound, generator=generator)


class DequantizedMatmul(torch.autograd.Function):
    """x Wᵀ with a frozen quantized W. Autograd alone would keep the dequantized W for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Int8Linear | Int4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] @ ctx.layer.dequantize().to(grads[0].dtype), None


class FrozenLinear(nn.Module):
    """A quantized layer that gradients pass through."""

    def __init__(self, layer: Int8Linear | Int4Linear):
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return DequantizedMatmul.apply(x, self.layer)


# ---------------------------------------------------------------- a whole model


def add_lora(model: Llama, lora: LoraConfig) -> None:
    """Freeze a model and add A and B to the target projections, for training."""
    lora.check()
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, (Int8Linear, Int4Linear)):
            model.set_submodule(path, FrozenLinear(module))
    wrap_targets(model, lora)


def wrap_targets(model: Llama, lora: LoraConfig) -> None:
    layers = dict(model.named_modules())
    for path, _ in target_shapes(model.config, lora):
        layer = layers.get(path)
        if layer is None or isinstance(layer, LoraLinear):
            raise UserError(f"{path} has an adapter or a layout for decoding already")
        model.set_submodule(path, LoraLinear(layer, lora))


def open_base(folder: str | Path, bits: int) -> WeightSource:
    """The frozen base of a training run. `bits` rounds its blocks, not its head; a folder that is
    already quantized keeps its integers."""
    return WeightSource(folder, bits, round_head=False)


def build_lora_model(source: WeightSource, dtype: torch.dtype, lora: LoraConfig) -> Llama:
    """A model to train, on the meta device. Head and embedding are not quantized."""
    with torch.device("meta"):
        model = Llama(source.config).to(dtype)
        for name, shape in source.shapes.items():
            if name.startswith("model.layers.") and (kind := source.linear_class(name)):
                layer = kind(**kind.quantize(torch.empty(shape)))
                model.set_submodule(name.removesuffix(".weight"), layer)
        add_lora(model, lora)
    return model


def initial_weights(source: WeightSource, seed: int) -> Callable[[str, torch.Size], Tensor]:
    """A function that gives the model's initial tensors by name. A depends on the seed, not on the
    number of ranks."""
    generator, read = torch.Generator().manual_seed(seed), lru_cache(1)(source.read)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("lora_A.weight"):
            return init_A(torch.empty(shape), generator)
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)
        stem, _, buffer = name.replace(".base", "").replace(".layer.", ".").rpartition(".")
        name = f"{stem}.weight"
        kind = source.linear_class(name)
        if kind is None:
            return source.stored[name].read()  # mapped: a rank reads its own rows only
        buffers = read(name)  # cached: q and scale are asked for one after the other
        return buffers[buffer] if buffer in buffers else kind(**buffers).dequantize()

    return weight
