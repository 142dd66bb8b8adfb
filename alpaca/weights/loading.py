"""Opens a model, whatever it is made of.

    model = load_model("llama-7b")                                # Hugging Face or Meta folder
    model = load_model("llama-7b.gguf")                           # llama.cpp's file
    model = load_model("llama-7b", bits=4)                        # rounded while it is read
    model = load_model("llama-7b-int4")                           # a folder `alpaca quantize` wrote
    model = load_model("llama-7b", adapter="runs/lora/adapter")   # with an adapter on top
    model = optimize_layout(load_model("llama-7b"))               # to decode with (kernels.py)

All of them give a `Llama` whose parameters have Hugging Face's names. On a CPU, a tensor whose
dtype does not change is not copied: it stays in the mapped file, and its bytes are read when they
are first used. (So do not write into the files of a loaded model; replacing them is fine.)

Every command that decodes takes the same flags, from `add_model_arguments`.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from alpaca import CHECKOUT
from alpaca.common.errors import UserError
from alpaca.common.gguf_file import is_gguf
from alpaca.common.system import check_compiler, keep_freed_memory
from alpaca.weights.adapter import load_adapter
from alpaca.weights.checkpoint import DTYPES, EMBEDDING, as_dtype, no_such_model
from alpaca.weights.kernels import optimize_layout
from alpaca.weights.quantize import WeightSource
from model import Llama
from templates import TEMPLATES
from tokenizer import Tokenizer, load_tokenizer

DEVICES = ("cpu", "cuda", "mps")
DEFAULT_MODEL = CHECKOUT / "runs/tiny/model"  # where `make train` writes its model


def load_model(
    folder: str | Path,
    adapter: str | Path | None = None,
    bits: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama:
    """The model in a folder; `dtype` None keeps the one it is stored in (the embedding's).

    `bits` 8 or 4 rounds the weights of a plain folder (quantize.py)."""
    source = WeightSource(folder, bits)
    dtype = dtype or source.stored[EMBEDDING].dtype
    with torch.device("meta"):
        model = Llama(source.config)
    for name in source.shapes:
        path, _, leaf = name.rpartition(".")
        tensors = source.read(name)
        if kind := source.linear_class(name):
            model.set_submodule(path, kind(**{n: t.to(device) for n, t in tensors.items()}))
        else:
            weight = as_dtype(tensors["weight"], dtype, name).to(device)
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight))
    model.tie_weights()
    model.requires_grad_(source.bits == 16)
    if adapter:
        load_adapter(model, adapter)
    return model


# ---------------------------------------------------------------- from a command line


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model to open; for `load_from_args`."""
    add = parser.add_argument_group("model").add_argument
    written = "folder or GGUF file of the model (default: runs/tiny/model, by `make train`)"
    add("--model-dir", type=Path, default=DEFAULT_MODEL, help=written)
    add("--adapter", type=Path, help="folder of a LoRA adapter for --model-dir (default: none)")
    chat = "chat template (default: the one that the model was tuned with, else alpaca)"
    add("--template", choices=TEMPLATES, help=chat)
    add("--device", choices=DEVICES, help="mps: a Mac's GPU (default: cuda if there, else cpu)")
    add("--dtype", choices=DTYPES, help="dtype to compute in (default: as stored)")
    add("--compile", action="store_true", help="torch.compile the decoding step; meant for a GPU")
    rounded = "round the weights to 8 or 4 bits, the head to 8 (default: 16, as stored)"
    add("--bits", type=int, choices=(16, 8, 4), default=16, help=rounded)


def model_folders(args: argparse.Namespace) -> list[Path]:
    """The folders that a model is made of: its own, and its adapter's if there is one."""
    folder = args.model_dir
    if args.adapter and folder is DEFAULT_MODEL:
        raise UserError("--adapter needs --model-dir, the base model that it was trained for")
    if folder is DEFAULT_MODEL and not folder.exists():
        raise UserError(f"no model at {folder} yet: run `make train`, or give --model-dir")
    folders = [folder, args.adapter] if args.adapter else [folder]
    for path in folders:
        if not path.is_dir() and not is_gguf(path):
            raise no_such_model(path)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"{folder} is an adapter: give --model-dir BASE --adapter {folder}")
    if (folder / "model").is_dir() and (folder / "settings.json").exists():
        raise UserError(f"{folder} is the folder of a run: give --model-dir {folder / 'model'}")
    return folders


def load_from_args(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer, laid out for decoding."""
    folder = model_folders(args)[0]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not found[device]:
        raise UserError(f"--device {device}: torch finds no such GPU here")
    if device == "mps" and torch.__version__ < "2.13":  # github.com/pytorch/pytorch/issues/195910
        raise UserError("--device mps needs torch 2.13: before, tokens of 16 bits saw later ones")
    if args.compile:
        check_compiler(device, "leave out --compile")
    tokenizer = load_tokenizer(folder, args.adapter, template=args.template)
    model = load_model(folder, args.adapter, args.bits, device, DTYPES.get(args.dtype))
    model = optimize_layout(model, compiled=args.compile)
    # From here on: loading frees what decoding does not need. A cache that grows is freed, too.
    keep_freed_memory(below=1 << 26)
    return model, tokenizer
