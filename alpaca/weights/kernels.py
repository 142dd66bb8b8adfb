"""A model laid out as this machine decodes fastest; no number changes.

One new token needs every weight once, so what counts is how they are read:

  - On a CPU matrices of 16 or 32 bits are laid out in the blocks that oneDNN multiplies; plain
    rows are read at half the speed.
  - Matrices that read the same x (q, k and v; gate and up) become one: fewer products, and larger.
  - Integers go into the order of this machine's kernel (quantize.py).
  - All of it copies. What is left of a mapped checkpoint is copied too, or one small norm would
    keep the whole file in memory beside its copy.

A model that will be compiled keeps its plain matrices: the compiler lays them out itself.

Shown by tests/test_arrange.py: test_arranging_keeps_every_number_and_lets_go_of_the_files.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from alpaca.weights.quantize import KINDS, Int4Linear
from model import Llama

MATRICES = (nn.Linear, *KINDS.values())
AXES = {"weight": 0, "q": 0, "scale": 0, "scales": 1}  # of what holds a matrix, that of its rows
mkldnn = torch.ops.mkldnn


class BlockLinear(nn.Module):
    """x Wᵀ on a CPU, fp32 or bf16, W (N, K) laid out in blocks: no number changes."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocks = mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")


class Together(NamedTuple):
    """Several products over one x, made as one."""

    whole: nn.Module
    widths: list[int]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.widths, dim=-1)


def blocks_help(weight: Tensor) -> bool:
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    supported = weight.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()
    return supported or weight.dtype == torch.float32


def fastest(module: nn.Module, blocks: bool) -> nn.Module:
    if type(module) is nn.Linear:
        return BlockLinear(module.weight) if blocks and blocks_help(module.weight) else module
    if not module.arranged and (blocks or type(module) is Int4Linear):
        module.arrange()
    return module


def joined(parts: list[nn.Module]) -> nn.Module:
    states = [part.state_dict() for part in parts]
    tensors = {name: torch.cat([s[name] for s in states], AXES[name]) for name in states[0]}
    if type(parts[0]) is not nn.Linear:
        return type(parts[0])(**tensors)
    N, K = tensors["weight"].shape
    whole = nn.Linear(K, N, bias=False, device="meta")
    whole.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    return whole


def merge(parent: nn.Module, names: tuple[str, ...], blocks: bool) -> None:
    """Matrices that read the same x as one: fewer products, and larger."""
    parts = [getattr(parent, name, None) for name in names]
    if len({type(part) for part in parts}) > 1 or type(parts[0]) not in MATRICES:
        return  # merged already, or wrapped by an adapter
    parent.merged = fastest(joined(parts), blocks)
    parent.project = Together(parent.merged, [part.out_features for part in parts])
    for name in names:
        delattr(parent, name)


def let_go_of_files(model: Llama) -> None:
    """What is left of a mapped file would keep all of it in memory."""
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(own.detach().clone(), own.requires_grad))
        for name, own in module.named_buffers(recurse=False):
            if not own.is_mkldnn:
                setattr(module, name, own.clone())
    model.tie_weights()


def optimize_layout(model: Llama, compiled: bool = False) -> Llama:
    """Lay out every matrix as this machine decodes fastest, one after the other; not for training.

    A model that will be compiled keeps plain matrices, which the compiler lays out itself."""
    blocks = not compiled
    for block in model.model.layers:
        merge(block.self_attn, ("q_proj", "k_proj", "v_proj"), blocks)
        merge(block.mlp, ("gate_proj", "up_proj"), blocks)
    for path, module in list(model.named_modules()):
        if type(module) in MATRICES:
            model.set_submodule(path, fastest(module, blocks))
    if blocks and not model.model.norm.weight.is_cuda:
        let_go_of_files(model)
    return model
