"""Weights and config on disk ↔ a model, one tensor at a time.

    alpaca convert llama/7B llama-7b-hf --dtype bf16

Read are Hugging Face folders (`config.json`; `model.safetensors` or `pytorch_model.bin`, whole or
in shards with an index) and Meta's (`params.json`; see meta_format.py). Written are Hugging Face
folders in safetensors (shards.py) that transformers opens as they are.

  - Files are memory-mapped: a weight that needs no other dtype or device is used where it lies, any
    other is converted by itself, so loading never takes more memory than the model it makes.
  - Pickles (`.bin`, `.pth`) are read with `weights_only=True`: tensors and nothing that runs.
  - All that is wrong with a checkpoint stands in one error: missing, unexpected, misshapen tensors.
  - A config that asks for what model.py does not compute is refused by name (config_json.py).
  - A folder appears under its name when every byte of it is on disk, and not before.

Shown by tests/test_checkpoint.py: test_transformers_opens_what_we_write.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alpaca.common.cli import Parser, positive
from alpaca.common.errors import UserError, join_names, run_command
from alpaca.common.files import atomic_folder, read_json
from alpaca.common.progress import Progress
from alpaca.weights import meta_format
from alpaca.weights.config_json import config_to_json, typed_config, understood
from alpaca.weights.shards import SHARD_BYTES, Shards
from model import Llama, LlamaConfig
from tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OBSOLETE = re.compile(r"rotary_emb\.inv_freq|rope\.freqs")  # tables that old files carry along
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
TOKENIZER_CONFIG = {  # beside a bare tokenizer.model: without it AutoTokenizer forgets BOS
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


class Stored(NamedTuple):
    """A tensor on disk: what it is, and the function that maps it into memory."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


def read_config(folder: str | Path) -> LlamaConfig:
    """The architecture of a checkpoint folder, or a ValueError naming what is not supported."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    file = folder / ("params.json" if is_meta(folder) else "config.json")
    if not file.exists():
        raise UserError(f"{folder}: no config.json (Hugging Face) or params.json (Meta) in it")
    fields, shards = read_json(file), load_shards(folder) if is_meta(folder) else []
    try:
        flat = meta_format.config_fields(fields, shards) if shards else understood(fields)
        return typed_config(flat)
    except ValueError as mistake:
        raise UserError(f"{file}: {mistake}") from None


def is_meta(folder: Path) -> bool:
    return not (folder / "config.json").exists() and (folder / "params.json").exists()


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Hugging Face name → tensor on disk, for every tensor of a checkpoint folder."""
    folder, found = Path(folder), {}
    if is_meta(folder):
        entries = meta_format.renamed(load_shards(folder), read_config(folder))
        found = {name: Stored(*entry) for name, entry in entries.items()}
    else:
        for file, promised in weight_files(folder).items():
            here = {name: Stored(t.shape, t.dtype, lambda t=t: t) for name, t in open_file(file)}
            odd = sorted(promised ^ here.keys()) if promised is not None else []
            if odd := [name for name in odd if not OBSOLETE.search(name)]:
                raise UserError(
                    f"{file}: holds other tensors than its index says: {join_names(odd)}"
                )
            found |= here
    return {name: stored for name, stored in found.items() if not OBSOLETE.search(name)}


def tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a checkpoint; a tensor's bytes are read when they are touched."""
    return ((name, stored.read()) for name, stored in stored_tensors(folder).items())


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """A Hugging Face folder's weight files, each with what its index promises (None: no index)."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return {folder / name: None}
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        files: dict[Path, set[str]] = {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: it has no weight_map")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or file != os.path.basename(file):
                raise UserError(f"{index}: {file!r} is not the name of a file beside it")
            files.setdefault(folder / file, set()).add(tensor)
        if absent := [file.name for file in files if not file.exists()]:
            raise UserError(f"{index}: names files that are not there: {join_names(absent)}")
        return files
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin, nor an index of shards")


def open_file(file: Path) -> Iterable[tuple[str, Tensor]]:
    """The tensors of one file, memory-mapped. A pickle that would run code is refused unrun."""
    with file.open("rb") as opened:
        start = opened.read(32)
    if not start or start.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer: fetch the file itself with `git lfs pull`" if start else "empty"
        raise UserError(f"{file}: {what}")
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            return [(name, handle.get_tensor(name)) for name in handle.keys()]  # noqa: SIM118
        zipped = zipfile.is_zipfile(file)  # torch before 1.6 wrote files that cannot be mapped
        table = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
    except SafetensorError as mistake:
        raise UserError(f"{file}: damaged or cut short ({mistake})") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: not plain tensors; it could run code, so it is not read"
        ) from None
    except Exception as mistake:  # whatever a damaged pickle provokes
        reason = str(mistake).strip().split("\n")[0]
        raise UserError(f"{file}: not a readable file of plain tensors ({reason})") from None
    if not isinstance(table, dict) or not all(isinstance(t, Tensor) for t in table.values()):
        raise UserError(f"{file}: not a flat table of tensors")
    return table.items()


def load_shards(folder: Path) -> list[dict[str, Tensor]]:
    """A Meta folder's consolidated.*.pth, in order and without gaps."""
    names = sorted(file.name for file in folder.glob("consolidated.*.pth"))
    complete = [f"consolidated.{i:02}.pth" for i in range(len(names))] or ["consolidated.00.pth"]
    if absent := [name for name in complete if name not in names]:
        raise UserError(f"{folder}: {join_names(absent)} is missing")
    shards = [dict(open_file(folder / name)) for name in complete]
    for name, shard in zip(complete, shards, strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{folder / name}: not the tensors of {complete[0]}: {join_names(odd)}")
    return shards


def parameter_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Llama(config).named_parameters()}


def check_tensors(
    found: dict[str, Stored], config: LlamaConfig, where: str | Path
) -> dict[str, Stored]:
    """The tensors a config calls for, in the order of the model; or one error with all that is
    missing, misshapen or too much."""
    wanted, problems, misfits = parameter_shapes(config), [], []
    extra = found.keys() - wanted.keys()
    if config.tie_word_embeddings and HEAD in extra:
        extra.remove(HEAD)
        if EMBEDDING in found and not same_bits(found[HEAD], found[EMBEDDING]):
            problems.append(f"{HEAD} is not the embedding, though tie_word_embeddings is on")
    if absent := [name for name in wanted if name not in found]:
        problems.append(f"missing {join_names(absent)}")
    if extra:
        problems.append(f"unexpected {join_names(sorted(extra))}")
    for name in (name for name in wanted if name in found):
        shape, dtype = list(found[name].shape), found[name].dtype
        if shape != list(wanted[name]):
            misfits.append(f"{name} is {shape} where the config says {list(wanted[name])}")
        elif dtype not in DTYPES.values():
            misfits.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
    if misfits:
        problems.append(join_names(misfits))
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return {name: found[name] for name in wanted}


def open_checkpoint(folder: str | Path) -> tuple[LlamaConfig, dict[str, Stored]]:
    config = read_config(folder)
    return config, check_tensors(stored_tensors(folder), config, folder)


def same_bits(a: Stored, b: Stored) -> bool:
    """NaN equals itself here, and -0.0 is not 0.0."""
    first, second = (stored.read().flatten().view(torch.uint8) for stored in (a, b))
    return a[:2] == b[:2] and torch.equal(first, second)


def as_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor itself if it has that dtype already; an error if its numbers do not fit fp16."""
    result = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and tensor.numel():
        finite = all(extreme.isfinite() for extreme in result.aminmax())  # NaN is such an extreme
        if not finite and (result.isinf() & tensor.isfinite()).any():
            raise UserError(f"{name} holds numbers too large for fp16: use bf16 or fp32")
    return result


def save_model(
    source: Llama | Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder from a model, or from (name, tensor) pairs in any order.

    One tensor is in memory at a time: the config tells beforehand where each will stand. `dtype`
    None keeps the first tensor's; `tokenizer` is the folder, or the file, to copy beside."""
    pairs = iter(source.named_parameters() if isinstance(source, Llama) else source)
    first = next(pairs, ("", torch.empty(0)))
    dtype = dtype or first[1].dtype
    if dtype not in DTYPES.values():
        raise UserError(f"weights are written as {', '.join(DTYPES)}, not as {dtype}")
    shapes = {name: (shape, dtype) for name, shape in parameter_shapes(config).items()}
    with atomic_folder(folder) as partial, Shards(partial, shapes, shard_bytes) as shards:
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), partial)
        write_json(partial / "config.json", config_to_json(config, dtype))
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        write_json(partial / "generation_config.json", ends)
        for name, tensor in chain([first], pairs):
            shards.write(name, as_dtype(tensor.detach().cpu(), dtype, name))
        if shards.pending:
            raise UserError(f"{folder}: missing {join_names(shards.pending)}")


def tokenizer_files(source: Path) -> dict[str, Path]:
    """What to copy from a tokenizer's folder, or from a tokenizer.model itself, and as what."""
    if source.is_file():
        return {"tokenizer.model": source}
    found = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    if not found.keys() & {"tokenizer.model", "tokenizer.json"}:
        raise UserError(f"{source}: no tokenizer.model or tokenizer.json there")
    return found


def tokenizer_in(folder: Path) -> Path | None:
    """The folder, if it holds a tokenizer; Meta's download keeps it one folder up."""
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return folder
    above = folder.absolute().parent / "tokenizer.model"
    return above if is_meta(folder) and above.is_file() else None


def tokenizer_for(folder: Path, given: Path | None) -> Path:
    """What is copied beside a model that is made of the one in `folder`."""
    if found := given or tokenizer_in(folder):
        return found
    raise UserError(f"{folder}: no tokenizer there: name one with --tokenizer FILE")


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name, file in tokenizer_files(source).items():
        shutil.copyfile(file, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def convert(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    positions: int | None,
) -> None:
    """Any checkpoint this project reads → a Hugging Face folder in safetensors."""
    config, found = open_checkpoint(source)
    tokenizer = tokenizer_for(source, tokenizer)
    if positions is not None:
        config = replace(config, max_position_embeddings=positions)
    if file := tokenizer_files(tokenizer).get("tokenizer.model"):
        pieces = Tokenizer(file)
        pieces.check(config)
        config = replace(config, bos_token_id=pieces.bos_id, eos_token_id=pieces.eos_id)
    progress = Progress(sum(t.shape.numel() for t in found.values()), "weights")

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name, stored in found.items():
            yield name, stored.read()
            progress.step(stored.shape.numel())

    save_model(pairs(), config, target, dtype, tokenizer)
    guessed = is_meta(source) and positions is None
    told = " (params.json does not say: see --positions)" if guessed else ""
    progress.close(f"{target}, {config.max_position_embeddings} positions{told}")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    flag = verbs.add_parser("convert", help="write a checkpoint as a Hugging Face one").add_argument
    flag("source", type=Path, help="Hugging Face or Meta folder to read")
    flag("target", type=Path, help="folder to write, which must not exist yet")
    flag("--dtype", choices=DTYPES, help="of the weights (default: what they are)")
    flag("--tokenizer", type=Path, help="to copy (default: the source's; Meta's lies above it)")
    flag(
        "--positions",
        type=positive(int),
        help="tokens the model was trained on at once (default: the config's; for Meta's folders, "
        "which do not say, 2048, 4096 or 16384 by release)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    convert(args.source, args.target, DTYPES.get(args.dtype), args.tokenizer, args.positions)


if __name__ == "__main__":
    run_command(main)
