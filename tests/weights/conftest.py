"""Checkpoint folders to read, convert and damage."""

import shutil

import pytest
from helpers.checkpoints import TOKENIZER, shards_of, write_meta
from helpers.models import small_model

from alpaca.weights.writer import save_model


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in four shards, with its tokenizer."""
    model = small_model(vocab_size=1024)
    with shards_of(300_000):
        save_model(model, model.config, tmp_path / "m", tokenizer=TOKENIZER)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 4
    return tmp_path / "m"


@pytest.fixture
def meta(tmp_path):
    """meta(shards, ...) writes a small model as Meta would: (its folder, the model)."""

    def write(shards: int, **changes):
        model = small_model(vocab_size=1024, num_attention_heads=8, **changes)
        write_meta(model, tmp_path / "llama/7B", shards)
        shutil.copy(TOKENIZER, tmp_path / "llama")  # where Meta's download has it
        return tmp_path / "llama/7B", model

    return write
