"""Tiny models that can tell right from wrong.

`initializer_range` 0.2 is what makes parity tests able to fail: with the usual 0.02 a wrong rotary
layout moves a tiny model's logits by 0.003, with 0.2 by several units.
"""

import os

import torch

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from dataset import encode_prompt
from helpers.commands import ROOT
from model import Llama, LlamaConfig

TOKENIZERS = [str(ROOT / "data/tokenizer.model")]
TOKENIZERS += filter(None, [os.environ.get("LLAMA_TOKENIZER")])  # LLaMA's own, if it is there
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# A Llama 3.2 in small: positions 0 to 23 see fast, slow and in-between pairs.
LLAMA3 = {"rope_theta": 5e5, "tie_word_embeddings": True, "head_dim": 32}
LLAMA3["rope_scaling"] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def small_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **changes})


def small_model(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(small_config(**changes))


def random_ids(*shape: int, vocab_size: int = 128) -> torch.Tensor:
    return torch.randint(vocab_size, shape)


def hf_model(config: LlamaConfig, dtype: torch.dtype = torch.float32):
    """A Hugging Face model of the same shape with random weights."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    fields = {k: v for k, v in vars(config).items() if not k.startswith("rope_")}
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"} | (config.rope_scaling or {})
    torch.manual_seed(0)
    model = LlamaForCausalLM(HFConfig(**fields, rope_parameters=rope, pad_token_id=None))
    with torch.no_grad():  # norms start at 1, where a wrong product with the weight would not show
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def expected(engine: Engine, instruction: str, input: str = "", **params) -> str:
    """The answer that an engine gives to a question in Alpaca's template."""
    ids = encode_prompt(instruction, input, engine.tokenizer)
    (answer,) = engine.generate([ids], SamplingParams(**{"max_new_tokens": 12, **params}))
    return answer.text
