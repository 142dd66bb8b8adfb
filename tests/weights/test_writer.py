"""Checkpoints as they are written: bit for bit, complete and finite."""

import pytest
import torch
from helpers.bpe import write_bpe
from helpers.checkpoints import (
    TOKENIZER,
    digests,
    read_tensors,
    same_tensors,
)
from helpers.models import small_config, small_model
from safetensors.torch import load_file

from alpaca.common.errors import UserError
from alpaca.weights import writer
from alpaca.weights.checkpoint import DTYPES, is_finite, read_config
from alpaca.weights.loading import load_model
from alpaca.weights.writer import TOKENIZER_FILES, save_model
from tokenizer import load_tokenizer

NORM = "model.norm.weight"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_save_gives_the_same_bytes(tmp_path, monkeypatch, dtype, tied):
    monkeypatch.setattr(writer, "SHARD_BYTES", 50_000)
    model = small_model(tie_word_embeddings=tied).to(dtype)
    with torch.no_grad():  # bit patterns that arithmetic would not keep
        model.model.norm.weight[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_model(model, model.config, tmp_path / "a", keep_nonfinite=True)
    loaded = load_model(tmp_path / "a")
    assert same_tensors(loaded.named_parameters(), model.named_parameters())
    save_model(loaded, read_config(tmp_path / "a"), tmp_path / "b", keep_nonfinite=True)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    largest = max(model.parameters(), key=lambda p: p.numel())
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.stat().st_size <= max(50_000, largest.numel() * dtype.itemsize) + 4096
        assert load_file(file)  # the safetensors library can read it
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # its data is aligned


def test_every_tokenizer_file_of_the_base_is_copied(tmp_path):
    contents = {name: f"content of {name}" for name in TOKENIZER_FILES}
    (tmp_path / "base").mkdir()
    for name, content in contents.items():
        (tmp_path / "base" / name).write_text(content)
    save_model(small_model(), small_config(), tmp_path / "out", tokenizer=tmp_path / "base")
    for name, content in contents.items():
        assert (tmp_path / "out" / name).read_text() == content


def test_tokenizer_of_byte_level_bpe_keeps_its_own_configuration(tmp_path):
    file = write_bpe(tmp_path / "bpe")
    for source in (file, file.parent):
        out = tmp_path / source.name / "out"
        save_model(small_model(), small_config(), out, tokenizer=source)
        assert load_tokenizer(out).eos_id == load_tokenizer(file).eos_id
    (file.parent / "tokenizer_config.json").unlink()
    save_model(small_model(), small_config(), tmp_path / "out", tokenizer=file)
    assert not (tmp_path / "out/tokenizer_config.json").exists(), "LLaMA's would be wrong"


def test_tensors_may_come_in_any_order_but_must_be_complete(tmp_path):
    model = small_model()
    pairs = list(model.named_parameters())
    save_model(reversed(pairs), model.config, tmp_path / "out", tokenizer=TOKENIZER)
    assert same_tensors(read_tensors(tmp_path / "out"), pairs)
    for wrong, message in (
        (pairs[1:], "missing model.embed_tokens.weight"),
        ([*pairs, pairs[0]], "unexpected or repeated tensor model.embed_tokens.weight"),
        ([*pairs, ("bias", torch.ones(1))], "unexpected or repeated tensor bias"),
        ([("lm_head.weight", torch.ones(1))], r"lm_head.weight is \[1\], not \[128, 64\]"),
        ([("lm_head.weight", torch.ones(1).double())], "fp16, not as torch.float64"),
    ):
        with pytest.raises(UserError, match=message):
            save_model(wrong, model.config, tmp_path / "bad")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_one_number_that_is_not_finite_is_found(dtype, number):
    numbers = torch.full((1000, 33), 0.9 * torch.finfo(dtype).max, dtype=dtype)  # the sum overflows
    assert is_finite(numbers) and is_finite(-numbers) and is_finite(numbers[:0])
    numbers[517, 11] = number
    assert not is_finite(numbers) and not is_finite(numbers.T) and is_finite(numbers[518:])


def test_tensors_that_are_not_finite_are_not_written(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(UserError, match=f"{NORM} would be written with NaN or infinity in it"):
        save_model(model, model.config, tmp_path / "out")
    assert not list(tmp_path.iterdir())
