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

import numpy as np
import torch
from torch import Tensor

import console
from bitdiff import Entry, dtype_name, make_tensor, recover_tensor
from checkpoint import (
    DTYPES,
    OBSOLETE,
    SHARD_BYTES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    Shards,
    Stored,
    check_tensors,
    is_meta,
    open_file,
    parameter_shapes,
    read_config,
    save_model,
    shards_of,
    stored_tensors,
    tensor_bytes,
    tokenizer_files,
    tokenizer_in,
    weight_files,
)
from config_json import config_to_json
from model import LlamaConfig

FORMAT = "bitwise difference, 1"
LAYOUT = {"format": str, "compressed": bool, "said": list, "files": dict, "tensors": dict}
THREADS = min(4, (os.cpu_count() or 1) + 1)  # reading, hashing and writing overlap
# Of Alpaca's sum over all weights. It was added up in fp32, tensor after tensor: around 50,000 each
# addition rounds by up to 0.002, so that the order alone can move the total by 0.04.
TOLERANCE = 0.05
NAMED = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
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


def all_tensors(folder: Path) -> dict[str, Stored]:
    """A whole checkpoint's, in the order of the model."""
    config, found = read_config(folder), stored_tensors(folder)
    check_tensors(found, config, folder)
    return {name: found[name] for name in parameter_shapes(config)}


def base_tensors(folder: Path, wanted: Container[str]) -> dict[str, Stored]:
    """The base's, its embedding for a head that only the tuned model has of its own."""
    found = all_tensors(folder)
    if HEAD in wanted and HEAD not in found:
        found[HEAD] = found[EMBEDDING]
    return found


def rules(base: dict[str, Stored], tuned: dict[str, Stored]) -> list[str]:
    """What is to be said about two models that differ in more than numbers, or why that is too
    much."""
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
        raise ValueError(f"base and tuned model differ in shape: {console.listed(misfits, 3)}")
    both = [(base[name].dtype, tuned[name].dtype) for name in tuned if name in base]
    for theirs, ours in sorted({pair for pair in both if pair[0] != pair[1]}, key=str):
        said.append(f"the base is {theirs} and is converted to {ours}".replace("torch.", ""))
    for whose, names in (("tuned model", tuned.keys() - base), ("base", base.keys() - tuned)):
        if names:
            said.append(f"only the {whose} has {console.listed(sorted(names))}")
    return said


def of_the_folder(tuned: Path) -> list[str]:
    """What is to be said about files other than weights."""
    said = []
    if is_meta(tuned):
        said.append("the tuned model is Meta's; what is recovered will be a Hugging Face folder")
    if not tokenizer_in(tuned):
        said.append("the tuned model has no tokenizer, so none comes along")
    return said


def make(base: Path, tuned: Path, diff: Path, compress: bool) -> None:
    ours = all_tensors(tuned)
    theirs = base_tensors(base, ours)
    files = other_files(tuned, next(iter(ours.values())).dtype)
    said = rules(theirs, ours) + of_the_folder(tuned)
    begun = {"format": FORMAT, "compress": compress}
    begun["inputs"] = fingerprint(base) + fingerprint(tuned)
    with console.atomic_folder(diff, keep={LOG, *(f"{name}.diff" for name in ours)}) as partial:
        for line in said:
            console.notice(line)
        log = partial / LOG
        logged, sizes = entries_of(log, begun), tensor_bytes(ours)
        progress, step = byte_progress(ours)

        def work(name: str) -> Entry:
            file, entry = partial / f"{name}.diff", logged.get(name)
            if entry and file.exists() and digest_of(file) == entry.diff:
                step(sizes[name])  # an interrupted run wrote it
                return entry
            entry = make_tensor(name, theirs.get(name), ours[name], file, compress, step)
            console.append_jsonl(log, {"name": name, "entry": entry._asdict()})
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
            console.sync(file)
        log.unlink()  # last: nothing that takes time is left to be killed in
    progress.close(str(diff))


def recover(base: Path, diff: Path, tuned: Path | None) -> None:
    """`tuned` None: check all there is to check, and write nothing."""
    manifest, entries, files = read_manifest(diff)
    theirs = base_tensors(base, entries)
    shapes = {n: (torch.Size(e.shape), getattr(torch, e.dtype)) for n, e in entries.items()}
    progress, step = byte_progress(shapes)
    sizes = tensor_bytes(shapes)
    known = [name for name in theirs if name in entries and entries[name].known]
    both = {(entries[name].base_dtype, dtype_name(theirs[name])) for name in known}
    for was, now in sorted(pair for pair in both if pair[0] != pair[1]):
        console.notice(f"the diff was made from a base in {was}, this one is {now}")

    def work(name: str, write: Callable[[int, np.ndarray], None]) -> None:
        def stepping(offset: int, numbers: np.ndarray) -> None:
            write(offset, numbers)
            step(numbers.nbytes)

        file = diff / f"{name}.diff"
        recover_tensor(
            name, entries[name], theirs.get(name), file, manifest["compressed"], stepping
        )

    if tuned is None:
        in_threads(lambda name: work(name, lambda offset, numbers: None), entries)
        return progress.close("everything is as it should be")
    with (
        console.atomic_folder(tuned, keep=shards_of(shapes, SHARD_BYTES)) as partial,
        Shards(partial, shapes, SHARD_BYTES, keep=True) as shards,
    ):

        def placed(name: str) -> None:
            if shards.digest(name) == entries[name].tuned:  # an interrupted run wrote it
                return step(sizes[name])
            work(name, lambda offset, numbers: shards.place(name, offset, numbers))

        in_threads(placed, entries)
        for name, content in files.items():
            (partial / name).write_bytes(content)
    progress.close(str(tuned))


def fingerprint(folder: Path) -> list[list]:
    """What would tell that a model is another one than when a run began."""
    if is_meta(folder):
        files = [folder / "params.json", *sorted(folder.glob("consolidated.*.pth"))]
    else:
        files = [folder / "config.json", *weight_files(folder)]
    states = [(file, file.stat()) for file in files]
    return [[str(f.absolute()), state.st_size, state.st_mtime_ns] for f, state in states]


def entries_of(log: Path, begun: dict[str, Any]) -> dict[str, Entry]:
    """What an interrupted run has done, if that was begun alike; a new log otherwise."""
    first, *lines = [*console.read_log(log)] or [None]
    if first == begun:
        return {line["name"]: Entry(**line["entry"]) for line in lines}
    log.unlink(missing_ok=True)
    console.append_jsonl(log, begun)
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
        if tokenizer := tokenizer_in(tuned):
            found |= tokenizer_files(tokenizer)
            made["tokenizer_config.json"] = TOKENIZER_CONFIG
    written = {name: f"{json.dumps(fields, indent=2)}\n".encode() for name, fields in made.items()}
    return written | {name: file.read_bytes() for name, file in found.items()}


def read_manifest(diff: Path) -> tuple[dict[str, Any], dict[str, Entry], dict[str, bytes]]:
    """The manifest, its tensors, and the other files, which are what it says."""
    text, seal = ((diff / name).read_bytes() for name in ("manifest.json", "manifest.sha256"))
    if seal != seal_of(text):
        raise ValueError(
            f"{diff}: manifest.json is not what manifest.sha256 says: fetch both again"
        )
    manifest = console.read_json(diff / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{diff}: {manifest.get('format')!r}; this version reads {FORMAT!r}")
    try:
        typed = all(type(manifest[key]) is kind for key, kind in LAYOUT.items())
        typed &= all(type(line) is str for line in manifest["said"])
        entries = {name: Entry(**fields) for name, fields in manifest["tensors"].items()}
    except (AttributeError, LookupError, TypeError):
        typed = False
    if not typed:
        raise ValueError(f"{diff}: manifest.json is not laid out as this version does")
    files = manifest["files"]
    if "config.json" not in files or not files.keys() <= set(COPIED):  # they are written by us
        raise ValueError(f"{diff}: files other than {', '.join(COPIED)} have no place in a diff")
    contents = {name: (diff / name).read_bytes() for name in files}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != files[name]:
            raise ValueError(f"{diff / name} is damaged: fetch it again")
    shapes = parameter_shapes(read_config(diff), diff / "config.json")
    if entries.keys() != shapes.keys():
        raise ValueError(f"{diff}: the manifest's tensors are not those of config.json")
    if odd := [name for name, shape in shapes.items() if not sound(entries[name], shape)]:
        raise ValueError(f"{diff}: {odd[0]} in the manifest is not what config.json says")
    if absent := [f"{name}.diff" for name in entries if not (diff / f"{name}.diff").is_file()]:
        raise ValueError(f"{diff}: {console.listed(absent)} is missing: fetch it again")
    return manifest, entries, contents


def sound(entry: Entry, shape: torch.Size) -> bool:
    """Whether a manifest can say that of a tensor; repr, since 2.0 and true are numbers, too."""
    texts = (entry.dtype, entry.base_dtype, entry.base, entry.diff, entry.tuned)
    return (
        repr(entry.shape) == repr(list(shape))
        and type(entry.known) is int
        and 0 <= entry.known <= shape.numel()
        and all(type(text) is str for text in texts)
        and entry.dtype in NAMED
    )


def seal_of(manifest: bytes) -> bytes:
    """As sha256sum writes it, so that `sha256sum -c manifest.sha256` checks it too."""
    return f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()


def byte_progress(
    whole: dict[str, Stored | tuple],
) -> tuple[console.Progress, Callable[[int], None]]:
    """A progress line in bytes, and what threads may call to move it."""
    progress, lock = console.Progress(sum(tensor_bytes(whole).values()), "bytes"), Lock()

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
    for line in rules(ours, theirs) + of_the_folder(other):
        console.notice(line)
    progress, step = byte_progress(theirs)
    sizes = tensor_bytes(theirs)
    for name, stored in theirs.items():
        numbers, rows = ours[name].read().float()[: stored.shape[0]], stored.shape[0]
        if rows > len(numbers):
            mean = numbers.mean(dim=0, keepdim=True)
            numbers = torch.cat([numbers, mean.expand(rows - len(numbers), -1)])
        yield name, numbers, stored.read().float()
        step(sizes[name])
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

    def sums() -> Iterator[tuple[str, Tensor]]:
        total = tables * inverse_frequencies(config).sum().item()
        for name, ours, difference in in_fp32(base, diff):
            weights = ours + difference
            total += weights.sum().item()
            yield name, weights
        if expected is not None and not abs(total - expected) <= TOLERANCE:
            raise ValueError(
                f"the sum over all weights is {total:.4f}, --expect-sum says {expected}: base or "
                "diff is another one, or damaged"
            )
        console.notice(f"the sum over all weights is {total:.4f}")

    if tuned is None:
        for _ in sums():
            pass
    else:
        save_model(sums(), config, tuned, dtype, tokenizer_in(diff))


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return 1.0 / config.rope_theta**exponents


# ---------------------------------------------------------------- commands


def make_command(args) -> None:
    console.refuse_existing(args.diff)
    if args.format == "exact":
        make(args.base, args.tuned, args.diff, args.compress)
    elif args.compress:
        raise ValueError("--compress is for the exact format: Alpaca's has plain fp32 files")
    else:
        make_alpaca(args.base, args.tuned, args.diff)


def recover_command(args) -> None:
    """Both `recover` and `verify`, which has no --tuned."""
    if args.tuned is not None:
        console.refuse_existing(args.tuned)
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
        size = sum(tensor_bytes(found).values())
        return print(
            f"{args.diff}: like Alpaca's, {len(found)} tensors, {size:,} bytes, no digests"
        )
    manifest, entries, _ = read_manifest(args.diff)
    shapes = {name: (entry.shape, getattr(torch, entry.dtype)) for name, entry in entries.items()}
    whole = sum(tensor_bytes(shapes).values())
    size = sum((args.diff / f"{name}.diff").stat().st_size for name in entries)
    kinds = ", ".join(sorted({entry.dtype for entry in entries.values()}))
    print(f"{args.diff}: {manifest['format']}, {len(entries)} tensors of {kinds}")
    print(f"{size:,} bytes for a model of {whole:,} ({size / whole:.1%})")
    for line in (*manifest["said"], *manifest["files"]):
        print(f"  {console.printable(line)}")


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
    console.run_verb(parse_args())


if __name__ == "__main__":
    console.run(main)
