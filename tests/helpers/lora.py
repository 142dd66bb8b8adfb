"""A small base model, adapters for it, and training runs of adapters."""

import pytest
import torch
from safetensors.torch import load_file

from alpaca.training.parallel import trained_parameters
from alpaca.weights.adapter import save_adapter
from alpaca.weights.loading import load_model
from alpaca.weights.lora import TARGETS, LoraConfig, ThinLinear, add_lora
from alpaca.weights.quantize import WeightSource
from alpaca.weights.writer import save_model
from helpers.checkpoints import TOKENIZER
from helpers.models import small_config
from helpers.training import figures, flags, write_records
from model import Llama

WEIGHTS = "adapter_model.safetensors"


def write_lora_base(folder):
    """A random model in folder/model, whose matrices can be int4, and 40 records."""
    torch.manual_seed(0)
    changes = {"vocab_size": 1024, "max_position_embeddings": 256, "intermediate_size": 192}
    model = Llama(small_config(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    save_model(model, model.config, folder / "model", tokenizer=TOKENIZER)
    write_records(folder / "records.json", 40)
    return folder


def write_adapter(base, folder):
    """A random adapter on all seven projections."""
    model, lora = load_model(base / "model"), LoraConfig(4, 8, 0.05, TARGETS)
    add_lora(model, lora)
    torch.manual_seed(5)
    randomize(model)
    save_adapter(trained_parameters(model).items(), lora, folder, base / "model")
    return folder


def randomize(model: Llama, size: float = 0.1) -> None:
    """Random numbers for A and for B, which starts as zero."""
    with torch.no_grad():
        for module in model.modules():
            if type(module) is ThinLinear:
                module.weight.normal_(0, size)


def dequantize_layers(model: Llama, source: WeightSource) -> None:
    """Replace a plain model's matrices by the values that the source's integers stand for."""
    for name in source.shapes:
        if kind := source.linear_class(name):
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.weight.data = kind(**source.read(name)).dequantize()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def adamw_losses(model, loss_of, count: int, lr: float) -> list[float]:
    """Train what is not frozen for `count` steps; the loss before each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(count):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def lora_flags(base, out, **changes) -> list[str]:
    """A training run of 5 steps of an adapter."""
    lora = {"lora": True, "lora_dropout": 0.05, "lora_rank": 4, "learning_rate": 1e-2}
    return flags(base, out, **{**lora, "save_dtype": None, **changes})


def trained_adapter(out) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / WEIGHTS)


def assert_same_adapter_run(out, other, near: float = 1e-5) -> None:
    ours, theirs = figures(out), figures(other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=near), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * near), a["step"]
    theirs = trained_adapter(other)
    for name, tensor in trained_adapter(out).items():
        # Adam makes steps of one size out of the smallest gradients, and these are rounded
        assert (tensor - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name


def adapters_differ(out, other) -> bool:
    ours, theirs = trained_adapter(out), trained_adapter(other)
    return any((ours[n] - theirs[n]).norm() > 0.01 * theirs[n].norm() for n in ours)
