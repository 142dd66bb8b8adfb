"""Lays out a model's weights as this machine decodes fastest; no number changes.

Decoding one token reads every weight once, so what counts is how fast they are read:

  - On a CPU, matrices of 16 or 32 bits are laid out in the blocks that oneDNN multiplies; it reads
    plain rows at half the speed.
  - A CPU without products of 16 bits streams plain rows fast, but only for a few rows of
    activations. For more, the weights are converted to fp32, a part at a time.
  - Matrices with the same input (q, k and v; gate and up) are concatenated: fewer, larger products.
  - Integers are packed into the order of this machine's kernel (quantized_linear.py).
  - All of that copies the weights out of the mapped file. The rest (norms) is copied too, because
    one tensor that still lies in the file would keep all of it in memory.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpaca.weights.quantized_linear import (
    CPU_FEW_ROWS,
    LINEAR,
    Int4Linear,
    fp32_parts,
    multiplies_bf16,
    multiply_parts,
)
from model import Llama

MATRICES = (nn.Linear, *LINEAR.values())
ROW_AXIS = {"weight": 0, "q": 0, "scale": 0, "scales": 1}  # in each tensor that holds a matrix
mkldnn = torch.ops.mkldnn


class BlockLinear(nn.Module):
    """x Wᵀ on a CPU in fp32 or bf16, W (N, K) laid out in blocks."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocks = mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")


class WideLinear(nn.Module):
    """x Wᵀ on a CPU whose own products are in fp32, W (N, K) of 16 bits."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= CPU_FEW_ROWS[16] or torch.is_grad_enabled():
            return F.linear(x, self.weight)
        out = multiply_parts(rows.float(), fp32_parts(self.weight))
        return out.to(x.dtype).view(*x.shape[:-1], -1)


class FusedProjection(NamedTuple):
    """Several products with one x, computed as one."""

    linear: nn.Module
    widths: list[int]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.widths, dim=-1)


def fastest_layer(module: Any, compiled: bool) -> nn.Module:
    if type(module) is nn.Linear:
        weight, dtype = module.weight, module.weight.dtype
        if compiled or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return module
        if dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bf16()):
            return BlockLinear(weight)
        return WideLinear(weight) if weight.itemsize == 2 else module  # fp64 keeps its precision
    if not module.packed and (not compiled or type(module) is Int4Linear):
        module.pack()
    return module


def concatenate(layers: list[Any]) -> nn.Module:
    states = [layer.state_dict() for layer in layers]
    tensors = {name: torch.cat([s[name] for s in states], ROW_AXIS[name]) for name in states[0]}
    if type(layers[0]) is not nn.Linear:
        return type(layers[0])(**tensors)
    N, K = tensors["weight"].shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    return linear


def fuse(parent: Any, names: tuple[str, ...], compiled: bool) -> None:
    """Replace layers with the same input by one."""
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    if len({type(layer) for layer in layers}) > 1 or type(layers[0]) not in MATRICES:
        return  # fused already, or wrapped by an adapter
    parent.fused = fastest_layer(concatenate(layers), compiled)
    parent.project = FusedProjection(parent.fused, [layer.out_features for layer in layers])
    for name in names:
        delattr(parent, name)


def copy_mapped_tensors(model: Llama) -> None:
    """Copy what still lies in a mapped file, so that the file can leave memory."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().clone(), p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_mkldnn:
                setattr(module, name, buffer.clone())
    model.tie_weights()


def optimize_layout(model: Llama, compiled: bool = False) -> Llama:
    """Lay out every matrix as this machine decodes fastest, one after the other; not for training.

    A model that will be compiled keeps plain matrices, which the compiler lays out itself."""
    for block in model.model.layers:
        fuse(block.self_attn, ("q_proj", "k_proj", "v_proj"), compiled)
        fuse(block.mlp, ("gate_proj", "up_proj"), compiled)
    for path, module in list(model.named_modules()):
        if type(module) in MATRICES:
            model.set_submodule(path, fastest_layer(module, compiled))
    if not compiled and model.model.norm.weight.device.type == "cpu":
        copy_mapped_tensors(model)
    return model
