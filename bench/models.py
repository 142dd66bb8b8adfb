"""The models that the benchmarks run: sizes, and folders with random weights."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

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


def random_source(config, bits: int, device: str, round_head: bool = True):
    """A WeightSource (alpaca/weights/quantize.py) without a folder: random bf16 weights, made and
    rounded to `bits` on the device when they are read."""
    import torch

    from alpaca.weights.checkpoint import parameter_shapes
    from alpaca.weights.quantize import linear_class

    shapes = parameter_shapes(config)
    kind_of = partial(linear_class, bits=bits, round_head=round_head and bits < 16)

    def weight(name: str) -> torch.Tensor:
        drawn = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
        return drawn.fill_(1) if drawn.ndim == 1 else drawn.normal_(0, config.initializer_range)

    def read(name: str) -> dict[str, torch.Tensor]:
        kind = kind_of(name)
        return kind.quantize(weight(name)) if kind else {"weight": weight(name)}

    stored = {name: SimpleNamespace(read=partial(weight, name)) for name in shapes}
    fields = {"config": config, "bits": bits, "shapes": shapes, "linear_class": kind_of}
    return SimpleNamespace(**fields, stored=stored, read=read)


def hf_random(config, device: str, dtype, **options):
    """transformers' model of the shape of a LlamaConfig, its random weights made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads max_position_embeddings tie_word_embeddings"
    shape = {name: getattr(config, name) for name in names.split()}
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, **options))
    torch.set_default_dtype(torch.float32)
    return model
