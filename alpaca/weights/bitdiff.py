"""The exact difference of two models: their bit patterns, subtracted as integers.

    make_exact_diff(base, tuned, diff)       # weightdiff.py make
    recover_exact_diff(base, diff, tuned)    # weightdiff.py recover

A difference of floats is rounded, so base + (tuned - base) is not always tuned. But the bits of a
float are also an integer of the same size, and integers that wrap around (modulo 2^16 or 2^32) form
a group. For any two bit patterns, those of NaN and -0.0 too,

    diff = tuned - base    gives    diff + base = tuned

For example, 1.0 in bf16 has the bits 0x3f80 and the next larger number 0x3f81: the difference is 1.
Read as a float of the same dtype, a difference is a tensor like any other, and is stored as one.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError, join_names, notice
from alpaca.common.files import atomic_folder, input_file
from alpaca.common.json_files import MAX_OBJECT, check_shape, read_json
from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import (
    EMBEDDING,
    HEAD,
    StoredTensor,
    as_dtype,
    is_meta,
    open_checkpoint,
    read_config,
)
from alpaca.weights.config_json import config_to_json
from alpaca.weights.writer import (
    TOKENIZER_FILES,
    ShardWriter,
    copy_tokenizer,
    dump_json,
    find_tokenizer,
    tensor_bytes,
)

FORMAT = "bitwise difference, 2"  # 1 had a file for each tensor, plain or compressed
BITS = "bits"  # the folder in a diff with its tensors, laid out as a Hugging Face model
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
ABSENT = StoredTensor(torch.Size([0]), torch.float32, lambda: torch.empty(0))  # from the base
# name → a tensor of the tuned model (or of the diff), and the base's
TensorPairs = dict[str, tuple[StoredTensor, StoredTensor]]
Hashes = tuple[str, str, str]  # SHA-256 of these two and of the result
INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of a float in bytes
PIECE_BYTES = 1 << 23  # processed at once, so that the memory in use does not grow with a tensor
THREADS = min(4, (os.cpu_count() or 1) + 1)  # reading, hashing and writing overlap


def combine(
    operation: np.ufunc,
    pairs: TensorPairs,
    folder: Path | None,
    check: Callable[[str, Hashes], None] = lambda name, hashes: None,
) -> dict[str, Hashes]:
    """Subtract or add (np.subtract, np.add) the base of every pair, and write the results to
    safetensors files if there is a folder. `check` raises if the hashes of a tensor are wrong."""
    shapes = {name: (other.shape, other.dtype) for name, (other, _) in pairs.items()}
    sizes, hashes = tensor_bytes(shapes), {}
    progress = Progress(sum(sizes.values()), "bytes")

    def work(name: str) -> Hashes:
        write = partial(shards.write_part, name) if shards else lambda start, numbers: None
        found = combine_pair(operation, *pairs[name], write, name)
        check(name, found)
        return found

    writer = ShardWriter(folder, shapes) if folder else nullcontext()
    with writer as shards, ThreadPoolExecutor(THREADS) as threads:
        for name, found in zip(pairs, threads.map(work, pairs), strict=True):
            hashes[name] = found  # an error in `work` is raised here; pairs not begun are dropped
            progress.step(sizes[name])
    progress.close()
    return hashes


def combine_pair(
    operation: np.ufunc,
    other: StoredTensor,
    base: StoredTensor,
    write: Callable[[int, np.ndarray], object],
    name: str,
) -> Hashes:
    """Pass the result to `write` in pieces, as (offset in bytes, integers). The base is converted
    to other's dtype. If it is shorter, zeros follow, which are not hashed."""
    x_all, b_all = other.read().reshape(-1), base.read().reshape(-1)[: other.shape.numel()]
    digests = [hashlib.sha256() for _ in range(3)]
    step = PIECE_BYTES // other.dtype.itemsize
    for start in range(0, len(x_all), step):
        x = bits(x_all[start : start + step])
        b = bits(as_dtype(b_all[start : start + step], other.dtype, f"the base's {name}"))
        result = operation(x, np.pad(b, (0, len(x) - len(b))) if len(b) < len(x) else b)
        for digest, numbers in zip(digests, (x, b, result), strict=True):
            digest.update(numbers.data)
        write(start * other.dtype.itemsize, result)
    return digests[0].hexdigest(), digests[1].hexdigest(), digests[2].hexdigest()


def bits(numbers: Tensor) -> np.ndarray:
    return numbers.view(INTEGERS[numbers.itemsize]).numpy()


# ---------------------------------------------------------------- two models


def open_both(other: Path, base: Path) -> TensorPairs:
    """The tensors of a tuned model or a diff beside the base's; notices say what differs besides
    the numbers."""
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
    return {name: (t, bases.get(name, ABSENT)) for name, t in others.items()}


# ---------------------------------------------------------------- a diff and its recovery


def make_exact_diff(base: Path, tuned: Path, diff: Path) -> None:
    pairs = open_both(tuned, base)
    with atomic_folder(diff) as folder:
        bits = folder / BITS
        bits.mkdir()
        copy_other_files(tuned, bits, next(iter(pairs.values()))[0].dtype)
        files = {name: hash_of(content) for name, content in other_files(bits).items()}
        hashes = combine(np.subtract, pairs, bits)
        tensors = {n: {"diff": d, "base": b, "tuned": t} for n, (t, b, d) in hashes.items()}
        manifest = {"format": FORMAT, "files": files, "tensors": tensors}
        dump_json(folder / "manifest.json", manifest)
        (folder / "manifest.sha256").write_bytes(seal_of(folder / "manifest.json"))


def recover_exact_diff(base: Path, diff: Path, tuned: Path | None) -> None:
    """`tuned` None checks everything and writes nothing."""
    expected, files = read_exact_diff(diff)
    pairs = open_both(diff / BITS, base)

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


# ---------------------------------------------------------------- the files of a diff


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


def read_exact_diff(diff: Path) -> tuple[dict[str, Hashes], dict[str, bytes]]:
    """The manifest's hashes of (diff, base, tuned), and the files beside the tensors, after a check
    of all but the tensors."""
    file = diff / "manifest.json"
    if seal_of(file) != input_file(diff / "manifest.sha256", MAX_OBJECT).read_bytes():
        raise UserError(f"{file} does not match manifest.sha256: download both again")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        old = f"format {manifest.get('format')!r}"
        raise UserError(f"{file}: {old}, this version reads {FORMAT!r}: make the diff again")
    check_shape(manifest, {"files": dict, "tensors": dict}, str(file))
    for name, entry in manifest["tensors"].items():
        check_shape(entry, {"diff": str, "base": str, "tuned": str}, f"{file}: {name}")
    hashes = {n: (t["diff"], t["base"], t["tuned"]) for n, t in manifest["tensors"].items()}
    files, expected = other_files(diff / BITS), manifest["files"]
    found = {name: hash_of(content) for name, content in files.items()}
    if bad := [name for name in {**found, **expected} if found.get(name) != expected.get(name)]:
        raise UserError(f"{diff / BITS}: {join_names(bad)} missing, damaged or unexpected")
    if open_checkpoint(diff / BITS)[1].keys() != hashes.keys():
        raise UserError(f"{file}: its tensors are not those of {BITS}/config.json")
    return hashes, files
