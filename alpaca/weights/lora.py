"""Low-rank adapters: a large model fine-tuned by learning two thin matrices beside each large one.

    torchrun fsdp_train.py --lora --bits 4 --model-dir llama-7b --data alpaca_data.json
    alpaca generate --model-dir llama-7b --adapter runs/alpaca-lora/adapter "Name a color."
    alpaca merge --base llama-7b --adapter runs/alpaca-lora/adapter --out alpaca-7b

What fine-tuning adds to a weight W (N, K) is, so the observation goes, of low rank. Then it can be
learned as a product from the start, while W stays as it is:

    y = W x + alpha / r · B A dropout(x)        A (r, K) begins random, B (N, r) as zero

  - Because B is 0, training starts from exactly the base's logits. A's gradient is 0 as well until
    B has moved.
  - 7B at rank 16 on q, k, v and o learns 16.8M numbers: 0.2 GB of gradients and Adam's moments,
    which would be 81 GB for all weights.
  - W only passes gradients on, so it may be bf16, or integers of 8 or 4 bits: such a layer is
    dequantized when its turn comes, forward and backward, and kept in neither pass.
  - Merged, W + alpha / r · B A is one matrix and costs nothing more. It is computed in fp32 and
    rounded once; in bf16 a small change may be lost in that, and all of it lost is an error.
  - Files are PEFT's, to be read and written (adapter.py).

LoRA: arXiv:2106.09685; over a base of 4 bits (QLoRA): 2305.14314.

Shown by tests/test_lora.py: test_ten_steps_equal_pefts.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpaca.common.cli import Parser
from alpaca.common.errors import UserError, run_command
from alpaca.common.progress import Progress
from alpaca.weights.adapter import ATTENTION, Lora, adapted, read_adapter
from alpaca.weights.checkpoint import (
    DTYPES,
    EMBEDDING,
    as_dtype,
    open_checkpoint,
    save_model,
    tokenizer_for,
)
from alpaca.weights.quantize import KINDS, Source, stored_bits
from model import Llama

# ---------------------------------------------------------------- one layer


class Thin(nn.Linear):
    """A or B: learned in fp32, multiplied in the dtype of what comes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LoraLinear(nn.Module):
    """Any layer that multiplies by a W (N, K), and what is learned beside it."""

    def __init__(self, base: nn.Module, lora: Lora):
        super().__init__()
        self.base, self.scale, self.dropout = base, lora.scale, nn.Dropout(lora.dropout)
        device = next(iter(base.state_dict().values())).device
        self.lora_A = Thin(base.in_features, lora.rank, bias=False, device=device)
        self.lora_B = Thin(lora.rank, base.out_features, bias=False, device=device)
        random_A(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x)) * self.scale)


@torch.no_grad()
def random_A(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    bound = weight.shape[1] ** -0.5  # as any nn.Linear begins
    return weight.uniform_(-bound, bound, generator=generator)


class Dequantized(torch.autograd.Function):
    """x Wᵀ with a rounded W that is not learned: autograd by itself would keep W dequantized."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream @ ctx.layer.dequantized().to(upstream.dtype), None


class FrozenLinear(nn.Module):
    """A rounded layer that gradients pass through."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return Dequantized.apply(x, self.layer)


# ---------------------------------------------------------------- a whole model


def attach(model: Llama, lora: Lora) -> None:
    layers = dict(model.named_modules())
    for stem, _ in adapted(model.config, lora):
        layer = layers.get(stem)
        if layer is None or isinstance(layer, LoraLinear):
            raise UserError(f"{stem} is adapted or arranged for decoding: adapt a model as stored")
        model.set_submodule(stem, LoraLinear(layer, lora))


def add_lora(
    model: Llama,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: Iterable[str] = ATTENTION,
) -> None:
    """From here on the model learns nothing but new adapters on the named projections."""
    lora = Lora(rank, alpha, dropout, tuple(targets)).check()
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if type(module) in KINDS.values():
            model.set_submodule(path, FrozenLinear(module))
    attach(model, lora)


def frozen(folder: str | Path, bits: int) -> Source:
    """A base to train beside; a folder that is rounded already stays as it is."""
    return Source(folder, bits, round_head=False)


def skeleton(source: Source, dtype: torch.dtype, lora: Lora) -> Llama:
    """A model to train, on the meta device. Head and embedding are not rounded."""
    with torch.device("meta"):
        model = Llama(source.config).to(dtype)
        for name, shape in source.shapes.items():
            if name.startswith("model.layers.") and (kind := source.kind(name)):
                layout = kind.layout(shape).items()
                parts = {part: torch.empty(size, dtype=d) for part, (size, d) in layout}
                model.set_submodule(name.removesuffix(".weight"), kind(**parts))
        add_lora(model, *lora)
    return model


def first_weights(source: Source, seed: int) -> Callable[[str, torch.Size], Tensor]:
    """What parallel.fill fills a skeleton with; A is the same for any number of ranks."""
    generator, parts_of = torch.Generator().manual_seed(seed), lru_cache(1)(source.parts)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("lora_A.weight"):
            return random_A(torch.empty(shape), generator)
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)
        stem, _, part = name.replace(".base", "").replace(".layer.", ".").rpartition(".")
        name = f"{stem}.weight"
        kind = source.kind(name)
        if kind is None:
            return source.found[name].read()  # mapped: a rank touches its rows only
        parts = parts_of(name)
        return parts[part] if part in parts else kind(**parts).dequantized()

    return weight


@torch.no_grad()
def load_adapter(model: Llama, folder: str | Path) -> None:
    """Put an adapter on a model whose layers are as a checkpoint has them, to decode with it."""
    lora, weights = read_adapter(folder, model.config)
    attach(model, lora._replace(dropout=0.0))
    for path, module in model.named_modules():
        if type(module) is Thin:
            module.to(model.model.norm.weight.dtype).weight.copy_(weights[f"{path}.weight"])


# ---------------------------------------------------------------- base and adapter as one model


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[int, int, torch.dtype]:
    """Write the whole model as a Hugging Face folder, of the dtype of the base's embedding unless
    told, a tensor in memory at a time. Returned is how many matrices have changed, of how many
    adapted ones, and the dtype."""
    if stored_bits(base):
        raise UserError(f"{base} is quantized: merge into the model that it was made from")
    config, found = open_checkpoint(base)
    lora, thin = read_adapter(adapter, config)
    tokenizer = tokenizer_for(base, tokenizer)
    dtype = dtype or found[EMBEDDING].dtype
    targets, changed = dict(adapted(config, lora)), []
    progress = Progress(len(found), "tensors")

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name, stored in found.items():
            weight, stem = stored.read(), name.removesuffix(".weight")
            if stem in targets:
                added = thin[f"{stem}.lora_B.weight"] @ thin[f"{stem}.lora_A.weight"] * lora.scale
                merged = as_dtype(weight.float() + added, dtype, name)
                changed.extend([] if torch.equal(merged, weight.to(dtype)) else [name])
                weight = merged
            yield name, weight
            progress.step()
        if not changed:
            raise UserError(f"{adapter} changes nothing in {base}: as {dtype} all is as it was")

    save_model(pairs(), config, out, dtype, tokenizer)
    progress.close(str(out))
    return len(changed), len(targets), dtype


# ---------------------------------------------------------------- the command lines


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("merge", help="write base and adapter as one model")
    verb.add_argument("--base", type=Path, required=True, help="Hugging Face or Meta folder")
    verb.add_argument("--adapter", type=Path, required=True, help="folder of its adapter")
    verb.add_argument("--out", type=Path, required=True, help="folder to write, not there yet")
    verb.add_argument("--tokenizer", type=Path, help="file or folder (default: the base's)")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the base's)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    changed, of, dtype = merge(
        args.base, args.adapter, args.out, args.tokenizer, DTYPES.get(args.dtype)
    )
    told = str(dtype).removeprefix("torch.")
    print(f"{args.out}: {changed} of {of} adapted matrices have changed, rounded once to {told}")


if __name__ == "__main__":
    run_command(main)
