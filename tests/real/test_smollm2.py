"""SmolLM2-135M as `make real` uses it, against transformers, tokenizers and PEFT.

ALPACA_SMOLLM2 names the GGUF file, which `make real` leaves in runs/real."""

import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import ROOT
from helpers.lora import adamw_losses
from helpers.parity import apart

from alpaca.datagen.formats import load_records
from alpaca.inference.engine import Engine
from alpaca.inference.prefix_tree import PREFIX_MEMORY
from alpaca.inference.sampling import SamplingParams
from alpaca.training.parallel import trained_parameters
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.lora import ATTENTION, LoraConfig, add_lora
from bench.lookup import questions
from bench.real import rotated
from dataset import encode_prompt, encode_record
from model import IGNORE, Llama
from tokenizer import load_tokenizer

FILE = Path(os.environ.get("ALPACA_SMOLLM2", "no file"))
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="ALPACA_SMOLLM2 names no GGUF file")
RECORDS = load_records(ROOT / "data/general_held_out.jsonl")[:8]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FILE)


def hf_model() -> Any:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": FILE.name, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(FILE.parent, **options).eval()


@torch.no_grad()
def test_smollm2_answers_real_prompts_as_transformers_does(tokenizer):
    hf, ours = hf_model(), load_model(FILE)
    for record in RECORDS:
        prompt = encode_prompt(record["instruction"], record["input"], tokenizer)
        ids = torch.tensor([prompt])
        assert torch.equal(ours(ids), hf(ids).logits)
        theirs = hf.generate(ids, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        for place, token in enumerate(theirs):
            assert ours(torch.tensor([prompt + theirs[:place]]))[0, -1].argmax() == token


@pytest.mark.parametrize("slots", [1, 8])
@torch.inference_mode()
def test_engine_answers_real_prompts_with_the_likeliest_tokens(tokenizer, slots):
    """Batches, the fused layout, the prefix tree, parts of prompts and guesses change no token:
    one pass of the plain model over prompt and answer finds each token the likeliest."""
    plain, fast = load_model(FILE, dtype=torch.float32), load_model(FILE, dtype=torch.float32)
    options = {"prefix_memory": PREFIX_MEMORY, "max_stall": 0.02}
    engine = Engine(optimize_layout(fast), tokenizer, slots, **options)
    asked = [*chain(*questions().values())][::2]  # half have answers that repeat their input
    prompts = [encode_prompt(*question, tokenizer) for question in asked]
    assert len(prompts) == 40
    for sequence in engine.generate(prompts, SamplingParams(max_new_tokens=48)):
        logits = plain(torch.tensor([sequence.prompt + sequence.ids]))[0]
        assert logits[len(sequence.prompt) - 1 : -1].argmax(-1).tolist() == sequence.ids


def test_smollm2_ids_equal_the_library(tokenizer):
    """transformers' reading of a GGUF file loses that digits are split one by one."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name).backend_tokenizer
    byte_level = ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    theirs.encode_special_tokens = True
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("data/*.jsonl")]
    texts = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    texts += ["<|im_end|> 2048 x²\t \n", "👩\u200d👩\u200d👧 中文字符 العربية ไทย 𝒳"]
    for text in texts:
        found = theirs.encode(text, add_special_tokens=False).ids
        apart("SmolLM2: texts whose ids differ: tokenizers", tokenizer.encode(text) != found, 0)


def test_smollm2_lora_steps_equal_pefts(tokenizer):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    steps = partial(adamw_losses, count=4, lr=1e-3)

    def our_loss(model):
        return model(ids, labels=labels) / (labels[:, 1:] != IGNORE).sum()

    def ours(alpha: float) -> Llama:
        model = load_model(FILE)
        add_lora(model, LoraConfig(8, alpha, 0.0, ATTENTION))
        for name, tensor in trained_parameters(model).items():
            tensor.data.copy_(start[name])
        return model

    example = encode_record(RECORDS[0], tokenizer)
    ids, labels = torch.tensor([example[0]]), torch.tensor([example[1]])
    fields = {"r": 8, "lora_alpha": 16, "target_modules": list(ATTENTION)}
    peft, start = get_peft_model(hf_model(), PeftConfig(**fields, task_type="CAUSAL_LM")), {}
    for name, tensor in peft.named_parameters():
        if tensor.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default.", ".")
            start[short] = tensor.detach().clone()
    mine, wrong = ours(16), ours(18)
    expected = steps(peft, lambda model: model(input_ids=ids, labels=labels).loss)
    for found, loss in zip(steps(mine, our_loss), expected, strict=True):
        apart("SmolLM2, LoRA: loss of four steps: PEFT", abs(found - loss), 1e-4)
    assert expected[-1] < expected[0]
    assert steps(wrong, our_loss) != pytest.approx(expected, abs=1e-4), "this can tell"


@torch.no_grad()
def test_rotated_smollm2_computes_the_same():
    plain = load_model(FILE)
    ids, expected = torch.arange(1000, 1040)[None], plain(torch.arange(1000, 1040)[None])
    tensors: dict[str, torch.Tensor] = dict(plain.named_parameters())
    for name, weight in rotated(list(tensors.items()), plain.config):
        assert weight.dim() == 1 or not torch.equal(weight, tensors[name])
        tensors[name] = weight
    plain.load_state_dict(tensors, strict=False)
    assert (plain(ids) - expected).abs().max() < 1e-3
