"""Writes a model as a Hugging Face folder, with one tensor in memory at a time.

    save_model(model, config, "out", tokenizer="llama-7b")         # a whole model
    save_model(pairs, config, "out", torch.bfloat16)               # or (name, tensor) pairs

The weights go into safetensors files. Such a file begins with the length of its header in eight
bytes; the header is JSON and gives every tensor's name, dtype, shape and position:

    {"model.norm.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, …}

The numbers follow, one tensor after another. So the position of every byte is known from shapes
and dtypes alone, and `ShardWriter` writes all headers first. Then tensors may come in any order,
one in memory at a time, or in parts from several threads (`write_part`).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError, join_names, notice
from alpaca.common.files import atomic_folder
from alpaca.common.gguf_bpe import bpe_from_metadata, is_bpe
from alpaca.common.gguf_file import is_gguf, read_gguf
from alpaca.common.jinja import JINJA_FILE, read_jinja
from alpaca.common.system import start_writing
from alpaca.common.tokenizer_json import tokenizer_json_files
from alpaca.weights.checkpoint import DTYPES, as_dtype, is_finite, is_meta, parameter_shapes
from alpaca.weights.config_json import config_to_json
from model import Llama, LlamaConfig
from tokenizer import check_tokenizer, load_tokenizer, read_model

SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",  # the last two: quantized weights
    torch.uint8: "U8",
}
SHARD_BYTES = 5_000_000_000  # a file holds at most this many, unless a single tensor is larger
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    JINJA_FILE,
    "vocab.json",
    "merges.txt",
)


# ---------------------------------------------------------------- safetensors files


def tensor_bytes(shapes: Mapping[str, tuple]) -> dict[str, int]:
    """Sizes of tensors given as (shape, dtype, …)."""
    return {name: math.prod(entry[0]) * entry[1].itemsize for name, entry in shapes.items()}


def safetensors_head(shapes: Mapping[str, tuple]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the numbers of a file, and each tensor's offset in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, size in tensor_bytes(shapes).items():
        (shape, dtype), starts[name], end = shapes[name], end, end + size
        position = {"shape": list(shape), "data_offsets": [starts[name], end]}
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], **position}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def plan_shards(shapes: dict[str, tuple]) -> dict[str, list[str]]:
    """File name → names of the tensors in it."""
    groups, space_left = [], 0
    for name, size in tensor_bytes(shapes).items():
        if not groups or size > space_left:
            groups.append([])
            space_left = SHARD_BYTES
        groups[-1].append(name)
        space_left -= size
    files = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    return dict(zip(files if len(groups) > 1 else ["model.safetensors"], groups, strict=True))


class ShardWriter(ExitStack):
    """A folder's safetensors files, open for writing: headers first, then tensors in any order."""

    def __init__(self, folder: Path, shapes: dict[str, tuple], keep_nonfinite: bool = False):
        super().__init__()
        self.keep_nonfinite, self.nonfinite = keep_nonfinite, []
        self.thread = self.enter_context(ThreadPoolExecutor(1))
        sizes, shards = tensor_bytes(shapes), plan_shards(shapes)
        self.pending = {}  # tensor not yet written → (file, offset, shape, dtype)
        for file_name, names in shards.items():
            head, offsets = safetensors_head({name: shapes[name] for name in names})
            file = self.enter_context((folder / file_name).open("wb"))
            file.write(head)
            file.flush()
            file.truncate(len(head) + sum(sizes[name] for name in names))
            for name in names:
                self.pending[name] = file, offsets[name], *shapes[name]
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            dump_json(folder / "model.safetensors.index.json", index)

    def write(self, name: str, tensor: Tensor) -> None:
        if name not in self.pending:
            raise UserError(f"unexpected or repeated tensor {name}")
        file, offset, shape, dtype = self.pending.pop(name)
        if tensor.shape != shape:
            raise UserError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
        finite = self.thread.submit(is_finite, tensor)  # meanwhile, at no cost in time
        file.seek(offset)
        file.write(tensor.contiguous().view(torch.uint8).numpy())
        if not finite.result():
            if not self.keep_nonfinite:
                raise UserError(f"{name} would be written with NaN or infinity in it")
            self.nonfinite.append(name)

    def write_part(self, name: str, start: int, numbers: np.ndarray) -> None:
        """Write a part of a tensor, `start` bytes into it; any thread may call this."""
        file, offset, _, _ = self.pending[name]
        content, done = numbers.data.cast("B"), 0
        while done < len(content):
            done += os.pwrite(file.fileno(), content[done:], offset + start + done)
        start_writing(file, offset + start, done)


# ---------------------------------------------------------------- a whole folder


def save_model(
    source: Llama | Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    keep_nonfinite: bool = False,
    chat_template: str = "",
    kind: type[Llama] = Llama,
    fields: dict[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder from a model, or from (name, tensor) pairs in any order.

    `dtype` None keeps the first tensor's; `tokenizer` is where to copy the tokenizer from, and
    `chat_template` (Jinja) replaces the one beside it. A reward model is another `kind`, with
    `fields` of its own in config.json. NaN and infinity are refused, or kept with a notice
    (`keep_nonfinite`); a cast that overflows is refused."""
    pairs = iter(source.named_parameters() if isinstance(source, Llama) else source)
    first = next(pairs, ("", torch.empty(0)))
    dtype = dtype or first[1].dtype
    if dtype not in DTYPES.values():
        raise UserError(f"weights are written as {', '.join(DTYPES)}, not as {dtype}")
    shapes = {name: (shape, dtype) for name, shape in parameter_shapes(config, kind).items()}
    with (
        atomic_folder(folder) as partial,
        ShardWriter(partial, shapes, keep_nonfinite) as shards,
    ):
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), partial, chat_template)
        dump_json(partial / "config.json", config_to_json(config, dtype) | (fields or {}))
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        dump_json(partial / "generation_config.json", ends)
        for name, tensor in chain([first], pairs):
            shards.write(name, as_dtype(tensor.detach().cpu(), dtype, name))
        if shards.pending:
            raise UserError(f"{folder}: missing {join_names(shards.pending)}")
    if shards.nonfinite:
        notice(f"NaN or infinity is kept in {join_names(shards.nonfinite)}")


def dump_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the tokenizer beside it


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """The files that a tokenizer's folder, a file of it or a GGUF file amounts to."""
    if source.is_file() and source.suffix != ".json":
        file = read_gguf(source) if is_gguf(source) else None
        if file and is_bpe(file.metadata):
            files = tokenizer_json_files(bpe_from_metadata(file.metadata, str(source)))
        else:
            files = {"tokenizer.model": read_model(source)}
        if template := read_jinja(source):
            files[JINJA_FILE] = template.encode()
        return files
    if source.is_file():
        source = source.parent  # its tokenizer_config.json names BOS and EOS
    paths = [source / name for name in TOKENIZER_FILES]
    found = {path.name: path.read_bytes() for path in paths if path.is_file()}
    if not found.keys() & {"tokenizer.model", "tokenizer.json"}:
        raise UserError(f"{source}: no tokenizer.model or tokenizer.json in it")
    return found


def find_tokenizer(folder: Path) -> Path | None:
    """Where a model's tokenizer is: in its folder or file, or above it, as in Meta's download."""
    beside = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
    if folder.is_file() or any(file.is_file() for file in beside):
        return folder
    above = folder.absolute().parent / "tokenizer.model"
    return above if is_meta(folder) and above.is_file() else None


def require_tokenizer(folder: Path, given: Path | None, config: LlamaConfig) -> Path:
    """The tokenizer to copy for a model made from the one in `folder`, checked to fit it."""
    found = given or find_tokenizer(folder)
    if not found:
        raise UserError(f"{folder}: no tokenizer in it: give one with --tokenizer FILE")
    # a folder's own tokenizer.json may be of a kind that only other software reads
    if given or found.is_file() or "tokenizer.model" in tokenizer_files(found):
        check_tokenizer(load_tokenizer(found), config)
    return found


def copy_tokenizer(source: Path, folder: Path, chat_template: str = "") -> None:
    """`chat_template` replaces the source's."""
    files = tokenizer_files(source)
    if chat_template:
        files[JINJA_FILE] = chat_template.encode()
        if named := files.get("tokenizer_config.json"):  # it may have another
            config = {k: v for k, v in json.loads(named).items() if k != "chat_template"}
            files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if "tokenizer.model" in files and "tokenizer_config.json" not in files:
        tokenizer: Any = load_tokenizer(source)
        config = {  # without it AutoTokenizer adds no BOS
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": tokenizer.add_bos,
            "add_eos_token": False,
            "bos_token": tokenizer.piece(tokenizer.bos_id),
            "eos_token": tokenizer.piece(tokenizer.eos_id),
            "unk_token": tokenizer.piece(tokenizer.unk_id),
            "clean_up_tokenization_spaces": False,
        }
        dump_json(folder / "tokenizer_config.json", config)
