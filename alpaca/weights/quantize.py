"""Weights of 8 and 4 bits, of a checkpoint that is read or in a folder of their own.

    alpaca quantize --model-dir llama-7b --bits 4                   # how far off it would be
    alpaca quantize --model-dir llama-7b --bits 4 --save llama-7b-int4  # 13.5 GB become 4.4
    alpaca generate --model-dir llama-7b-int4 "Name three primary colors."

One new token needs every weight once, and arithmetic waits for memory: bytes are time. Rounding to
nearest, what a weight w becomes:

  - int8: q · s, with s = max|w| / 127 over its row of the matrix. 1 byte a weight.
  - int4: (q - 8) · s + z, s and z such that 16 steps reach from the smallest to the largest of 32
    neighbours in a row. Half a byte, and 4 bytes for s and z: 0.625 bytes a weight.

Activations keep bf16's precision, sums are fp32. Tensors are converted one at a time while a
checkpoint is read, so that a 7B model in int4 loads where 8 GB are. The folder that --save writes
keeps the integers; how a CPU or GPU wants them arranged is its own affair (kernels.py).

More on rounding large models: arXiv:2208.07339 (int8), arXiv:2212.09720 (why 4 bits).

Shown by tests/test_quantize.py: test_the_kernels_compute_what_the_integers_say.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpaca.common.cli import Parser
from alpaca.common.errors import UserError, run_command
from alpaca.common.files import atomic_folder, read_json
from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import (
    EMBEDDING,
    HEAD,
    copy_tokenizer,
    open_checkpoint,
    parameter_shapes,
    stored_tensors,
    tokenizer_in,
    write_json,
)
from alpaca.weights.config_json import config_to_json, typed_config, understood
from alpaca.weights.shards import Shards, tensor_bytes

GROUP = 32  # neighbours that share s and z in int4
METHOD = "round to nearest"  # quant_method in config.json
aten, onednn = torch.ops.aten, torch.ops.onednn


# ---------------------------------------------------------------- one matrix


class Int8Linear(nn.Module):
    """On a CPU with int8 instructions activations become integers too, of 16 bits: nothing is lost
    beside bf16's rounding, and weights are multiplied as they are stored."""

    def __init__(self, q: Tensor, scale: Tensor):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.register_buffer("q", q)  # (N, K) int8
        self.register_buffer("scale", scale)  # (N) bf16
        self.arranged = False

    @staticmethod
    def parts(weight: Tensor) -> dict[str, Tensor]:
        weight = weight.float()
        scale = (weight.abs().amax(1) / 127).bfloat16()  # rounded before it is used
        steps = weight / scale.float().clamp_min(1e-30)[:, None]
        return {"q": steps.round_().clamp_(-127, 127).to(torch.int8), "scale": scale}

    @staticmethod
    def layout(shape: torch.Size) -> dict[str, tuple]:
        return {"q": (shape, torch.int8), "scale": (shape[:1], torch.bfloat16)}

    def dequantized(self) -> Tensor:
        assert not self.arranged, "the integers are in the kernel's order by now"
        return self.q.float() * self.scale.float()[:, None]

    def arrange(self) -> None:
        if self.q.is_cuda or not torch.cpu._is_vnni_supported():
            return
        self.scale = self.scale.float()
        self.q, self.arranged = onednn.qlinear_prepack(self.q, None), True
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if not self.arranged:
            return F.linear(x, self.q.to(x.dtype) * self.scale.to(x.dtype)[:, None])
        flat = x.flatten(0, -2).contiguous()  # (R, K)
        step, halves = two_bytes(flat)
        how = (1.0, 0, torch.float32, "none", [], "")  # the kernel's own scaling is not needed
        high_low = onednn.qlinear_pointwise(
            halves, 1.0, 128, self.q, self.scale, self.zeros, None, *how
        )
        low, high = high_low.chunk(2)  # (R, N) each
        out = torch.add(low, high, alpha=256) * step
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def two_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) as 256 · (high - 128) + (low - 128) steps; the bytes (2R, K), all low ones first.

    The kernel multiplies bytes of activations with bytes of weights: two rows are 16 bits."""
    peak = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    step = peak.clamp_min(1e-30) / 32600  # (R, 1)
    whole = (x / step).add_(0x8080 + 0.5).to(torch.uint16)  # rounds to nearest, all are above 0
    halves = whole.view(torch.uint8).view(*x.shape, 2)  # little-endian
    return step, halves.permute(2, 0, 1).flatten(0, 1)


class Int4Linear(nn.Module):
    """Holds the integers until `arrange` turns them into what this machine's kernel reads."""

    def __init__(self, q: Tensor, scales: Tensor):
        super().__init__()
        self.out_features, self.in_features = q.shape[0], 2 * q.shape[1]
        self.register_buffer("q", q)  # (N, K/2) uint8, the first of two neighbours in the high half
        self.register_buffer("scales", scales)  # (K/32, N, 2) bf16: s and z
        self.arranged = False

    @staticmethod
    def parts(weight: Tensor) -> dict[str, Tensor]:
        N, K = weight.shape
        groups = weight.float().view(N, K // GROUP, GROUP)
        low, high = groups.aminmax(dim=-1)  # (N, K/32)
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[..., None]) / scale.float().clamp_min(1e-30)[..., None]
        q = steps.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(N, K // 2, 2)
        scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        return {"q": q[..., 0] << 4 | q[..., 1], "scales": scales}

    @staticmethod
    def layout(shape: torch.Size) -> dict[str, tuple]:
        N, K = shape
        if K % GROUP or N % 16:
            raise UserError(f"int4 needs rows in 16s and columns in {GROUP}s, not {N} x {K}")
        scales = torch.Size([K // GROUP, N, 2]), torch.bfloat16
        return {"q": (torch.Size([N, K // 2]), torch.uint8), "scales": scales}

    def integers(self) -> Tensor:
        return torch.stack([self.q >> 4, self.q & 15], dim=-1).flatten(1)  # (N, K) uint8

    def dequantized(self) -> Tensor:
        assert not self.arranged, "the integers are in the kernel's order by now"
        scale, zero = self.scales.float().transpose(0, 1).unbind(-1)  # (N, K/32) each
        groups = self.integers().view(self.out_features, -1, GROUP).float() - 8
        return (groups * scale[..., None] + zero[..., None]).flatten(1)

    def arrange(self) -> None:
        if self.q.is_cuda:
            tiles = next(n for n in (8, 4, 2) if self.in_features % (16 * n) == 0)
            self.q = aten._convert_weight_to_int4pack(self.q, tiles)
        else:
            self.q = aten._convert_weight_to_int4pack_for_cpu(self.integers().int(), 1)
        self.arranged = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.arranged:
            return F.linear(x, self.dequantized().to(x.dtype))
        multiply = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
        out = multiply(x.flatten(0, -2).contiguous().bfloat16(), self.q, GROUP, self.scales)
        return out.view(*x.shape[:-1], -1).to(x.dtype)


KINDS = {8: Int8Linear, 4: Int4Linear}


# ---------------------------------------------------------------- a whole model


def layer_class(
    name: str, bits: int, round_head: bool
) -> type[Int8Linear] | type[Int4Linear] | None:
    """The class that holds a parameter; None for one that is not rounded."""
    if name == HEAD:
        return Int8Linear if round_head else None
    return KINDS.get(bits) if name.endswith("proj.weight") else None


class Source:
    """A checkpoint's tensors rounded to `bits`, one at a time; or what `save` has written.

    The blocks' matrices are rounded, and the head to 8 bits; embedding and norms stay as they are.
    """

    def __init__(self, folder: str | Path, bits: int = 16, round_head: bool = True):
        folder = Path(folder)
        stored = stored_bits(folder)
        if stored and bits not in (16, stored):
            raise UserError(f"{folder} is quantized already, to {stored} bits")
        self.stored, self.bits = stored is not None, stored or bits
        self.round_head = self.stored or (bits < 16 and round_head)
        if self.stored:
            self.found = stored_tensors(folder)
            fields = read_json(folder / "config.json") | {"quantization_config": None}
            self.config = typed_config(understood(fields))
            self.shapes = parameter_shapes(self.config)
            if {n: (t.shape, t.dtype) for n, t in self.found.items()} != self.layout():
                raise UserError(f"{folder}: its tensors are not what its config.json says")
        else:
            self.config, self.found = open_checkpoint(folder)
            if self.config.tie_word_embeddings and self.round_head:
                self.found[HEAD] = self.found[EMBEDDING]
                self.config = replace(self.config, tie_word_embeddings=False)
            self.shapes = {name: tensor.shape for name, tensor in self.found.items()}
            self.layout()  # refuses shapes that cannot be rounded

    def kind(self, name: str) -> type[Int8Linear] | type[Int4Linear] | None:
        return layer_class(name, self.bits, self.round_head)

    def layout(self) -> dict[str, tuple]:
        """Tensor on disk → shape and dtype."""
        layout = {}
        for name, shape in self.shapes.items():
            stem, kind = name.removesuffix("weight"), self.kind(name)
            own = self.found[name].dtype if name in self.found else None
            try:
                parts = kind.layout(shape) if kind else {"weight": (shape, own)}
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            layout |= {stem + part: what for part, what in parts.items()}
        return layout

    def parts(self, name: str) -> dict[str, Tensor]:
        """What holds a parameter: its integers and scales, or itself."""
        stem, kind = name.removesuffix("weight"), self.kind(name)
        if kind is None:
            return {"weight": self.found[name].read()}
        stored = kind.layout(self.shapes[name]) if self.stored else ("weight",)
        parts = {part: self.found[stem + part].read() for part in stored}
        for part, tensor in parts.items():
            floats = tensor.is_floating_point()
            if floats and not all(extreme.isfinite() for extreme in tensor.aminmax()):
                raise UserError(f"{stem}{part} holds numbers that are not finite")
        return parts if self.stored else kind.parts(parts["weight"])

    def error(self, name: str) -> float:
        """Of a parameter, ‖rounded - true‖ / ‖true‖."""
        true = self.found[name].read().float()
        rounded = self.kind(name)(**self.parts(name)).dequantized()
        return ((rounded - true).norm() / true.norm().clamp_min(1e-30)).item()


def quantization_config(bits: int) -> dict[str, Any]:
    """What config.json says of rounded weights."""
    return {"quant_method": METHOD, "group": GROUP, "bits": bits, "head": 8, "embeddings": 16}


def stored_bits(folder: Path) -> int | None:
    """The bits of a folder that `save` has written; None for any other."""
    file = folder / "config.json"
    stored = read_json(file).get("quantization_config") if file.is_file() else None
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return None
    if stored not in [quantization_config(bits) for bits in KINDS]:
        raise UserError(
            f"{file}: quantization_config {stored} is not read: quantize the original model again"
        )
    return stored["bits"]


def save(source: Source, folder: Path, tokenizer: Path | None = None) -> None:
    progress = Progress(len(source.shapes), "tensors")
    with atomic_folder(folder) as partial, Shards(partial, source.layout()) as shards:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        config = config_to_json(source.config, source.found[EMBEDDING].dtype)
        config["quantization_config"] = quantization_config(source.bits)
        write_json(partial / "config.json", config)
        for name in source.shapes:
            for part, tensor in source.parts(name).items():
                shards.write(name.removesuffix("weight") + part, tensor)
            progress.step()
    progress.close(str(folder))


def report(source: Source) -> str:
    """How far off the rounded weights are, and what they weigh."""
    errors = {name: source.error(name) for name in source.shapes if source.kind(name)}
    worst = max(errors, key=errors.get)
    before, after = (sum(tensor_bytes(t).values()) for t in (source.found, source.layout()))
    return (
        f"{len(errors)} tensors rounded; relative error {sum(errors.values()) / len(errors):.4f} "
        f"on average, at most {errors[worst]:.4f} ({worst})\n"
        f"as it is {before:,} bytes, quantized {after:,} bytes"
    )


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--bits", type=int, choices=(8, 4), required=True, help="a weight")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source = Source(args.model_dir, args.bits)
    if source.stored:
        raise UserError(f"{args.model_dir} is quantized already")
    print(report(source))
    if args.save:
        save(source, args.save, tokenizer_in(args.model_dir))


if __name__ == "__main__":
    run_command(main)
