"""Publish a fine-tuned model as a difference to its base, and put it together again, bit for bit.

    python weightdiff.py make    --base llama-7b --tuned runs/alpaca/model --diff alpaca-diff
    python weightdiff.py recover --base llama-7b --diff alpaca-diff --tuned alpaca-7b
    python weightdiff.py verify  --base llama-7b --diff alpaca-diff    # digests; writes nothing
    python weightdiff.py info    --diff alpaca-diff

Whoever has the base can use the diff; without the base it is noise, so it may be published where
the weights may not. Worth knowing:

  - Bit patterns are subtracted, as integers that wrap around: tuned = base + diff in every bit, NaN
    and -0.0 too. (Differences of floats, which Alpaca published, are rounded.)
  - manifest.json has SHA-256 digests of every tensor of base, diff and result, and of every other
    file. What does not match is named, and nothing appears under the name that was asked for.
  - Tensors go through in pieces, two threads or so at a time: memory does not grow with the model.
    A run that was interrupted goes on where it stopped; start the same command again.
  - Rules: a base of another dtype is converted to the tuned one's. Rows that a grown vocabulary
    added, and tensors which only the tuned model has, are differences to zero. Where just the base
    has its head tied to the embedding, that is the base's head. All of it is said.
  - A diff without a manifest is taken for one like Alpaca's (float differences, rows that were
    added compared with the mean row); `make --format alpaca` writes such a one.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import console
from checkpoint import (
    DTYPES,
    OBSOLETE,
    TOKENIZER_FILES,
    Shards,
    Stored,
    as_dtype,
    check_tensors,
    is_meta,
    open_file,
    parameter_shapes,
    read_config,
    save_model,
    stored_tensors,
    weight_files,
    write_json,
)
from config_json import config_to_json
from model import LlamaConfig

FORMAT = "bitwise difference, 1"
PIECE = 1 << 23  # bytes of a tensor in work at a time, by each thread
THREADS = min(4, (os.cpu_count() or 1) + 1)  # reading, hashing and writing overlap
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TOLERANCE = 1e-2  # of Alpaca's sum over all weights
NAMED = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)


class Entry(NamedTuple):
    """A tensor in the manifest: what it is, and SHA-256 digests of its three sides."""

    dtype: str
    shape: list[int]
    known: int  # how many of its numbers the base has; the rest are differences to zero
    base: str  # of those numbers, in the tuned one's dtype
    diff: str  # of the file
    tuned: str


# ---------------------------------------------------------------- one tensor, piece by piece


def pieces(count: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    step = PIECE // dtype.itemsize
    return ((start, min(start + step, count)) for start in range(0, count, step))


def flat(stored: Stored | None, most: int) -> Tensor | None:
    return None if stored is None else stored.read().contiguous().flatten()[:most]


def bits(numbers: Tensor | None, dtype: torch.dtype, start: int, stop: int) -> np.ndarray:
    """Numbers start to stop as integers; zeros where there are none."""
    own = torch.empty(0, dtype=dtype) if numbers is None else numbers[start:stop]
    found = as_dtype(own, dtype, "the base").view(INTEGER[dtype.itemsize]).numpy()
    missing = stop - start - len(found)
    return np.concatenate([found, np.zeros(missing, found.dtype)]) if missing else found


def packed(difference: np.ndarray) -> bytes:
    """Differences are small numbers of either sign. Zigzag (0, -1, 1, -2 → 0, 1, 2, 3) makes their
    high bytes zero, and bytes of one place side by side compress well."""
    sign = difference >> (8 * difference.itemsize - 1)
    zigzag = (difference << 1) ^ sign
    planes = zigzag.view(np.uint8).reshape(-1, difference.itemsize).T
    content = zlib.compress(planes.tobytes(), 1)
    return len(content).to_bytes(4, "little") + content


def unpacked(content: bytes, dtype: np.dtype, size: int) -> np.ndarray:
    planes = zlib.decompressobj().decompress(content, size + 1)
    if len(planes) != size:
        raise zlib.error
    interleaved = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1).T
    zigzag = np.ascontiguousarray(interleaved).view(f"u{dtype.itemsize}").ravel()
    return ((zigzag >> 1) ^ (0 - (zigzag & 1))).view(dtype)


def make_tensor(
    base: Stored | None, tuned: Stored, file: Path, compress: bool, step: Callable[[int], None]
) -> Entry:
    """Write one tensor's difference, durably. The digests are of what was read and written."""
    dtype, count = tuned.dtype, tuned.shape.numel()
    ours, theirs = flat(tuned, count), flat(base, count)
    known = 0 if theirs is None else len(theirs)
    digests = [hashlib.sha256() for _ in range(3)]
    with open(file, "wb") as opened:
        for start, stop in pieces(count, dtype):
            b, t = (bits(side, dtype, start, stop) for side in (theirs, ours))
            content = packed(t - b) if compress else (t - b).data
            opened.write(content)
            for digest, of in zip(digests, (b[: max(0, known - start)], content, t), strict=True):
                digest.update(of)
            step(t.nbytes)
        opened.flush()
        os.fsync(opened.fileno())
    named = str(dtype).removeprefix("torch.")
    return Entry(named, list(tuned.shape), known, *(digest.hexdigest() for digest in digests))


def recover_tensor(
    name: str,
    entry: Entry,
    base: Stored | None,
    file: Path,
    compress: bool,
    write: Callable[[int, np.ndarray], None],
) -> None:
    """Hand the bits of base + diff to `write(offset, bits)`; a ValueError tells what is wrong."""
    dtype, count = getattr(torch, entry.dtype), math.prod(entry.shape)
    theirs = flat(base, entry.known)
    if (0 if theirs is None else len(theirs)) != entry.known:
        raise ValueError(f"the base is another one: its {name} is missing or smaller")
    damaged = ValueError(f"{file}: the diff of {name} is damaged: fetch it again")
    digests = [hashlib.sha256() for _ in range(3)]
    with open(file, "rb") as opened:
        for start, stop in pieces(count, dtype):
            b = bits(theirs, dtype, start, stop)
            head = opened.read(4) if compress else b""
            size = int.from_bytes(head, "little") if compress else b.nbytes
            content = opened.read(min(size, 2 * b.nbytes + 1024))
            try:
                d = unpacked(content, b.dtype, b.nbytes) if compress else content
                t = b + np.frombuffer(d, b.dtype)
            except (zlib.error, ValueError):  # not packed data, or too little of it
                raise damaged from None
            used = b[: max(0, entry.known - start)]
            for digest, of in zip(digests, (used, head + content, t), strict=True):
                digest.update(of)
            write(start * dtype.itemsize, t)
        if opened.read(1):
            raise damaged
    base_is, diff_is, tuned_is = (digest.hexdigest() for digest in digests)
    if diff_is != entry.diff:
        raise damaged
    if base_is != entry.base:
        raise ValueError(f"the base is another one: its {name} is not what the diff was made from")
    if tuned_is != entry.tuned:
        raise ValueError(f"{file}: base and diff of {name} are right, but not what they make")


def in_threads(work: Callable[[str], Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, result) as they come; the first error stops what has not begun."""
    executor = ThreadPoolExecutor(THREADS)
    try:
        futures = {executor.submit(work, name): name for name in names}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        executor.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- two models


def all_tensors(folder: Path) -> dict[str, Stored]:
    """A whole checkpoint's, in the order of the model."""
    config, found = read_config(folder), stored_tensors(folder)
    check_tensors(found, config, folder)
    return {name: found[name] for name in parameter_shapes(config)}


def base_tensors(folder: Path, wanted: Container[str]) -> dict[str, Stored]:
    """The base's, its embedding for a head that only the tuned model has of its own."""
    found = all_tensors(folder)
    if HEAD in wanted and HEAD not in found:
        console.notice("the base's head is tied to its embedding: that is what is compared")
        found[HEAD] = found[EMBEDDING]
    return found


def rules(base: dict[str, Stored], tuned: dict[str, Stored]) -> list[str]:
    """What is to be said about two models that differ in more than numbers, or why that is too
    much."""
    said, misfits = [], []
    for name in (name for name in tuned if name in base):
        ours, theirs = tuned[name].shape, base[name].shape
        if ours[1:] != theirs[1:] or (ours != theirs and name not in (HEAD, EMBEDDING)):
            misfits.append(f"{name} is {list(ours)}, in the base {list(theirs)}")
        elif ours[0] > theirs[0]:
            said.append(f"{name}: rows from {theirs[0]} on are the tuned model's alone")
        elif ours[0] < theirs[0]:
            said.append(f"{name}: rows from {ours[0]} on are the base's alone")
    if misfits:
        raise ValueError(f"base and tuned model differ in shape: {console.listed(misfits, 3)}")
    both = [(base[name].dtype, tuned[name].dtype) for name in tuned if name in base]
    for theirs, ours in sorted({pair for pair in both if pair[0] != pair[1]}, key=str):
        said.append(f"the base is {theirs} and is converted to {ours}".replace("torch.", ""))
    for whose, names in (("tuned model", tuned.keys() - base), ("base", base.keys() - tuned)):
        if names:
            said.append(f"only the {whose} has {console.listed(sorted(names))}")
    return said


def make(base: Path, tuned: Path, diff: Path, compress: bool) -> None:
    ours = all_tensors(tuned)
    theirs = base_tensors(base, ours)
    said = rules(theirs, ours)
    for line in said:
        console.notice(line)
    begun = {"compress": compress, "inputs": fingerprint(base) + fingerprint(tuned)}
    with console.atomic_folder(diff, resume=True) as partial:
        log = partial / "progress.jsonl"
        first, *lines = [*console.read_log(log)] or [None]
        if first != begun:  # nothing was begun, or something else
            lines = []
            log.unlink(missing_ok=True)
            console.append_jsonl(log, begun)
        done = {line["name"]: Entry(**line["entry"]) for line in lines}
        progress, step = byte_progress(ours, done)

        def work(name: str) -> Entry:
            file = partial / f"{name}.diff"
            entry = make_tensor(theirs.get(name), ours[name], file, compress, step)
            console.append_jsonl(log, {"name": name, "entry": entry._asdict()})
            return entry

        done |= dict(in_threads(work, [name for name in ours if name not in done]))
        files = copy_files(tuned, partial, next(iter(ours.values())).dtype)
        manifest = {"format": FORMAT, "compressed": compress, "said": said, "files": files}
        manifest["tensors"] = {name: done[name]._asdict() for name in ours}
        text = json.dumps(manifest, indent=1).encode()
        (partial / "manifest.json").write_bytes(text)
        (partial / "manifest.sha256").write_bytes(seal_of(text))
        log.unlink()
    progress.close(str(diff))


def recover(base: Path, diff: Path, tuned: Path | None) -> None:
    """`tuned` None: check all there is to check, and write nothing."""
    manifest, entries = read_manifest(diff)
    theirs = base_tensors(base, entries)
    shapes = {n: (torch.Size(e.shape), getattr(torch, e.dtype)) for n, e in entries.items()}
    progress, step = byte_progress(shapes)

    def work(name: str, write: Callable[[int, np.ndarray], None]) -> None:
        def stepping(offset: int, numbers: np.ndarray) -> None:
            write(offset, numbers)
            step(numbers.nbytes)

        file, compress = diff / f"{name}.diff", manifest["compressed"]
        recover_tensor(name, entries[name], theirs.get(name), file, compress, stepping)

    if tuned is None:
        for _ in in_threads(lambda name: work(name, lambda offset, numbers: None), entries):
            pass
        return progress.close("everything is as it should be")
    with (
        console.atomic_folder(tuned, resume=True) as partial,
        Shards(partial, shapes, keep=True) as shards,
    ):

        def placed(name: str) -> None:
            if shards.digest(name) == entries[name].tuned:  # an interrupted run wrote it
                return step(size_of(*shapes[name]))
            work(name, lambda offset, numbers: shards.place(name, offset, numbers))

        for _ in in_threads(placed, entries):
            pass
        for name in manifest["files"]:
            shutil.copyfile(diff / name, partial / name)
    progress.close(str(tuned))


def fingerprint(folder: Path) -> list[list]:
    """What would tell that a folder is another one than when a run began."""
    states = [(file, file.stat()) for file in sorted(folder.iterdir())]
    return [[str(f.absolute()), state.st_size, state.st_mtime_ns] for f, state in states]


def copy_files(tuned: Path, partial: Path, dtype: torch.dtype) -> dict[str, str]:
    """Config and tokenizer as they are, and their digests."""
    if is_meta(tuned):
        write_json(partial / "config.json", config_to_json(read_config(tuned), dtype))
    for name in COPIED:
        if (tuned / name).is_file():
            shutil.copyfile(tuned / name, partial / name)
    there = [partial / name for name in COPIED if (partial / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in there}


def read_manifest(diff: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The manifest and its tensors, once all that is no tensor is seen to be right."""
    text, seal = ((diff / name).read_bytes() for name in ("manifest.json", "manifest.sha256"))
    if seal != seal_of(text):
        raise ValueError(
            f"{diff}: manifest.json is not what manifest.sha256 says: fetch both again"
        )
    manifest = console.read_json(diff / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{diff}: {manifest.get('format')!r}; this version reads {FORMAT!r}")
    try:
        files, tensors = dict(manifest["files"]), dict(manifest["tensors"])
        entries = {name: Entry(**fields) for name, fields in tensors.items()}
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{diff}: manifest.json is not laid out as this version does") from None
    if "config.json" not in files or not files.keys() <= set(COPIED):  # they are written by us
        raise ValueError(f"{diff}: files other than {', '.join(COPIED)} have no place in a diff")
    for name, digest in files.items():
        if hashlib.sha256((diff / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{diff / name} is damaged: fetch it again")
    shapes = parameter_shapes(read_config(diff))
    if entries.keys() != shapes.keys():
        raise ValueError(f"{diff}: the manifest's tensors are not those of config.json")
    for name, shape in shapes.items():
        entry = entries[name]
        known = entry.known if type(entry.known) is int else -1
        if (
            list(shape) != entry.shape
            or entry.dtype not in NAMED
            or known not in range(shape.numel() + 1)
        ):
            raise ValueError(f"{diff}: {name} in the manifest is not what config.json says")
    if absent := [f"{name}.diff" for name in entries if not (diff / f"{name}.diff").is_file()]:
        raise ValueError(f"{diff}: {console.listed(absent)} is missing: fetch it again")
    return manifest, entries


def seal_of(manifest: bytes) -> bytes:
    """As sha256sum writes it, so that `sha256sum -c manifest.sha256` checks it too."""
    return f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()


def size_of(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def byte_progress(
    whole: dict[str, Stored | tuple], done: Container[str] = ()
) -> tuple[console.Progress, Callable[[int], None]]:
    """A progress line in bytes, and what threads may call to move it."""
    sizes = {name: size_of(*tensor[:2]) for name, tensor in whole.items()}
    before = sum(size for name, size in sizes.items() if name in done)
    progress, lock = console.Progress(sum(sizes.values()), "bytes", done=before), Lock()

    def step(count: int) -> None:
        with lock:
            progress.step(count)

    return progress, step


# ---------------------------------------------------------------- diffs as Alpaca published them


def in_fp32(base: Path, other: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, base, other), one at a time. Rows that the base lacks are the mean of those it has, as
    Alpaca's training began with."""
    theirs = all_tensors(other)
    ours = base_tensors(base, theirs)
    if absent := [name for name in theirs if name not in ours]:
        raise ValueError(f"the base has no {console.listed(absent)}: Alpaca's format needs it")
    for line in rules(ours, theirs):
        console.notice(line)
    progress, step = byte_progress(theirs)
    for name, stored in theirs.items():
        numbers, rows = ours[name].read().float()[: stored.shape[0]], stored.shape[0]
        if rows > len(numbers):
            mean = numbers.mean(dim=0, keepdim=True)
            numbers = torch.cat([numbers, mean.expand(rows - len(numbers), -1)])
        yield name, numbers, stored.read().float()
        step(size_of(*stored[:2]))
    progress.close()


def make_alpaca(base: Path, tuned: Path, diff: Path) -> None:
    differences = ((name, other - ours) for name, ours, other in in_fp32(base, tuned))
    save_model(differences, read_config(tuned), diff, torch.float32, tokenizer_in(tuned))


def recover_alpaca(
    base: Path, diff: Path, tuned: Path | None, dtype: torch.dtype, expected: float | None
) -> None:
    """With `expected`, the sum over all weights is compared before the folder appears: all that
    Alpaca published to check by. Old files carry rotary tables, which that sum counts."""
    config = read_config(diff)
    tables = sum(
        bool(OBSOLETE.search(name)) for file in weight_files(diff) for name, _ in open_file(file)
    )
    total = torch.zeros(())

    def sums() -> Iterator[tuple[str, Tensor]]:
        nonlocal total
        for name, ours, difference in in_fp32(base, diff):
            weights = ours + difference
            total = total + weights.sum()
            yield name, weights
        total = total + tables * inverse_frequencies(config).sum()
        console.notice(f"the sum over all weights is {total.item():.4f}")
        if expected is not None and not abs(total.item() - expected) <= TOLERANCE:
            raise ValueError(
                f"--expect-sum says {expected}: base or diff is another one, or damaged"
            )

    if tuned is None:
        for _ in sums():
            pass
    else:
        save_model(sums(), config, tuned, dtype, tokenizer_in(diff))


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return 1.0 / config.rope_theta**exponents


def tokenizer_in(folder: Path) -> Path | None:
    there = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return folder if there else None


# ---------------------------------------------------------------- commands


def make_command(args) -> None:
    if args.format == "exact":
        make(args.base, args.tuned, args.diff, args.compress)
    elif args.compress:
        raise ValueError("--compress is for the exact format: Alpaca's has plain fp32 files")
    else:
        make_alpaca(args.base, args.tuned, args.diff)


def recover_command(args) -> None:
    """Both `recover` and `verify`, which has no --tuned."""
    if exact(args.diff):
        if args.expect_sum is not None or args.dtype:
            raise ValueError(
                "--expect-sum and --dtype are for diffs like Alpaca's; this one is exact"
            )
        return recover(args.base, args.diff, args.tuned)
    if args.tuned is None and args.expect_sum is None:
        raise ValueError(f"{args.diff} has no manifest: all it can be verified by is --expect-sum")
    dtype = DTYPES[args.dtype or "fp32"]
    recover_alpaca(args.base, args.diff, args.tuned, dtype, args.expect_sum)


def exact(diff: Path) -> bool:
    if not diff.is_dir():
        raise ValueError(f"{diff}: no such folder")
    return any((diff / name).exists() for name in ("manifest.json", "manifest.sha256"))


def info_command(args) -> None:
    """What a diff holds."""
    if not exact(args.diff):
        found = all_tensors(args.diff)
        size = sum(size_of(*stored[:2]) for stored in found.values())
        return print(
            f"{args.diff}: like Alpaca's, {len(found)} tensors, {size:,} bytes, no digests"
        )
    manifest, entries = read_manifest(args.diff)
    whole = sum(size_of(entry.shape, getattr(torch, entry.dtype)) for entry in entries.values())
    size = sum((args.diff / f"{name}.diff").stat().st_size for name in entries)
    kinds = ", ".join(sorted({entry.dtype for entry in entries.values()}))
    print(f"{args.diff}: {manifest['format']}, {len(entries)} tensors of {kinds}")
    print(f"{size:,} bytes for a model of {whole:,} ({size / whole:.1%})")
    for line in (*manifest["said"], *manifest["files"]):
        print(f"  {line}")


def parse_args() -> argparse.Namespace:
    parser = console.Parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    helps = {
        "make": ("the difference between two models", make_command),
        "recover": ("base and diff make the tuned model", recover_command),
        "verify": ("the same without writing it", recover_command),
        "info": ("what a diff holds", info_command),
    }
    for verb, (text, command) in helps.items():
        add = verbs.add_parser(verb, help=text).add_argument
        verbs.choices[verb].set_defaults(command=command, tuned=None)
        if verb != "info":
            add("--base", type=Path, required=True, help="folder of the base model")
        if verb == "make":
            add("--tuned", type=Path, required=True, help="folder of the fine-tuned model")
        add("--diff", type=Path, required=True, help="folder of the diff")
        if verb == "make":
            add("--compress", action="store_true", help="slower, smaller (see README.md)")
            add(
                "--format",
                choices=("exact", "alpaca"),
                default="exact",
                help="alpaca: float differences in fp32, without digests (default: exact)",
            )
        if verb == "recover":
            add("--tuned", type=Path, required=True, help="folder to write")
        if verb in ("recover", "verify"):
            add(
                "--expect-sum",
                type=float,
                metavar="SUM",
                help="of a diff like Alpaca's: the sum over all weights (50637.1836 for its 7B)",
            )
            add(
                "--dtype",
                choices=DTYPES,
                help="of what is recovered from a diff like Alpaca's (default: fp32, as it did)",
            )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.command(args)


if __name__ == "__main__":
    console.run(main)
