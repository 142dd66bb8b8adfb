"""`alpaca convert`: dtypes, tokenizers, positions, and numbers that are not finite."""

import json

import pytest
import torch
from helpers.checkpoints import (
    TOKENIZER,
    copied_tensors,
    edit_json,
    read_tensors,
    refuse_convert,
    replace_weights,
    same_tensors,
)
from helpers.commands import assert_refused
from helpers.models import small_model

from alpaca.common.errors import UserError
from alpaca.common.gguf_file import read_gguf
from alpaca.weights.checkpoint import DTYPES, read_config
from alpaca.weights.loading import load_model
from alpaca.weights.writer import save_model

NORM = "model.norm.weight"


def test_convert_takes_special_ids_from_the_tokenizer(command, folder, tmp_path):
    """Early conversions of LLaMA had bos 0 and eos 1 in config.json, beside the right tokenizer."""
    edit_json(folder / "config.json", bos_token_id=0, eos_token_id=[1, 7])
    code, _, err = command("convert", folder, tmp_path / "out")
    assert code == 0 and "the tokenizer's bos 1 and eos 2 are used" in err
    config = read_config(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_convert_keeps_several_end_tokens(command, folder, tmp_path):
    edit_json(folder / "config.json", eos_token_id=[7, 2])
    assert command("convert", folder, tmp_path / "out")[0] == 0
    assert read_config(tmp_path / "out").eos_token_id == [7, 2]
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, 2]


def test_convert_keeps_several_end_tokens_in_a_gguf_file(command, folder, tmp_path):
    """llama.cpp reads three: EOS, end of turn, end of message."""
    edit_json(folder / "config.json", eos_token_id=[1, 2, 7])
    assert command("convert", folder, tmp_path / "out.gguf")[0] == 0
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [read_gguf(tmp_path / "out.gguf").metadata[name] for name in names] == [2, 1, 7]
    assert command("convert", tmp_path / "out.gguf", tmp_path / "back")[0] == 0
    for written in (tmp_path / "out.gguf", tmp_path / "back"):
        assert read_config(written).eos_token_id == [1, 2, 7]
    edit_json(folder / "config.json", eos_token_id=[1, 2, 7, 9])
    refused = command("convert", folder, tmp_path / "more.gguf")
    assert_refused(refused, "4 EOS ids", "a GGUF file holds at most 3")


def test_convert_takes_positions(tmp_path, command, meta):
    source, _ = meta(1)
    code, _, err = command("convert", source, tmp_path / "out", "--positions", 4096)
    assert code == 0 and "4096 positions" in err and "see --positions" not in err
    assert read_config(tmp_path / "out").max_position_embeddings == 4096
    refuse_convert(command, source, "--positions: invalid", args=["--positions", 0])
    absurd = "max_position_embeddings is 16777217, not from 2 to 16777216"
    refuse_convert(command, source, absurd, args=["--positions", 2**24 + 1])


def test_convert_refuses_another_or_no_tokenizer(command, folder, tmp_path):
    small, given = small_model(), ["--tokenizer", tmp_path / "tokenizer.json"]
    save_model(small, small.config, tmp_path / "small", tokenizer=TOKENIZER)
    refuse_convert(command, tmp_path / "small", "1024 tokens, the model only 128 embeddings")
    given[1].write_text("{}")
    refuse_convert(command, folder, "tokenizer.json: model is missing", args=given)
    (folder / "tokenizer.model").unlink()
    refuse_convert(command, folder, "give one with --tokenizer FILE")
    given[1] = folder / "absent"
    refuse_convert(command, folder, "absent: no such file", args=given)


@pytest.mark.parametrize(
    ("stored", "number", "dtype"),
    [(torch.bfloat16, 1e5, "fp16"), (torch.float32, 1e5, "fp16"), (torch.float32, 3.4e38, "bf16")],
)
def test_convert_refuses_numbers_too_large_for_the_dtype(command, tmp_path, stored, number, dtype):
    model = small_model(vocab_size=1024).to(stored)
    with torch.no_grad():
        model.model.norm.weight[3] = number
    save_model(model, model.config, tmp_path / "m", tokenizer=TOKENIZER)
    words = f"{NORM} holds numbers too large for {dtype}"
    refuse_convert(command, tmp_path / "m", words, args=["--dtype", dtype])
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "m", dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_convert_keeps_nan_and_infinity_and_says_so(command, folder, tmp_path, dtype):
    weights = copied_tensors(folder)
    weights[NORM][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    replace_weights(folder, weights)
    code, _, err = command("convert", folder, tmp_path / "out", "--dtype", dtype)
    assert code == 0 and f"NaN or infinity is kept in {NORM}\n" in err
    assert same_tensors(
        read_tensors(tmp_path / "out"), {n: t.to(DTYPES[dtype]) for n, t in weights.items()}
    )
