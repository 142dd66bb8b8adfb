"""Round a model's weights to 8 or 4 bits and store them (quantized_linear.py has the arithmetic).

    alpaca quantize --model-dir llama-7b --bits 4                       # report the rounding error
    alpaca quantize --model-dir llama-7b --bits 4 --out llama-7b-int4   # 13.5 GB become 4.4
    alpaca generate --model-dir llama-7b-int4 "Name three primary colors."

`--bits` is for the blocks' matrices. The head is rounded to 8 bits; embedding and norms are not
rounded. The folder is a Hugging Face folder with integers and scales in place of weights, and with
quantization_config in config.json. Commands that open it take --bits, too, and round a plain folder
while they read it, one tensor at a time: a 7B model in int4 loads on a machine with 8 GB.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpaca.common.errors import UserError, errors_at
from alpaca.common.files import atomic_folder, refuse_existing
from alpaca.common.json_files import read_json
from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import (
    EMBEDDING,
    HEAD,
    is_finite,
    open_checkpoint,
    parameter_shapes,
    read_config,
    stored_tensors,
)
from alpaca.weights.config_json import config_to_json
from alpaca.weights.quantized_linear import GROUP_SIZES, LINEAR, Int4Linear, Int8Linear
from alpaca.weights.writer import (
    ShardWriter,
    copy_tokenizer,
    dump_json,
    require_tokenizer,
    tensor_bytes,
)
from tokenizer import load_tokenizer

METHOD = "round to nearest"  # quant_method in config.json


def linear_class(name: str, bits: int, round_head: bool) -> type[Int8Linear | Int4Linear] | None:
    """The class that holds a parameter; None for one that is not rounded."""
    if name == HEAD:
        return Int8Linear if round_head else None
    return LINEAR.get(bits) if name.endswith("proj.weight") else None


class WeightSource:
    """A folder's weights, rounded to `bits` one tensor at a time as they are read.

    A folder that `save_quantized` wrote gives its integers. Training does not round the head."""

    def __init__(self, folder: str | Path, bits=16, round_head=True, group=GROUP_SIZES[0]):
        folder = Path(folder)
        stored = stored_quantization(folder)
        if stored and bits not in (16, stored["bits"]):
            raise UserError(f"{folder} is quantized already, to {stored['bits']} bits")
        self.quantized = stored is not None
        self.bits, self.group = (stored["bits"], stored["group"]) if stored else (bits, group)
        round_head = self.quantized or (bits < 16 and round_head)
        self.linear_class = partial(linear_class, bits=self.bits, round_head=round_head)
        if self.quantized:
            self.stored = stored_tensors(folder)
            self.config = read_config(folder, quantized=True)
            self.shapes = parameter_shapes(self.config)
            if {name: tensor[:2] for name, tensor in self.stored.items()} != self.file_shapes():
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
            dtype = self.stored[name].dtype if name in self.stored else None
            return {"weight": (shape, dtype)}
        with errors_at(name):
            buffers = kind.quantize(torch.empty(shape, device="meta"), self.group)
        return {buffer: (tensor.shape, tensor.dtype) for buffer, tensor in buffers.items()}

    def file_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
        """Shape and dtype of every tensor as `save_quantized` writes it."""
        found = {}
        for name in self.shapes:
            for buffer, entry in self.buffer_shapes(name).items():
                found[name.removesuffix("weight") + buffer] = entry
        return found

    def read(self, name: str) -> dict[str, Tensor]:
        """The buffers that hold a parameter."""
        stem, kind = name.removesuffix("weight"), self.linear_class(name)
        buffers = self.buffer_shapes(name) if self.quantized else ("weight",)
        tensors = {buffer: self.stored[stem + buffer].read() for buffer in buffers}
        if self.bits == 16:  # nothing is rounded: every bit is as stored
            return tensors
        for buffer, tensor in tensors.items():
            if not is_finite(tensor):
                raise UserError(f"{stem}{buffer} holds numbers that are not finite")
        if self.quantized or kind is None:
            return tensors
        return kind.quantize(tensors["weight"], self.group)


def quantization_config(bits: int, group: int) -> dict[str, Any]:  # a field of config.json
    return {"quant_method": METHOD, "group": group, "bits": bits, "head": 8, "embeddings": 16}


def stored_quantization(folder: Path) -> dict[str, Any] | None:
    """What a folder that `save_quantized` wrote says of itself; None for any other folder."""
    file = folder / "config.json"
    stored = read_json(file).get("quantization_config") if file.is_file() else None
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return None
    if stored not in [quantization_config(bits, group) for bits in LINEAR for group in GROUP_SIZES]:
        reason = f"quantization_config {stored} is not supported"
        raise UserError(f"{file}: {reason}: quantize the original again")
    return stored


def save_quantized(source: WeightSource, folder: Path, tokenizer: Path | None = None) -> None:
    progress = Progress(len(source.shapes), "tensors")
    with atomic_folder(folder) as partial, ShardWriter(partial, source.file_shapes()) as shards:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        config = config_to_json(source.config, source.stored[EMBEDDING].dtype)
        config["quantization_config"] = quantization_config(source.bits, source.group)
        dump_json(partial / "config.json", config)
        for name in source.shapes:
            for buffer, tensor in source.read(name).items():
                shards.write(name.removesuffix("weight") + buffer, tensor)
            progress.step()
    progress.close(str(folder))


# ---------------------------------------------------------------- alpaca quantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, help="folder or GGUF file of the model")
    add("--bits", type=int, choices=(8, 4), required=True, help="of the blocks")
    shared = f"weights that share an int4 scale (default: {GROUP_SIZES[0]})"
    add("--group-size", type=int, choices=GROUP_SIZES, default=GROUP_SIZES[0], help=shared)
    add("--out", type=Path, help="folder to write (default: only report)")
    add("--tokenizer", type=Path, help="file or folder to copy it from (default: the model's)")


def run(args: argparse.Namespace) -> None:
    if args.bits == 8 and args.group_size != GROUP_SIZES[0]:
        raise UserError("--group-size goes with --bits 4")
    source = WeightSource(args.model_dir, args.bits, group=args.group_size)
    if source.quantized:
        raise UserError(f"{args.model_dir} is quantized already")
    if args.out:
        refuse_existing(args.out)
        tokenizer = require_tokenizer(args.model_dir, args.tokenizer, source.config)
        load_tokenizer(tokenizer)  # only this project opens the result, and must read this too
    errors = []  # (‖rounded - w‖ / ‖w‖, name)
    for name in source.shapes:
        if kind := source.linear_class(name):
            weight = source.stored[name].read().float()
            rounded = kind(**source.read(name)).dequantize()
            error = (rounded - weight).norm() / weight.norm().clamp_min(1e-30)
            if not error.isfinite():
                raise UserError(f"{args.model_dir}: {name} holds numbers too large to round")
            errors.append((error.item(), name))
    mean, (largest, name) = sum(error for error, _ in errors) / len(errors), max(errors)
    most = f"at most {largest:.4f} ({name})"
    print(f"{len(errors)} tensors rounded; relative error {mean:.4f} on average, {most}")
    print(f"{sum(tensor_bytes(source.file_shapes()).values()):,} bytes")
    if args.out:
        save_quantized(source, args.out, tokenizer)
