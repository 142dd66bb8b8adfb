"""Weights rounded to 8 or 4 bits: while a checkpoint is read, or stored in a folder of their own.

    alpaca quantize --model-dir llama-7b --bits 4                       # report the rounding error
    alpaca quantize --model-dir llama-7b --bits 4 --out llama-7b-int4   # 13.5 GB become 4.4
    alpaca generate --model-dir llama-7b-int4 "Name three primary colors."

Decoding one token reads every weight once, so its speed is that of memory: half the bytes, twice
the tokens. A weight w becomes the nearest integer q on a scale s:

    int8   w ≈ q · s            s = max|w| / 127 over a row of the matrix
    int4   w ≈ (q - 8) · s + z  s = (max w - min w) / 15 and z = min w + 8 s over 32 neighbours

32 int4 take 16 bytes, and 4 for s and z: 0.625 bytes a weight. Four weights as an example,
w = (-0.3, 0.1, 0.22, 0.45), of which no error is larger than s / 2:

    int8   s = 0.45 / 127 = 0.00354       q = (-85, 28, 62, 127)  w ≈ (-0.301, 0.099, 0.220, 0.45)
    int4   s = 0.75 / 15 = 0.05, z = 0.1  q = (0, 8, 10, 15)      w ≈ (-0.3, 0.1, 0.2, 0.45)

`--bits` is for the blocks' matrices. The head is rounded to 8 bits, embedding and norms are not.
Activations keep the precision of bf16, sums are fp32. Papers: arXiv:2208.07339 (int8), 2212.09720
(why 4 bits).
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpaca.common.errors import UserError
from alpaca.common.files import atomic_folder, read_json
from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import (
    EMBEDDING,
    HEAD,
    open_checkpoint,
    parameter_shapes,
    stored_tensors,
)
from alpaca.weights.config_json import config_from_json, config_to_json
from alpaca.weights.writer import (
    ShardWriter,
    copy_tokenizer,
    dump_json,
    find_tokenizer,
    tensor_bytes,
)

GROUP = 32  # neighbours that share s and z in int4
METHOD = "round to nearest"  # quant_method in config.json
aten, onednn = torch.ops.aten, torch.ops.onednn


# ---------------------------------------------------------------- one matrix (N, K)


class Int8Linear(nn.Module):
    """x Wᵀ, W (N, K) as int8 with a scale for each row.

    On a CPU with int8 instructions the activations become integers too, of 16 bits: that loses less
    than bf16 does, and the weights are multiplied as they are stored."""

    def __init__(self, q: Tensor, scale: Tensor):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.register_buffer("q", q)  # (N, K) int8
        self.register_buffer("scale", scale)  # (N) bf16
        self.packed = False

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        weight = weight.float()
        scale = (weight.abs().amax(1) / 127).bfloat16()  # rounded first, so that q fits it
        steps = weight / scale.float().clamp_min(1e-30)[:, None]
        return {"q": steps.round_().clamp_(-127, 127).to(torch.int8), "scale": scale}

    def dequantize(self) -> Tensor:
        assert not self.packed, "the integers are in the kernel's order"
        return self.q.float() * self.scale.float()[:, None]

    def pack(self) -> None:
        """Bring the integers into the order of this machine's kernel."""
        if self.q.is_cuda or not torch.cpu._is_vnni_supported():
            return
        self.scale = self.scale.float()
        self.q, self.packed = onednn.qlinear_prepack(self.q, None), True
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.q.to(x.dtype) * self.scale.to(x.dtype)[:, None])
        step, both = split_bytes(x.flatten(0, -2).contiguous())
        weight = self.q, self.scale, self.zeros, None  # no bias
        out = 1.0, 0, torch.float32, "none", [], ""  # its scale, zero and dtype; no activation
        low, high = onednn.qlinear_pointwise(both, 1.0, 128, *weight, *out).chunk(2)  # (R, N) each
        out = torch.add(low, high, alpha=256) * step
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def split_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of x (R, K) to 16 bits: x ≈ step · (256 · (high - 128) + (low - 128)).

    Returns step (R, 1) and the bytes (2R, K), all low ones first: the kernel multiplies bytes by
    bytes, so a row of 16 bits is two rows to it."""
    peak = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    step = peak.clamp_min(1e-30) / 32600  # (R, 1)
    whole = (x / step).add_(0x8080 + 0.5).to(torch.uint16)  # all above 0: this rounds to nearest
    both = whole.view(torch.uint8).view(*x.shape, 2)  # little-endian: (R, K, low and high)
    return step, both.permute(2, 0, 1).flatten(0, 1)


class Int4Linear(nn.Module):
    """x Wᵀ, W (N, K) as two int4 to a byte, with s and z for every 32 neighbours of a row."""

    def __init__(self, q: Tensor, scales: Tensor):
        super().__init__()
        self.out_features, self.in_features = q.shape[0], 2 * q.shape[1]
        self.register_buffer("q", q)  # (N, K/2) uint8, the first of two neighbours in the high half
        self.register_buffer("scales", scales)  # (K/32, N, 2) bf16: s and z
        self.packed = False

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        N, K = weight.shape
        if K % GROUP or N % 16:
            raise UserError(f"int4 needs rows in 16s and columns in {GROUP}s, not {N} x {K}")
        groups = weight.float().view(N, K // GROUP, GROUP)
        low, high = groups.aminmax(dim=-1)  # (N, K/32)
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[..., None]) / scale.float().clamp_min(1e-30)[..., None]
        q = steps.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(N, K // 2, 2)
        scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        return {"q": q[..., 0] << 4 | q[..., 1], "scales": scales}

    def integers(self) -> Tensor:
        return torch.stack([self.q >> 4, self.q & 15], dim=-1).flatten(1)  # (N, K) uint8

    def dequantize(self) -> Tensor:
        assert not self.packed, "the integers are in the kernel's order"
        scale, zero = self.scales.float().transpose(0, 1).unbind(-1)  # (N, K/32) each
        groups = self.integers().view(self.out_features, -1, GROUP).float() - 8
        return (groups * scale[..., None] + zero[..., None]).flatten(1)

    def pack(self) -> None:
        """Bring the integers into the order of this machine's kernel."""
        if self.q.is_cuda:
            tiles = next(n for n in (8, 4, 2) if self.in_features % (16 * n) == 0)
            self.q = aten._convert_weight_to_int4pack(self.q, tiles)
        else:
            self.q = aten._convert_weight_to_int4pack_for_cpu(self.integers().int(), 1)
        self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.dequantize().to(x.dtype))
        multiply = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
        out = multiply(x.flatten(0, -2).contiguous().bfloat16(), self.q, GROUP, self.scales)
        return out.view(*x.shape[:-1], -1).to(x.dtype)


LINEAR = {8: Int8Linear, 4: Int4Linear}


# ---------------------------------------------------------------- a whole model


def linear_class(name: str, bits: int, round_head: bool) -> type[Int8Linear | Int4Linear] | None:
    """The class that holds a parameter; None for one that is not rounded."""
    if name == HEAD:
        return Int8Linear if round_head else None
    return LINEAR.get(bits) if name.endswith("proj.weight") else None


class WeightSource:
    """A folder's weights, rounded to `bits` one tensor at a time as they are read.

    A folder that `save_quantized` wrote gives its integers. Training does not round the head."""

    def __init__(self, folder: str | Path, bits: int = 16, round_head: bool = True):
        folder = Path(folder)
        stored_as = stored_bits(folder)
        if stored_as and bits not in (16, stored_as):
            raise UserError(f"{folder} is quantized already, to {stored_as} bits")
        self.quantized, self.bits = stored_as is not None, stored_as or bits
        round_head = self.quantized or (bits < 16 and round_head)
        self.linear_class = partial(linear_class, bits=self.bits, round_head=round_head)
        if self.quantized:
            self.stored = stored_tensors(folder)
            fields = read_json(folder / "config.json") | {"quantization_config": None}
            self.config = config_from_json(fields)
            self.shapes = parameter_shapes(self.config)
            if {n: tensor[:2] for n, tensor in self.stored.items()} != self.file_shapes():
                raise UserError(f"{folder}: its tensors are not what its config.json says")
        else:
            self.config, self.stored = open_checkpoint(folder)
            if self.config.tie_word_embeddings and round_head:
                self.stored[HEAD] = self.stored[EMBEDDING]
                self.config = replace(self.config, tie_word_embeddings=False)
            self.shapes = {name: tensor.shape for name, tensor in self.stored.items()}
            self.file_shapes()  # refuses shapes that cannot be rounded

    def buffer_shapes(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
        """Shapes and dtypes of the buffers that hold a parameter: q and scale(s), or `weight`."""
        kind, shape = self.linear_class(name), self.shapes[name]
        if kind is None:
            return {"weight": self.stored[name][:2] if name in self.stored else (shape, None)}
        try:
            buffers = kind.quantize(torch.empty(shape, device="meta"))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        return {buffer: (tensor.shape, tensor.dtype) for buffer, tensor in buffers.items()}

    def file_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
        """Shape and dtype of every tensor as `save_quantized` writes it."""
        return {
            name.removesuffix("weight") + buffer: entry
            for name in self.shapes
            for buffer, entry in self.buffer_shapes(name).items()
        }

    def read(self, name: str) -> dict[str, Tensor]:
        """The buffers that hold a parameter."""
        stem, kind = name.removesuffix("weight"), self.linear_class(name)
        buffers = self.buffer_shapes(name) if self.quantized else ("weight",)
        tensors = {buffer: self.stored[stem + buffer].read() for buffer in buffers}
        if kind is None:
            return tensors
        for buffer, tensor in tensors.items():
            floats = tensor.is_floating_point()
            if floats and not all(extreme.isfinite() for extreme in tensor.aminmax()):
                raise UserError(f"{stem}{buffer} holds numbers that are not finite")
        return tensors if self.quantized else kind.quantize(tensors["weight"])


def quantization_config(bits: int) -> dict[str, Any]:  # a field of config.json
    return {"quant_method": METHOD, "group": GROUP, "bits": bits, "head": 8, "embeddings": 16}


def stored_bits(folder: Path) -> int | None:
    """The bits of a folder that `save_quantized` wrote; None for any other folder."""
    file = folder / "config.json"
    stored = read_json(file).get("quantization_config") if file.is_file() else None
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return None
    if stored not in [quantization_config(bits) for bits in LINEAR]:
        raise UserError(
            f"{file}: quantization_config {stored} is not supported: quantize the original again"
        )
    return stored["bits"]


def save_quantized(source: WeightSource, folder: Path, tokenizer: Path | None = None) -> None:
    progress = Progress(len(source.shapes), "tensors")
    with atomic_folder(folder) as partial, ShardWriter(partial, source.file_shapes()) as shards:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        config = config_to_json(source.config, source.stored[EMBEDDING].dtype)
        config["quantization_config"] = quantization_config(source.bits)
        dump_json(partial / "config.json", config)
        for name in source.shapes:
            for buffer, tensor in source.read(name).items():
                shards.write(name.removesuffix("weight") + buffer, tensor)
            progress.step()
    progress.close(str(folder))


# ---------------------------------------------------------------- alpaca quantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--bits", type=int, choices=(8, 4), required=True, help="of the blocks")
    parser.add_argument("--out", type=Path, help="folder to write (default: only report)")


def relative_error(source: WeightSource, name: str) -> float:
    """‖rounded - w‖ / ‖w‖ of a parameter w that is rounded."""
    weight = source.stored[name].read().float()
    rounded = source.linear_class(name)(**source.read(name)).dequantize()
    return ((rounded - weight).norm() / weight.norm().clamp_min(1e-30)).item()


def run(args: argparse.Namespace) -> None:
    source = WeightSource(args.model_dir, args.bits)
    if source.quantized:
        raise UserError(f"{args.model_dir} is quantized already")
    errors = {n: relative_error(source, n) for n in source.shapes if source.linear_class(n)}
    worst = max(errors, key=errors.get)
    before, after = (sum(tensor_bytes(t).values()) for t in (source.stored, source.file_shapes()))
    print(
        f"{len(errors)} tensors rounded; relative error {sum(errors.values()) / len(errors):.4f} "
        f"on average, at most {errors[worst]:.4f} ({worst})\n"
        f"{before:,} bytes as stored, {after:,} bytes quantized"
    )
    if args.out:
        save_quantized(source, args.out, find_tokenizer(args.model_dir))
