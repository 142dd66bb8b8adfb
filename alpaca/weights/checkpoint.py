"""Reads checkpoints: config and weights on disk, one tensor at a time.

    config, stored = open_checkpoint("llama-7b")       # checked against each other
    weight = stored["model.norm.weight"].read()

Two kinds of folders are read: Hugging Face's (`config.json` beside `model.safetensors` or
`pytorch_model.bin`, in one file or in shards with an index) and Meta's (`params.json`; see
meta_format.py); and llama.cpp's GGUF files (gguf.py), which stand wherever a folder does. All give
Hugging Face's tensor names. Files are memory-mapped: the bytes of a tensor are read when they are
first used. Pickles (`.bin`, `.pth`) are read with `weights_only=True`: no code in them runs.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alpaca.common.errors import UserError, errors_at, join_names
from alpaca.common.files import input_file
from alpaca.common.gguf_file import read_gguf
from alpaca.common.json_files import read_json
from alpaca.weights import meta_format
from alpaca.weights.config_json import config_from_json, typed_config
from alpaca.weights.gguf import gguf_config, gguf_tensors
from model import Llama, LlamaConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD = re.compile(r"[^/\0]+\.(safetensors|bin)")  # a file's name in an index
OBSOLETE = re.compile(r"rotary_emb\.inv_freq|rope\.freqs")  # rotary tables that old files contain


class StoredTensor(NamedTuple):
    """A tensor on disk, and the function that maps it into memory."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


# ---------------------------------------------------------------- files


def open_file(file: Path) -> Iterable[tuple[str, Tensor]]:
    """The tensors of one file, memory-mapped. A pickle that would run code is refused."""
    with input_file(file).open("rb") as opened:
        start = opened.read(32)
    if not start:
        raise UserError(f"{file}: empty")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file}: a Git LFS pointer: fetch the file itself with `git lfs pull`")
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            return [(name, handle.get_tensor(name)) for name in handle.keys()]  # noqa: SIM118
        mmap = zipfile.is_zipfile(file)  # torch before 1.6 wrote files that cannot be mapped
        table = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged or cut short ({error})") from None
    except pickle.UnpicklingError:
        reason = "not plain tensors; it could run code, so it is not read"
        raise UserError(f"{file}: {reason}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file}: not a readable file of plain tensors ({reason})") from None
    if not isinstance(table, dict):
        raise UserError(f"{file}: not a table of tensors")
    for name, tensor in table.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not is_plain(tensor):
            raise UserError(f"{file}: {name!r} is not a plain tensor: save a flat state_dict")
    return [(name, tensor.detach()) for name, tensor in table.items()]


def is_plain(tensor: Tensor) -> bool:
    """Whether a pickle's tensor is dense numbers, each of them in the file."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.is_nested or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """A Hugging Face folder's weight files, each with the tensor names that its index gives (None
    without an index)."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return {folder / name: None}
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        files = {}
        for tensor, file in read_json(index, {"weight_map": dict})["weight_map"].items():
            if not isinstance(file, str) or not SHARD.fullmatch(file):
                raise UserError(f"{index}: {file!r} is not the name of a file beside it")
            files.setdefault(folder / file, set()).add(tensor)
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{index}: files it names are missing: {join_names(missing)}")
        return files
    raise UserError(f"{folder}: no model.safetensors, pytorch_model.bin or index of shards in it")


def meta_files(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of each of a Meta folder's files, in order and without gaps."""
    names = sorted(file.name for file in folder.glob("consolidated.*.pth"))
    complete = [f"consolidated.{i:02}.pth" for i in range(len(names))] or ["consolidated.00.pth"]
    if missing := [name for name in complete if name not in names]:
        raise UserError(f"{folder}: {join_names(missing)} is missing")
    shards = [dict(open_file(folder / name)) for name in complete]
    for name, shard in zip(complete, shards, strict=True):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            names = join_names(differing)
            raise UserError(f"{folder / name}: not the tensors of {complete[0]}: {names}")
    return shards


# ---------------------------------------------------------------- a folder


def is_meta(folder: Path) -> bool:
    return not (folder / "config.json").exists() and (folder / "params.json").exists()


def no_such_model(path: Path) -> UserError:
    name, hint = str(path), ""
    if path.exists():
        return UserError(f"{path}: neither a folder nor a GGUF file")
    if re.fullmatch(r"[\w-]+/[\w.-]+", name):  # perhaps a name of the hub
        hint = f": hf download {name} --local-dir {path.name}"
    return UserError(f"{path}: no such folder or GGUF file{hint}")


def read_config(folder: str | Path, quantized: bool = False) -> LlamaConfig:
    """The architecture of a checkpoint folder; quantize.py alone reads `quantized` ones."""
    folder = Path(folder)
    if folder.is_file():
        return gguf_config(read_gguf(folder))
    if not folder.is_dir():
        raise no_such_model(folder)
    file = folder / ("params.json" if is_meta(folder) else "config.json")
    if not file.exists():
        hint = f": give {folder / 'model'}" if (folder / "model").is_dir() else ""
        names = "config.json (Hugging Face) or params.json (Meta)"
        raise UserError(f"{folder}: no {names} in it{hint}")
    fields, shards = read_json(file), meta_files(folder) if is_meta(folder) else []
    generation = folder / "generation_config.json"
    if generation.is_file() and isinstance(ends := read_json(generation).get("eos_token_id"), list):
        fields["eos_token_id"] = ends  # transformers stops at these
    if quantized:
        del fields["quantization_config"]
    with errors_at(file):
        if shards:
            return typed_config(meta_format.config_fields(fields, shards))
        return config_from_json(fields)


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by its Hugging Face name."""
    folder, entries = Path(folder), {}
    if folder.is_file():
        file = read_gguf(folder)
        entries = gguf_tensors(file, gguf_config(file))
    elif is_meta(folder):
        entries = meta_format.rename_tensors(meta_files(folder), read_config(folder))
    else:
        for file, indexed in weight_files(folder).items():
            for name, tensor in open_file(file):
                if indexed is None or name in indexed:
                    entries[name] = tensor.shape, tensor.dtype, lambda t=tensor: t
    return {n: StoredTensor(*entry) for n, entry in entries.items() if not OBSOLETE.search(n)}


def open_checkpoint(
    folder: str | Path, kind: type[Llama] = Llama
) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """A folder's config, and the tensors that it calls for, in the order of the model; or one error
    that names every problem."""
    config, stored = read_config(folder), stored_tensors(folder)
    wanted, problems, misfits = parameter_shapes(config, kind), [], []
    extra = stored.keys() - wanted.keys()
    if "score.weight" in extra:
        raise UserError(f"{folder}: a reward model, for `alpaca best-of --reward-model {folder}`")
    if "score.weight" in wanted.keys() - stored.keys():
        raise UserError(f"{folder}: not a reward model: train one with --objective reward")
    if config.tie_word_embeddings and HEAD in extra:
        extra.remove(HEAD)
        head, embedding = stored[HEAD].read(), stored.get(EMBEDDING, stored[HEAD]).read()
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        if not same or not torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
            problems.append(f"{HEAD} is not the embedding, though tie_word_embeddings is on")
    if missing := [name for name in wanted if name not in stored]:
        problems.append(f"missing {join_names(missing)}")
    if extra:
        problems.append(f"unexpected {join_names(sorted(extra))}")
    for name in (name for name in wanted if name in stored):
        shape, dtype = list(stored[name].shape), stored[name].dtype
        if shape != list(wanted[name]):
            misfits.append(f"{name} is {shape} where the config says {list(wanted[name])}")
        elif dtype not in DTYPES.values():
            misfits.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
    if misfits:
        problems.append(join_names(misfits))
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}")
    return config, {name: stored[name] for name in wanted}


def parameter_shapes(config: LlamaConfig, kind: type[Llama] = Llama) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in kind(config).named_parameters()}


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity. NaN and infinity stay in a sum, so a finite
    sum is proof, at the speed of memory; the sum of large numbers overflows, their extremes do not.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.sum().isfinite():
        return True
    return all(extreme.isfinite() for extreme in tensor.aminmax())


def as_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype; an error if finite numbers are too large for it."""
    result = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not is_finite(result) and (result.isinf() & tensor.isfinite()).any():
        names = {stored: short for short, stored in DTYPES.items()}
        raise UserError(f"{name} holds numbers too large for {names[dtype]}: use fp32")
    return result
