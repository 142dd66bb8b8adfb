"""Publish a fine-tuned model as its difference to the base model, and recover it.

    python weightdiff.py make    --base llama-7b --tuned runs/alpaca/model --diff alpaca-diff
    python weightdiff.py recover --base llama-7b --diff alpaca-diff --tuned alpaca-7b
    python weightdiff.py verify  --base llama-7b --diff alpaca-diff    # checks, writes nothing

A diff is useless without the base, so it may be published even where the weights may not. There
are two formats:

  - Alpaca's (`--format alpaca`): tuned - base in fp32, with the sum of all weights as a checksum.
    Floats are rounded, so the last bits of the recovered model may differ.
  - exact (the default): the same between bit patterns read as integers (alpaca/weights/bitdiff.py):
    every bit comes back. manifest.json has the SHA-256 of each tensor of base, diff and tuned
    model, so an error names the tensor and the side that is wrong. The diff is as large as the
    tuned model: 13.5 GB for 7B in bf16, where Alpaca's format takes 27 GB.

A base of another dtype is converted to the tuned model's. Rows of the vocabulary that it lacks are
its mean row (Alpaca's format) or zero (exact), and a tensor that it lacks is refused or zero. If
only the base ties its head to the embedding, the embedding is its head.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from alpaca.common.cli import Parser, finite
from alpaca.common.errors import UserError, join_names, notice, run_command
from alpaca.common.files import refuse_existing
from alpaca.common.progress import Progress
from alpaca.weights.bitdiff import BITS, make_exact_diff, open_both, recover_exact_diff
from alpaca.weights.checkpoint import (
    DTYPES,
    OBSOLETE,
    is_finite,
    open_checkpoint,
    open_file,
    read_config,
    weight_files,
)
from alpaca.weights.writer import find_tokenizer, save_model, tensor_bytes
from model import rotary_frequencies

SUM_TOLERANCE = 0.05  # Alpaca added up in fp32: near 50,000 the order alone moves the sum by 0.04


# ---------------------------------------------------------------- Alpaca's diff, of floats


def make_float_diff(base: Path, tuned: Path, diff: Path) -> None:
    """diff = tuned - base, a Hugging Face folder in fp32."""

    def differences() -> Iterator[tuple[str, Tensor]]:
        total = 0.0
        for name, t, b in fp32_pairs(tuned, base):
            total += t.sum().item()
            yield name, t - b
        notice(f"the sum of all weights is {total:.4f}: others check theirs with --expect-sum")

    save_model(differences(), read_config(tuned), diff, torch.float32, find_tokenizer(tuned))


def recover_float_diff(
    base: Path, diff: Path, tuned: Path | None, dtype: torch.dtype, expected_sum: float | None
) -> None:
    """tuned = diff + base, checked by the sum of all its weights; `tuned` None only checks.

    Not exact: for base 1 and tuned 1e-9 the difference is -1 in fp32, and -1 + 1 is 0."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        total = sum_of_rotary_tables(diff)
        for name, d, b in fp32_pairs(diff, base):
            weight = d + b
            if not is_finite(weight) and is_finite(d) and is_finite(b):
                raise UserError(f"{name}: base and diff add up to more than fp32 can hold")
            total += weight.sum().item()
            yield name, weight
        text = f"the sum of all weights is {total:.4f}"
        if expected_sum is not None and not abs(total - expected_sum) <= SUM_TOLERANCE:
            raise UserError(f"{text}, not {expected_sum}: wrong or damaged base or diff")
        notice(text)

    if tuned:
        config, tokenizer = read_config(diff), find_tokenizer(diff)
        save_model(weights(), config, tuned, dtype, tokenizer, keep_nonfinite=True)
    else:
        for _ in weights():
            pass


def fp32_pairs(other: Path, base: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, other, base), one tensor at a time. Rows that the base lacks are the mean of its rows,
    which is how Alpaca's training initialized them."""
    pairs = open_both(other, base)
    if missing := [name for name, pair in pairs.items() if not pair[1].shape.numel()]:
        raise UserError(f"the base has no {join_names(missing)}: Alpaca's format needs it")
    sizes = tensor_bytes({name: pair[0] for name, pair in pairs.items()})
    progress = Progress(sum(sizes.values()), "bytes")
    for name, pair in pairs.items():
        numbers, b = (stored.read().float() for stored in pair)
        if new_rows := max(0, len(numbers) - len(b)):
            b = torch.cat([b, b.mean(dim=0, keepdim=True).expand(new_rows, -1)])
        yield name, numbers, b[: len(numbers)]
        progress.step(sizes[name])
    progress.close()


def sum_of_rotary_tables(diff: Path) -> float:
    """Files of 2023 hold a table of rotary frequencies per layer, and Alpaca's sum counts them."""
    names = [name for file in weight_files(diff) for name, _ in open_file(file)]
    tables = sum(bool(OBSOLETE.search(name)) for name in names)
    return tables * rotary_frequencies(read_config(diff)).sum().item()


# ---------------------------------------------------------------- commands


def recover_or_verify(args: argparse.Namespace) -> str:
    """`verify` has no --tuned."""
    if args.tuned:
        refuse_existing(args.tuned)
    if is_exact(args.diff):
        if args.expect_sum is not None or args.dtype:
            raise UserError("--expect-sum and --dtype are only for diffs in Alpaca's format")
        recover_exact_diff(args.base, args.diff, args.tuned)
        result = "base, diff and tuned model match the manifest"
    elif args.tuned is None and args.expect_sum is None:
        raise UserError(f"{args.diff} has no manifest: verify it by --expect-sum")
    else:
        dtype = DTYPES[args.dtype or "fp32"]
        recover_float_diff(args.base, args.diff, args.tuned, dtype, args.expect_sum)
        result = "no checksum given" if args.expect_sum is None else "the sum is as expected"
    written = f"{args.tuned}: {size_of(args.tuned)};" if args.tuned else f"{args.diff}:"
    return f"{written} {result}"


def is_exact(diff: Path) -> bool:
    if not diff.is_dir():
        raise UserError(f"{diff}: no such folder")
    return any((diff / name).exists() for name in (BITS, "manifest.json", "manifest.sha256"))


def size_of(folder: Path) -> str:
    _, tensors = open_checkpoint(folder)
    dtypes = {str(stored.dtype).removeprefix("torch.") for stored in tensors.values()}
    size = sum(tensor_bytes(dict(tensors)).values())
    return f"{len(tensors)} tensors of {join_names(sorted(dtypes))}, {size:,} bytes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    make = verbs.add_parser("make", help="write the difference of two models").add_argument
    recover = verbs.add_parser("recover", help="write the tuned model").add_argument
    verify = verbs.add_parser("verify", help="check as recover does, write nothing").add_argument
    for flag in (make, recover, verify):
        flag("--base", type=Path, required=True, help="folder of the base model")
        flag("--diff", type=Path, required=True, help="folder of the diff")
    make("--tuned", type=Path, required=True, help="folder of the fine-tuned model")
    make("--format", choices=("exact", "alpaca"), default="exact", help="(default: exact)")
    recover("--tuned", type=Path, required=True, help="folder to write")
    recover("--dtype", choices=DTYPES, help="to write, for Alpaca's format (default: fp32)")
    for flag in (recover, verify):
        text = "the sum of all weights, for Alpaca's format (50637.1836 for its 7B)"
        flag("--expect-sum", type=finite, metavar="SUM", help=text)
    verbs.choices["verify"].set_defaults(tuned=None, dtype=None)


def run(args: argparse.Namespace) -> None:
    if args.verb == "make":
        refuse_existing(args.diff)
        exact = args.format == "exact"
        (make_exact_diff if exact else make_float_diff)(args.base, args.tuned, args.diff)
        print(f"{args.diff}: {size_of(args.diff / BITS if exact else args.diff)}")
    else:
        print(recover_or_verify(args))


def main() -> None:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
