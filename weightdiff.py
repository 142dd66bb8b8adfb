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
  - Tensors go through in pieces, by a few threads: memory does not grow with the model. Exceptions:
    of Meta folders and in Alpaca's format whole tensors are held, and a pickle from before torch
    1.6 is read as a whole.
  - A run that was interrupted goes on where it stopped; start the same command again. Only with
    Alpaca's format it starts anew, which is quick beside downloading the weights.
  - Rules: a base of another dtype is converted to the tuned one's. Rows that a grown vocabulary
    added, and tensors which only the tuned model has, are differences to zero. Where just the base
    has its head tied to the embedding, that is the base's head. All of it is said.
  - A diff without a manifest is taken for one like Alpaca's (float differences, rows that were
    added compared with the mean row); `make --format alpaca` writes such a one.

Shown by tests/test_weightdiff.py: test_every_bit_comes_back.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Collection, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from alpaca.common.cli import Parser, run_subcommand
from alpaca.common.errors import UserError, escape_control, join_names, notice, run_command
from alpaca.common.files import (
    append_jsonl,
    atomic_folder,
    fsync_path,
    read_json,
    read_log,
    refuse_existing,
)
from alpaca.common.progress import Progress
from alpaca.weights.bitdiff import Entry, dtype_name, make_tensor, recovered_pieces
from alpaca.weights.checkpoint import (
    DTYPES,
    EMBEDDING,
    HEAD,
    OBSOLETE,
    StoredTensor,
    is_meta,
    open_checkpoint,
    open_file,
    parameter_shapes,
    read_config,
    weight_files,
)
from alpaca.weights.config_json import config_to_json
from alpaca.weights.writer import (
    SHARD_BYTES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    ShardWriter,
    find_tokenizer,
    plan_shards,
    save_model,
    tensor_bytes,
    tokenizer_files,
)
from model import LlamaConfig

FORMAT = "bitwise difference, 1"
LAYOUT = {"format": str, "compressed": bool, "said": list, "files": dict, "tensors": dict}
THREADS = min(4, (os.cpu_count() or 1) + 1)  # reading, hashing and writing overlap
# Of Alpaca's sum over all weights. It was added up in fp32, tensor after tensor: around 50,000 each
# addition rounds by up to 0.002, so that the order alone can move the total by 0.04.
TOLERANCE = 0.05
NAMED = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
LOG = "progress.jsonl"


def in_threads(work: Callable[[str], Any], names: Collection[str]) -> dict[str, Any]:
    """Name → result. Of several errors it is the first name's, the same in each run; what has not
    begun by then does not begin."""
    executor = ThreadPoolExecutor(THREADS)
    try:
        return dict(zip(names, executor.map(work, names), strict=True))
    finally:
        executor.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- two models


def base_tensors(folder: Path, wanted: Container[str]) -> dict[str, StoredTensor]:
    """The base's, its embedding for a head that only the tuned model has of its own."""
    _, found = open_checkpoint(folder)
    if HEAD in wanted and HEAD not in found:
        found[HEAD] = found[EMBEDDING]
    return found


def remarks(
    base: dict[str, StoredTensor], tuned: dict[str, StoredTensor], folder: Path
) -> list[str]:
    """What is to be said about two models that differ in more than numbers, or why that is too
    much; and about the tuned one's folder."""
    said, misfits = [], []
    if HEAD in tuned and base.get(HEAD) is base[EMBEDDING]:
        said.append("the base's head is tied to its embedding: that is what is compared")
    for name in (name for name in tuned if name in base):
        ours, theirs = tuned[name].shape, base[name].shape
        if ours[1:] != theirs[1:] or (ours != theirs and name not in (HEAD, EMBEDDING)):
            misfits.append(f"{name} is {list(ours)}, in the base {list(theirs)}")
        elif ours[0] > theirs[0]:
            said.append(f"{name}: rows from {theirs[0]} on are the tuned model's alone")
        elif ours[0] < theirs[0]:
            said.append(f"{name}: rows from {ours[0]} on are the base's alone")
    if misfits:
        raise UserError(f"base and tuned model differ in shape: {join_names(misfits, 3)}")
    both = [(base[name].dtype, tuned[name].dtype) for name in tuned if name in base]
    for theirs, ours in sorted({pair for pair in both if pair[0] != pair[1]}, key=str):
        said.append(f"the base is {theirs} and is converted to {ours}".replace("torch.", ""))
    for whose, names in (("tuned model", tuned.keys() - base), ("base", base.keys() - tuned)):
        if names:
            said.append(f"only the {whose} has {join_names(sorted(names))}")
    if is_meta(folder):
        said.append("the tuned model is Meta's; what is recovered will be a Hugging Face folder")
    if not find_tokenizer(folder):
        said.append("the tuned model has no tokenizer, so none comes along")
    return said


def make(base: Path, tuned: Path, diff: Path, compress: bool) -> None:
    _, ours = open_checkpoint(tuned)
    theirs = base_tensors(base, ours)
    files = other_files(tuned, next(iter(ours.values())).dtype)
    said = remarks(theirs, ours, tuned)
    inputs = fingerprint(base) + fingerprint(tuned)
    begun = {"format": FORMAT, "compress": compress, "inputs": inputs}
    with atomic_folder(diff, keep={LOG, *(f"{name}.diff" for name in ours)}) as partial:
        for line in said:
            notice(line)
        log = partial / LOG
        logged, sizes = entries_of(log, begun), tensor_bytes(ours)
        progress, step = byte_progress(ours)

        def work(name: str) -> Entry:
            file, entry = partial / f"{name}.diff", logged.get(name)
            if entry and file.exists() and digest_of(file) == entry.diff:
                step(sizes[name])  # an interrupted run wrote it
                return entry
            entry = make_tensor(name, theirs.get(name), ours[name], file, compress, step)
            append_jsonl(log, {"name": name, "entry": entry._asdict()})
            return entry

        entries = in_threads(work, ours)
        manifest = {"format": FORMAT, "compressed": compress, "said": said}
        manifest["files"] = {n: hashlib.sha256(content).hexdigest() for n, content in files.items()}
        manifest["tensors"] = {name: entry._asdict() for name, entry in entries.items()}
        text = json.dumps(manifest, indent=1).encode()
        files |= {"manifest.json": text, "manifest.sha256": seal_of(text)}
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for file in partial.iterdir():
            fsync_path(file)
        log.unlink()  # last: nothing that takes time is left to be killed in
    progress.close()


def recover(base: Path, diff: Path, tuned: Path | None) -> None:
    """`tuned` None: check all there is to check, and write nothing."""
    manifest, entries, files = read_manifest(diff)
    theirs, shapes = base_tensors(base, entries), shapes_of(entries)
    known = [name for name in theirs if name in entries and entries[name].known]
    for was, now in sorted({(entries[n].base_dtype, dtype_name(theirs[n])) for n in known}):
        if was != now:
            notice(f"the diff was made from a base in {was}, this one is {now}")
    sizes, (progress, step) = tensor_bytes(shapes), byte_progress(shapes)

    def work(name: str, place: Callable = lambda name, at, numbers: None) -> None:
        its = entries[name], theirs.get(name), diff / f"{name}.diff"
        for at, numbers in recovered_pieces(name, *its, manifest["compressed"]):
            place(name, at, numbers)
            step(numbers.nbytes)

    if tuned is None:
        in_threads(work, entries)
        return progress.close()
    with atomic_folder(tuned, keep=plan_shards(shapes, SHARD_BYTES)) as partial:
        interrupted = any(partial.iterdir())
        with ShardWriter(partial, shapes, SHARD_BYTES) as shards:

            def go_on(name: str) -> None:
                if interrupted and shards.digest(name) == entries[name].tuned:
                    step(sizes[name])
                else:
                    work(name, shards.write_part)

            in_threads(go_on, entries)
        for name, content in files.items():
            (partial / name).write_bytes(content)
    progress.close()


def shapes_of(entries: dict[str, Entry]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {n: (torch.Size(e.shape), getattr(torch, e.dtype)) for n, e in entries.items()}


def fingerprint(folder: Path) -> list[list]:
    """What would tell that a model is another one than when a run began."""
    if is_meta(folder):
        files = [folder / "params.json", *sorted(folder.glob("consolidated.*.pth"))]
    else:
        files = [folder / "config.json", *weight_files(folder)]
    return [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def entries_of(log: Path, begun: dict[str, Any]) -> dict[str, Entry]:
    """What an interrupted run has done, if that was begun alike; a new log otherwise."""
    first, *lines = [*read_log(log)] or [None]
    if first == begun:
        return {line["name"]: Entry(**line["entry"]) for line in lines}
    log.unlink(missing_ok=True)
    append_jsonl(log, begun)
    return {}


def digest_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def other_files(tuned: Path, dtype: torch.dtype) -> dict[str, bytes]:
    """Config and tokenizer; a Hugging Face folder's as they are."""
    found = {name: tuned / name for name in COPIED if (tuned / name).is_file()}
    made = {}
    if is_meta(tuned):
        made["config.json"] = config_to_json(read_config(tuned), dtype)
        if tokenizer := find_tokenizer(tuned):
            found |= tokenizer_files(tokenizer)
            made["tokenizer_config.json"] = TOKENIZER_CONFIG
    written = {name: f"{json.dumps(fields, indent=2)}\n".encode() for name, fields in made.items()}
    return written | {name: file.read_bytes() for name, file in found.items()}


def read_manifest(diff: Path) -> tuple[dict[str, Any], dict[str, Entry], dict[str, bytes]]:
    """The manifest, its tensors, and the other files, which are what it says."""
    text, seal = ((diff / name).read_bytes() for name in ("manifest.json", "manifest.sha256"))
    if seal != seal_of(text):
        raise UserError(f"{diff}: manifest.json is not what manifest.sha256 says: fetch both")
    manifest = read_json(diff / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{diff}: {manifest.get('format')!r}; this version reads {FORMAT!r}")
    try:
        if [type(manifest[key]) for key in LAYOUT] != [*LAYOUT.values()]:
            raise TypeError
        "".join(manifest["said"])  # a TypeError, unless all of it is text
        entries = {name: Entry(**fields) for name, fields in manifest["tensors"].items()}
    except (LookupError, TypeError):
        raise UserError(f"{diff}: manifest.json is not laid out as this version does") from None
    files = manifest["files"]
    if "config.json" not in files or not files.keys() <= set(COPIED):  # they are written by us
        raise UserError(f"{diff}: files other than {', '.join(COPIED)} have no place in a diff")
    contents = {name: (diff / name).read_bytes() for name in files}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != files[name]:
            raise UserError(f"{diff / name} is damaged: fetch it again")
    shapes = parameter_shapes(read_config(diff))
    if entries.keys() != shapes.keys():
        raise UserError(f"{diff}: the manifest's tensors are not those of config.json")
    if odd := [name for name, shape in shapes.items() if not sound(entries[name], shape)]:
        raise UserError(f"{diff}: {odd[0]} in the manifest is not what config.json says")
    if absent := [f"{name}.diff" for name in entries if not (diff / f"{name}.diff").is_file()]:
        raise UserError(f"{diff}: {join_names(absent)} is missing: fetch it again")
    return manifest, entries, contents


def sound(entry: Entry, shape: torch.Size) -> bool:
    """Whether a manifest can say that of a tensor; repr, since 2.0 and true are numbers, too."""
    return (
        [type(value) for value in entry] == [str, list, int, str, str, str, str]
        and repr(entry.shape) == repr(list(shape))
        and 0 <= entry.known <= shape.numel()
        and entry.dtype in NAMED
    )


def seal_of(manifest: bytes) -> bytes:
    """As sha256sum writes it, so that `sha256sum -c manifest.sha256` checks it too."""
    return f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()


def byte_progress(whole: dict[str, tuple]) -> tuple[Progress, Callable[[int], None]]:
    """A progress line in bytes, and what threads may call to move it."""
    progress, lock = Progress(sum(tensor_bytes(whole).values()), "bytes"), Lock()

    def step(count: int) -> None:
        with lock:
            progress.step(count)

    return progress, step


# ---------------------------------------------------------------- diffs as Alpaca published them


def in_fp32(base: Path, other: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, base, other), one at a time. Rows that the base lacks are the mean of those it has, as
    Alpaca's training began with."""
    _, theirs = open_checkpoint(other)
    ours = base_tensors(base, theirs)
    if absent := [name for name in theirs if name not in ours]:
        raise UserError(f"the base has no {join_names(absent)}: Alpaca's format needs it")
    for line in remarks(ours, theirs, other):
        notice(line)
    progress, _ = byte_progress(theirs)
    for name, stored in theirs.items():
        rows = stored.shape[0]
        numbers = ours[name].read().float()[:rows]
        if rows > len(numbers):
            mean = numbers.mean(dim=0, keepdim=True)
            numbers = torch.cat([numbers, mean.expand(rows - len(numbers), -1)])
        yield name, numbers, stored.read().float()
        progress.step(stored.shape.numel() * stored.dtype.itemsize)
    progress.close()


def make_alpaca(base: Path, tuned: Path, diff: Path) -> None:
    differences = ((name, other - ours) for name, ours, other in in_fp32(base, tuned))
    save_model(differences, read_config(tuned), diff, torch.float32, find_tokenizer(tuned))


def recover_alpaca(
    base: Path, diff: Path, tuned: Path | None, dtype: torch.dtype, expected: float | None
) -> None:
    """With `expected`, the sum over all weights is compared before the folder appears: all that
    Alpaca published to check by. Old files carry rotary tables, which that sum counts."""
    config = read_config(diff)
    tables = sum(
        bool(OBSOLETE.search(name)) for file in weight_files(diff) for name, _ in open_file(file)
    )

    def sums() -> Iterator[tuple[str, Tensor]]:
        total = tables * inverse_frequencies(config).sum().item()
        for name, ours, difference in in_fp32(base, diff):
            weights = ours + difference
            total += weights.sum().item()
            yield name, weights
        if expected is not None and not abs(total - expected) <= TOLERANCE:
            raise UserError(
                f"the sum over all weights is {total:.4f}, --expect-sum says {expected}: base or "
                "diff is another one, or damaged"
            )
        notice(f"the sum over all weights is {total:.4f}")

    if tuned is None:
        for _ in sums():
            pass
    else:
        save_model(sums(), config, tuned, dtype, find_tokenizer(diff))


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return 1.0 / config.rope_theta**exponents


# ---------------------------------------------------------------- commands


def make_command(args) -> None:
    refuse_existing(args.diff)
    if args.format == "exact":
        make(args.base, args.tuned, args.diff, args.compress)
    elif args.compress:
        raise UserError("--compress is for the exact format: Alpaca's has plain fp32 files")
    else:
        make_alpaca(args.base, args.tuned, args.diff)
    print(summary(args.diff))


def recover_command(args) -> None:
    """Both `recover` and `verify`, which has no --tuned."""
    if args.tuned is not None:
        refuse_existing(args.tuned)
    if exact(args.diff):
        if args.expect_sum is not None or args.dtype:
            raise UserError("--expect-sum and --dtype are for diffs like Alpaca's, not this one")
        recover(args.base, args.diff, args.tuned)
        found = "base, diff and result have the digests that the manifest says"
    else:
        if args.tuned is None and args.expect_sum is None:
            raise UserError(f"{args.diff} has no manifest: verify it by --expect-sum")
        dtype = DTYPES[args.dtype or "fp32"]
        recover_alpaca(args.base, args.diff, args.tuned, dtype, args.expect_sum)
        found = "no digests to check by" if args.expect_sum is None else "the sum is as expected"
    print(f"{args.tuned}: {held(args.tuned)}; {found}" if args.tuned else f"{args.diff}: {found}")


def exact(diff: Path) -> bool:
    if not diff.is_dir():
        raise UserError(f"{diff}: no such folder")
    return any((diff / name).exists() for name in ("manifest.json", "manifest.sha256"))


def held(folder: Path) -> str:
    _, found = open_checkpoint(folder)
    return f"{len(found)} tensors, {sum(tensor_bytes(found).values()):,} bytes"


def summary(diff: Path) -> str:
    if not exact(diff):
        return f"{diff}: like Alpaca's, {held(diff)}, no digests"
    _, entries, _ = read_manifest(diff)
    whole = sum(tensor_bytes(shapes_of(entries)).values())
    size = sum((diff / f"{name}.diff").stat().st_size for name in entries)
    kinds = ", ".join(sorted({entry.dtype for entry in entries.values()}))
    changed = sum(entry.base != entry.tuned for entry in entries.values())
    return (
        f"{diff}: {FORMAT.replace(', ', ', format version ')}\n"
        f"{len(entries)} tensors of {kinds}, {changed} of them changed; "
        f"{size:,} bytes for a model of {whole:,} ({size / whole:.1%})"
    )


def info_command(args) -> None:
    print(summary(args.diff))
    if exact(args.diff):
        manifest, _, _ = read_manifest(args.diff)
        for line in (*manifest["said"], *manifest["files"]):
            print(f"  {escape_control(line)}")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, command: Callable, help: str) -> Callable:
        verbs.add_parser(name, help=help).set_defaults(
            command=command, tuned=None, expect_sum=None, dtype=None
        )
        flag = verbs.choices[name].add_argument
        if name != "info":
            flag("--base", type=Path, required=True, help="folder of the base model")
        flag("--diff", type=Path, required=True, help="folder of the diff")
        return flag

    make = verb("make", make_command, "the difference between two models")
    make("--tuned", type=Path, required=True, help="folder of the fine-tuned model")
    make("--compress", action="store_true", help="slower, smaller (see README.md)")
    told = "alpaca: float differences in fp32, without digests (default: exact)"
    make("--format", choices=("exact", "alpaca"), default="exact", help=told)
    recover = verb("recover", recover_command, "base and diff make the tuned model")
    recover("--tuned", type=Path, required=True, help="folder to write")
    told = "of what is recovered from a diff like Alpaca's (default: fp32, as it did)"
    recover("--dtype", choices=DTYPES, help=told)
    verify = verb("verify", recover_command, "the same without writing it")
    told = "of a diff like Alpaca's: the sum over all weights (50637.1836 for its 7B)"
    for flag in (recover, verify):
        flag("--expect-sum", type=float, metavar="SUM", help=told)
    verb("info", info_command, "what a diff holds")
    return parser.parse_args()


def main() -> None:
    run_subcommand(parse_args())


if __name__ == "__main__":
    run_command(main)
