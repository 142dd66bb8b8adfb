"""The models that the benchmarks run: sizes, and folders with random weights."""

from pathlib import Path

TINYLLAMA = {  # 1.1B parameters
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {  # 15.2M parameters
    "vocab_size": 32000,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_random(folder: Path, shape: dict | str, dtype: str = "bf16", tokenizer=None) -> None:
    """Write a Hugging Face folder, one tensor at a time. `shape` may be a preset, such as "7B"."""
    import torch  # only here: other scripts measure how much memory imports take

    from alpaca.weights.checkpoint import DTYPES, parameter_shapes
    from alpaca.weights.presets import preset
    from alpaca.weights.writer import save_model
    from model import LlamaConfig

    config = preset(shape) if isinstance(shape, str) else LlamaConfig(**shape)
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(1 << 24, generator=generator, dtype=torch.bfloat16)

    def tensors():
        for name, size in parameter_shapes(config).items():
            if len(size) == 1:
                yield name, torch.ones(size, dtype=torch.bfloat16)
            else:
                copies = -(-size.numel() // len(noise))
                yield name, noise.repeat(copies)[: size.numel()].view(size)

    save_model(tensors(), config, folder, DTYPES[dtype], tokenizer)
