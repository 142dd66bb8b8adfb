"""Write any checkpoint that this project reads as a Hugging Face folder in safetensors.

    alpaca convert llama/7B llama-7b                        # Meta's release
    alpaca convert llama-7b llama-7b-bf16 --dtype bf16      # another dtype, pickles to safetensors

transformers opens the result as it is. The bos and eos ids in config.json are taken from the
tokenizer: early conversions of LLaMA have wrong ones.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from alpaca.common.cli import positive
from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import DTYPES, is_meta, open_checkpoint
from alpaca.weights.config_json import typed_config
from alpaca.weights.writer import require_tokenizer, save_model, tokenizer_files
from tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, help="Hugging Face or Meta folder to read")
    add("target", type=Path, help="folder to write, which must not exist yet")
    add("--dtype", choices=DTYPES, help="of the weights (default: the source's)")
    add("--tokenizer", type=Path, help="file or folder to copy it from (default: the source's)")
    known = "(default: the config's; for Meta's folders 2048, 4096 or 16384, by release)"
    add("--positions", type=positive(int), help=f"context length of the model {known}")


def run(args: argparse.Namespace) -> None:
    config, stored = open_checkpoint(args.source)
    tokenizer = require_tokenizer(args.source, args.tokenizer, config)
    if args.positions is not None:
        fields = vars(config) | {"max_position_embeddings": args.positions}
        config = typed_config(fields)  # within its limits
    if file := tokenizer_files(tokenizer).get("tokenizer.model"):
        sentencepiece = Tokenizer(file)
        ids = {"bos_token_id": sentencepiece.bos_id, "eos_token_id": sentencepiece.eos_id}
        config = replace(config, **ids)
    progress = Progress(sum(t.shape.numel() for t in stored.values()), "weights")

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored.items():
            yield name, tensor.read()
            progress.step(tensor.shape.numel())

    dtype = DTYPES.get(args.dtype)
    save_model(pairs(), config, args.target, dtype, tokenizer, keep_nonfinite=True)
    guessed = is_meta(args.source) and args.positions is None
    hint = " (params.json does not give them: see --positions)" if guessed else ""
    progress.close(f"{args.target}, {config.max_position_embeddings} positions{hint}")
