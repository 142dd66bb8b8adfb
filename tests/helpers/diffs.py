"""Pairs of checkpoints that differ a little or a lot, and what is in a folder."""

from collections.abc import Callable
from pathlib import Path

import torch

from alpaca.weights.bitdiff import INTEGERS
from alpaca.weights.writer import save_model
from helpers.checkpoints import read_tensors, shards_of
from helpers.models import small_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Numbers = dict[str, torch.Tensor]


def write_model(
    folder: Path,
    model=None,
    dtype=torch.float32,
    change: Callable[[Numbers], None] = lambda numbers: None,
    shard_bytes=10**9,
    **shape,
) -> Path:
    """A checkpoint of the small model, or of `model`; `change` edits its tensors."""
    model = model or small_model(**shape)
    numbers = {n: p.detach().to(dtype).clone() for n, p in model.named_parameters()}
    change(numbers)
    with shards_of(shard_bytes):
        save_model(numbers.items(), model.config, folder, dtype, keep_nonfinite=True)
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def add_noise(numbers: Numbers) -> None:
    torch.manual_seed(1)
    for tensor in numbers.values():
        tensor += (0.01 * torch.randn(tensor.shape)).to(tensor.dtype)


def add_odd_values(numbers: Numbers) -> None:
    """NaN of several kinds, infinities, zeros of both signs, the smallest and largest numbers."""
    add_noise(numbers)
    for number, tensor in enumerate(numbers.values()):
        info, flat = torch.finfo(tensor.dtype), tensor.view(-1)
        odd = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, info.max, info.min, info.tiny]
        flat[number % 7 : number % 7 + 8] = torch.tensor(odd, dtype=torch.float64).to(tensor.dtype)
        integers = flat.view(INTEGERS[tensor.element_size()])
        integers[20] = torch.iinfo(integers.dtype).max  # a NaN with all its bits
        integers[21] = torch.iinfo(integers.dtype).min  # -0.0


def tensor_bits(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    found = read_tensors(folder).items()
    return {n: (t.dtype, t.view(torch.uint8).numpy().tobytes()) for n, t in found}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
