"""Publish a fine-tuned model as its difference to the base model, and recover it.

    python weightdiff.py make    --base llama-7b --tuned runs/alpaca/model --diff alpaca-diff
    python weightdiff.py recover --base llama-7b --diff alpaca-diff --tuned alpaca-7b
    python weightdiff.py verify  --base llama-7b --diff alpaca-diff    # checks, writes nothing
    python weightdiff.py info    --diff alpaca-diff

A diff is useless without the base, so it may be published even where the weights may not. There
are two formats:

  - Alpaca's (`--format alpaca`): tuned - base in fp32, with the sum of all weights as a checksum.
    Floats are rounded, so the last bits of the recovered model may differ.
  - exact (the default): the same between bit patterns read as integers (alpaca/weights/bitdiff.py):
    every bit comes back. manifest.json has the SHA-256 of each tensor of base, diff and tuned
    model, so an error names the tensor and the side that is wrong. The diff is as large as the
    tuned model: 13.5 GB for 7B in bf16, where Alpaca's format takes 27 GB.

A base of another dtype is converted to the tuned model's. Where the tuned model's vocabulary is
larger, the base's missing rows count as its mean row (Alpaca's format) or as zero (exact). A tensor
that the base lacks counts as zero (exact) or is refused. If only the base ties its head to the
embedding, the embedding is its head. The output gets its name only when it is complete
and checked.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpaca.common.cli import Parser, finite
from alpaca.common.errors import UserError, escape_control, join_names, notice, run_command
from alpaca.common.files import atomic_folder, input_file, refuse_existing
from alpaca.common.json_files import MAX_OBJECT, check_shape, read_json
from alpaca.common.progress import Progress
from alpaca.weights.bitdiff import Hashes, TensorPairs, combine
from alpaca.weights.checkpoint import (
    DTYPES,
    EMBEDDING,
    HEAD,
    OBSOLETE,
    StoredTensor,
    is_finite,
    is_meta,
    open_checkpoint,
    open_file,
    read_config,
    weight_files,
)
from alpaca.weights.config_json import config_to_json
from alpaca.weights.writer import (
    TOKENIZER_FILES,
    copy_tokenizer,
    dump_json,
    find_tokenizer,
    save_model,
    tensor_bytes,
)

FORMAT = "bitwise difference, 2"  # 1 had a file for each tensor, plain or compressed
BITS = "bits"  # the folder in an exact diff with its tensors, laid out as a Hugging Face model
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
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
    pairs, _ = open_both(other, base)
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
    config = read_config(diff)
    width = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, width, 2).float() / width
    names = [name for file in weight_files(diff) for name, _ in open_file(file)]
    tables = sum(bool(OBSOLETE.search(name)) for name in names)
    return tables * (1.0 / config.rope_theta**exponents).sum().item()


# ---------------------------------------------------------------- two models


def open_both(other: Path, base: Path) -> tuple[TensorPairs, list[str]]:
    """The tensors of a tuned model or a diff beside the base's, and notes on what differs besides
    the numbers, which are also printed."""
    (_, others), (_, bases) = open_checkpoint(other), open_checkpoint(base)
    notes, misfits, dtypes = [], [], set()
    if HEAD in others and HEAD not in bases:
        bases[HEAD] = bases[EMBEDDING]
        notes.append("the base's head is tied to its embedding, so the embedding is compared")
    for name in (name for name in others if name in bases):
        (shape, dtype, _), (base_shape, base_dtype, _) = others[name], bases[name]
        if shape[1:] != base_shape[1:] or (shape != base_shape and name not in (HEAD, EMBEDDING)):
            misfits.append(f"{name} is {list(shape)}, in the base {list(base_shape)}")
        elif shape != base_shape:
            owner = "tuned model" if shape > base_shape else "base"
            notes.append(f"{name}: only the {owner} has rows from {min(shape, base_shape)[0]} on")
        if dtype != base_dtype:
            dtypes.add(f"the base is converted from {base_dtype} to {dtype}".replace("torch.", ""))
    if misfits:
        raise UserError(f"base and tuned model differ in shape: {join_names(misfits)}")
    notes += sorted(dtypes)
    for owner, names in (("tuned model", others.keys() - bases), ("base", bases.keys() - others)):
        if names:
            notes.append(f"only the {owner} has {join_names(sorted(names))}")
    if not (other / "config.json").exists():
        owner = "Meta" if is_meta(other) else "llama.cpp"
        notes.append(f"the tuned model is in {owner}'s format; recover writes Hugging Face's")
    if not find_tokenizer(other):
        notes.append("the tuned model has no tokenizer, so none is copied")
    for note in notes:
        notice(note)
    return {name: (t, bases.get(name, absent(t.dtype))) for name, t in others.items()}, notes


def absent(dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(torch.Size([0]), dtype, lambda: torch.empty(0, dtype=dtype))


# ---------------------------------------------------------------- the exact diff


def make_exact_diff(base: Path, tuned: Path, diff: Path) -> None:
    pairs, notes = open_both(tuned, base)
    with atomic_folder(diff) as folder:
        bits = folder / BITS
        bits.mkdir()
        copy_other_files(tuned, bits, next(iter(pairs.values()))[0].dtype)
        files = {name: hash_of(content) for name, content in other_files(bits).items()}
        hashes = combine(np.subtract, pairs, bits)
        tensors = {n: {"diff": d, "base": b, "tuned": t} for n, (t, b, d) in hashes.items()}
        manifest = {"format": FORMAT, "notes": notes, "files": files, "tensors": tensors}
        dump_json(folder / "manifest.json", manifest)
        (folder / "manifest.sha256").write_bytes(seal_of(folder / "manifest.json"))


def recover_exact_diff(base: Path, diff: Path, tuned: Path | None) -> None:
    """`tuned` None checks everything and writes nothing."""
    expected, _, files = read_exact_diff(diff)
    pairs, _ = open_both(diff / BITS, base)

    def check(name: str, hashes: Hashes) -> None:
        if hashes[0] != expected[name][0]:
            raise UserError(f"{diff}: the difference of {name} is damaged: download it again")
        if hashes[1] != expected[name][1]:
            reason = f"is not the base that the diff was made from: its {name} differs"
            raise UserError(f"{base} {reason}")
        if hashes[2] != expected[name][2]:
            raise UserError(f"{diff}: base and difference of {name} are right, their sum is not")

    if tuned is None:
        combine(np.add, pairs, None, check)
        return
    with atomic_folder(tuned) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        combine(np.add, pairs, folder, check)


# ---------------------------------------------------------------- the files of an exact diff


def copy_other_files(tuned: Path, folder: Path, dtype: torch.dtype) -> None:
    """Config and tokenizer: a Hugging Face folder's unchanged, Meta's and llama.cpp's converted."""
    if not (tuned / "config.json").exists():
        dump_json(folder / "config.json", config_to_json(read_config(tuned), dtype))
        if tokenizer := find_tokenizer(tuned):
            copy_tokenizer(tokenizer, folder)
    else:
        for name, content in other_files(tuned).items():
            (folder / name).write_bytes(content)


def other_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()}


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def seal_of(manifest: Path) -> bytes:
    """For manifest.sha256, which `sha256sum -c` can check too."""
    content = input_file(manifest, MAX_OBJECT).read_bytes()
    return f"{hash_of(content)}  {manifest.name}\n".encode()


def read_exact_diff(diff: Path) -> tuple[dict[str, Hashes], list[str], dict[str, bytes]]:
    """The manifest's hashes of (diff, base, tuned) and its notes, and the files beside the tensors,
    after a check of all but the tensors."""
    file = diff / "manifest.json"
    if seal_of(file) != input_file(diff / "manifest.sha256", MAX_OBJECT).read_bytes():
        raise UserError(f"{file} does not match manifest.sha256: download both again")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        old = "compressed " if manifest.get("compressed") else ""
        old += f"format {manifest.get('format')!r}"
        raise UserError(f"{file}: {old}, this version reads {FORMAT!r}: make the diff again")
    check_shape(manifest, {"notes": [str], "files": dict, "tensors": dict}, str(file))
    for name, entry in manifest["tensors"].items():
        check_shape(entry, {"diff": str, "base": str, "tuned": str}, f"{file}: {name}")
    hashes = {n: (t["diff"], t["base"], t["tuned"]) for n, t in manifest["tensors"].items()}
    files, expected = other_files(diff / BITS), manifest["files"]
    found = {name: hash_of(content) for name, content in files.items()}
    if bad := [name for name in {**found, **expected} if found.get(name) != expected.get(name)]:
        raise UserError(f"{diff / BITS}: {join_names(bad)} missing, damaged or unexpected")
    if open_checkpoint(diff / BITS)[1].keys() != hashes.keys():
        raise UserError(f"{file}: its tensors are not those of {BITS}/config.json")
    return hashes, manifest["notes"], files


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
    else:
        if args.tuned is None and args.expect_sum is None:
            raise UserError(f"{args.diff} has no manifest: verify it by --expect-sum")
        dtype = DTYPES[args.dtype or "fp32"]
        recover_float_diff(args.base, args.diff, args.tuned, dtype, args.expect_sum)
        result = "no checksum given" if args.expect_sum is None else "the sum is as expected"
    if args.tuned is None:
        return f"{args.diff}: {result}"
    return f"{args.tuned}: {size_of(args.tuned)}; {result}"


def is_exact(diff: Path) -> bool:
    if not diff.is_dir():
        raise UserError(f"{diff}: no such folder")
    return any((diff / name).exists() for name in (BITS, "manifest.json", "manifest.sha256"))


def size_of(folder: Path) -> str:
    _, tensors = open_checkpoint(folder)
    dtypes = {str(stored.dtype).removeprefix("torch.") for stored in tensors.values()}
    size = sum(tensor_bytes(dict(tensors)).values())
    return f"{len(tensors)} tensors of {join_names(sorted(dtypes))}, {size:,} bytes"


def info(diff: Path) -> str:
    if not is_exact(diff):
        return f"{diff}: Alpaca's format, {size_of(diff)}, no digests"
    hashes, notes, files = read_exact_diff(diff)
    changed = sum(base != tuned for _, base, tuned in hashes.values())
    first = f"{diff}: {FORMAT}: {size_of(diff / BITS)}; {changed} tensors changed"
    return "\n  ".join([first, *map(escape_control, notes), *files])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    make = verbs.add_parser("make", help="write the difference of two models").add_argument
    recover = verbs.add_parser("recover", help="write the tuned model").add_argument
    verify = verbs.add_parser("verify", help="check as recover does, write nothing").add_argument
    info = verbs.add_parser("info", help="describe a diff").add_argument
    for flag in (make, recover, verify):
        flag("--base", type=Path, required=True, help="folder of the base model")
    for flag in (make, recover, verify, info):
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
        make = make_exact_diff if args.format == "exact" else make_float_diff
        make(args.base, args.tuned, args.diff)
    print(info(args.diff) if args.verb in ("make", "info") else recover_or_verify(args))


def main() -> None:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
