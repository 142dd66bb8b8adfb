"""The shapes of published models, to train from random weights or to plan for: `--preset 7B`."""

from model import LlamaConfig

SIZES = {  # vocabulary, width, ffn width, layers, heads, key/value heads
    "tiny": (1024, 128, 352, 4, 4, 4),  # for data/tokenizer.model; a minute on two CPU cores
    "7B": (32000, 4096, 11008, 32, 32, 32),  # the four sizes of LLaMA 1
    "13B": (32000, 5120, 13824, 40, 40, 40),
    "30B": (32000, 6656, 17920, 60, 52, 52),
    "65B": (32000, 8192, 22016, 80, 64, 64),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
}
LLAMA3_SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_SCALING |= {"original_max_position_embeddings": 8192}  # all releases; `factor` differs
LLAMA3 = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
LLAMA3 |= {"bos_token_id": 128000, "eos_token_id": 128001}
SMOLLM2 = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5}
TIED = {"tie_word_embeddings": True}
OVERRIDES = {  # where a model differs from LLaMA 1's 7B in more than its size
    # Narrow layers need larger initial weights: otherwise attention stays too uniform to copy.
    "tiny": {"max_position_embeddings": 512, "initializer_range": 0.06},
    "65B": {"rms_norm_eps": 1e-5},
    "smollm2-135m": {**SMOLLM2, **TIED},
    "llama-3.2-1b": {**LLAMA3, "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}, **TIED},
    "llama-3.1-8b": {**LLAMA3, "rope_scaling": LLAMA3_SCALING | {"factor": 8.0}},
}


def preset(name: str) -> LlamaConfig:
    return LlamaConfig(*SIZES[name], **OVERRIDES.get(name, {}))
