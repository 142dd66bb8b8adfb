"""Write a base model and its LoRA adapter as one model, a Hugging Face folder.

    alpaca merge --base llama-7b --adapter runs/alpaca-lora/adapter --out alpaca-7b

Every adapted weight becomes W + α/r · B A, computed in fp32 and rounded once. In bf16 that may lose
a small change; if all of it is lost, the merge is refused. One tensor is in memory at a time.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.common.jinja import read_jinja
from alpaca.common.progress import Progress
from alpaca.weights.adapter import read_adapter
from alpaca.weights.checkpoint import DTYPES, EMBEDDING, as_dtype, is_finite, open_checkpoint
from alpaca.weights.lora import target_shapes
from alpaca.weights.quantize import stored_quantization
from alpaca.weights.writer import require_tokenizer, save_model
from tokenizer import load_tokenizer, with_ends


def merged_tensors(
    base: Path, adapter: Path, dtype: torch.dtype, changed: dict[str, bool]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a base with its adapter, one at a time; `changed` says for each adapted one
    whether it differs from the base's, rounded to `dtype` alike."""
    config, stored = open_checkpoint(base)
    lora, matrices = read_adapter(adapter, config)
    targets = dict(target_shapes(config, lora))
    for name, tensor in stored.items():
        weight, path = tensor.read(), name.removesuffix(".weight")
        if not is_finite(weight):
            raise UserError(f"{base}: {name} holds NaN or infinity")
        if path in targets:
            change = matrices[f"{path}.lora_B.weight"] @ matrices[f"{path}.lora_A.weight"]
            merged = as_dtype(weight.float() + change * lora.scale, dtype, name)
            changed[name] = not torch.equal(merged, weight.to(dtype))
            weight = merged
        yield name, weight
    if not any(changed.values()):
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"{adapter} changes nothing in {base} as {name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", type=Path, required=True, help="folder of the base model, not quantized")
    add("--adapter", type=Path, required=True, help="folder of its adapter")
    add("--out", type=Path, required=True, help="folder to write, which must not exist yet")
    add("--tokenizer", type=Path, help="file or folder of the tokenizer (default: the base's)")
    add("--dtype", choices=DTYPES, help="of the weights (default: that of the base's embedding)")


def run(args: argparse.Namespace) -> None:
    if stored_quantization(args.base):
        raise UserError(f"{args.base} is quantized: merge into the model that it was made from")
    config, stored = open_checkpoint(args.base)
    tokenizer = require_tokenizer(args.base, args.tokenizer, config)
    dtype, changed = DTYPES.get(args.dtype) or stored[EMBEDDING].dtype, {}
    pairs = merged_tensors(args.base, args.adapter, dtype, changed)
    progress = Progress(len(stored), "tensors")
    if template := read_jinja(args.adapter):  # of a tokenizer that this project could train with
        config = with_ends(config, load_tokenizer(tokenizer, args.adapter))
    save_model(progress.count(pairs), config, args.out, dtype, tokenizer, chat_template=template)
    progress.close(str(args.out))
    counts = f"{sum(changed.values())} of {len(changed)} adapted matrices have changed"
    print(f"{args.out}: {counts}, rounded once to {str(dtype).removeprefix('torch.')}")
