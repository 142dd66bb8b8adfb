"""Write any checkpoint that this project reads as a Hugging Face folder, or as a GGUF file.

    alpaca convert llama/7B llama-7b                        # Meta's release
    alpaca convert llama-7b llama-7b-bf16 --dtype bf16      # another dtype, pickles to safetensors
    alpaca convert llama-7b llama-7b.gguf --type q8_0       # for llama.cpp
    alpaca convert llama-7b.gguf llama-7b                   # from llama.cpp

The bos and eos ids in config.json are taken from the tokenizer: early conversions of LLaMA have
wrong ones. A GGUF file also gets the chat template that the model or adapter was trained with.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from alpaca.common.cli import positive
from alpaca.common.errors import UserError
from alpaca.common.files import refuse_existing
from alpaca.common.jinja import TEMPLATE_KEY, read_jinja
from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import DTYPES, EMBEDDING, is_meta, open_checkpoint
from alpaca.weights.config_json import typed_config
from alpaca.weights.gguf import PLAIN
from alpaca.weights.gguf_writer import FILE_TYPES, save_gguf, tokenizer_metadata
from alpaca.weights.merge import merged_tensors
from alpaca.weights.writer import require_tokenizer, save_model, tokenizer_files
from dataset import template_in_jinja
from tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, help="Hugging Face or Meta folder, or GGUF file, to read")
    add("target", type=Path, help="folder or NAME.gguf to write, which must not exist yet")
    add("--dtype", choices=DTYPES, help="of the weights in a folder (default: the source's)")
    add("--type", choices=FILE_TYPES, help="of the weights in a GGUF file (default: the source's)")
    add("--adapter", type=Path, help="folder of an adapter to merge into a GGUF file")
    add("--tokenizer", type=Path, help="file or folder to copy it from (default: the source's)")
    known = "(default: the config's; for Meta's folders 2048, 4096 or 16384, by release)"
    add("--positions", type=positive(int), help=f"context length of the model {known}")


def run(args: argparse.Namespace) -> None:
    to_file = args.target.suffix == ".gguf"
    if to_file and args.dtype:
        raise UserError("--dtype is for a folder: give --type for a GGUF file")
    if not to_file and (args.type or args.adapter):
        raise UserError("--type and --adapter are for a target NAME.gguf; folders: alpaca merge")
    refuse_existing(args.target)
    config, stored = open_checkpoint(args.source)
    tokenizer = require_tokenizer(args.source, args.tokenizer, config)
    if args.positions is not None:
        fields = vars(config) | {"max_position_embeddings": args.positions}
        config = typed_config(fields)  # within its limits
    if to_file or "tokenizer.model" in tokenizer_files(tokenizer):
        text = load_tokenizer(tokenizer)
        bos_id = config.bos_token_id if text.bos_id is None else text.bos_id
        ends = config.eos_token_id
        eos_id = ends if isinstance(ends, list) and text.eos_id in ends else text.eos_id
        config = replace(config, bos_token_id=bos_id, eos_token_id=eos_id)
    progress = Progress(len(stored), "tensors")
    pairs = ((name, tensor.read()) for name, tensor in stored.items())
    if to_file:
        names = {dtype: name for name, dtype in PLAIN.items()}
        kind = args.type or names[stored[EMBEDDING].dtype].lower()
        metadata = tokenizer_metadata(tokenizer, config)
        jinja = read_jinja(*filter(None, [args.adapter, args.source, tokenizer]))
        metadata[TEMPLATE_KEY] = jinja or template_in_jinja(text)
        if args.adapter:
            dtype = PLAIN.get(kind.upper(), torch.float32)
            pairs = merged_tensors(args.source, args.adapter, dtype, {})
        save_gguf(progress.count(pairs), config, args.target, kind, metadata)
    else:
        target = args.target, DTYPES.get(args.dtype), tokenizer
        exact = not args.source.is_file()
        save_model(progress.count(pairs), config, *target, keep_nonfinite=exact)
    guessed = is_meta(args.source) and args.positions is None
    hint = " (params.json does not give them: see --positions)" if guessed else ""
    progress.close(f"{args.target}, {config.max_position_embeddings} positions{hint}")
