"""`alpaca benchmark` against lm-eval with SmolLM2-135M: ALPACA_SMOLLM2 names the GGUF file."""

import os
from pathlib import Path

import pytest
import torch
from helpers.harness import CHOICES, compare_with_harness

FILE = Path(os.environ.get("ALPACA_SMOLLM2", "no file"))
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="ALPACA_SMOLLM2 names no GGUF file")
pytest.importorskip("lm_eval", reason="the extra `parity` is not installed")
pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture(scope="module")
def lm():
    """transformers' reading of a GGUF file loses that digits are split one by one."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": FILE.parent, "gguf_file": FILE.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**place)
    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)


@pytest.mark.parametrize("name", CHOICES)
def test_log_likelihoods_and_accuracies_equal_lm_evals(name, lm, command, tmp_path):
    compare_with_harness(name, lm, FILE, command, tmp_path, allowed=1e-3, count=4)
