"""LoRA: the arithmetic, a base that stays as it is, and short training runs."""

import pytest
import torch
from helpers.checkpoints import TOKENIZER, bits
from helpers.commands import assert_refused
from helpers.lora import (
    dequantize_layers,
    distance,
    lora_flags,
    randomize,
    trained_adapter,
    write_lora_base,
)
from helpers.models import random_ids
from helpers.training import flags, metrics, succeeded, train, write_records

import fsdp_train
from alpaca.common.errors import UserError
from alpaca.datagen.formats import load_records
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.lora import TARGETS, FrozenLinear, LoraConfig, LoraLinear, add_lora, init_A
from alpaca.weights.quantize import WeightSource
from dataset import encode_record
from model import Llama
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_lora_base(tmp_path_factory.mktemp("base"))


# ---------------------------------------------------------------- one layer, one model


def test_new_adapter_leaves_the_logits_exactly_the_bases(base):
    ids, model = random_ids(2, 20, vocab_size=1024), load_model(base / "model")
    plain = model(ids)
    add_lora(model, LoraConfig(4, 8, 0.5, TARGETS))
    assert torch.equal(model(ids), plain)
    randomize(model)
    assert distance(model(ids), plain) > 0.1
    assert not torch.equal(model(ids), model(ids)), "dropout is on in training"


def test_dropout_zeroes_inputs_and_scales_up_the_rest():
    layer = LoraLinear(torch.nn.Linear(64, 64, bias=False), LoraConfig(64, 64, 1 / 7))
    with torch.no_grad():
        layer.base.weight.zero_()
        for thin in (layer.lora_A, layer.lora_B):
            thin.weight.copy_(torch.eye(64))
    out = layer(torch.ones(1000, 64))
    assert (out == 0).float().mean().item() == pytest.approx(1 / 7, abs=0.01)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(layer.eval()(torch.ones(3, 64)), torch.ones(3, 64))


def test_A_starts_uniform_within_its_bound():
    weight = init_A(torch.empty(4, 10_000))
    assert weight.abs().max() <= 0.01 and weight.std() == pytest.approx(0.01 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("before", [optimize_layout, lambda model: add_lora(model, LoraConfig())])
def test_model_with_a_layout_or_an_adapter_takes_no_adapter(base, before):
    model = load_model(base / "model")
    before(model)
    with pytest.raises(UserError, match="q_proj has an adapter or a layout for decoding already"):
        add_lora(model, LoraConfig())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": -1}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"targets": ()}, "none"),
        ({"targets": ("q_proj", "query")}, "query"),
    ],
)
def test_impossible_settings_are_refused(base, changes, word):
    with pytest.raises(UserError, match=word):
        add_lora(load_model(base / "model"), LoraConfig(**changes))


# ---------------------------------------------------------------- a quantized base


def quantized_and_plain(base, number: int) -> tuple[Llama, Llama]:
    """One adapter over integers, and over plain matrices of the same values."""
    source = WeightSource(base / "model", number, round_head=False)
    models = [load_model(base / "model") for _ in range(2)]
    for name in source.shapes:
        if kind := source.linear_class(name):
            path = name.removesuffix(".weight")
            models[0].set_submodule(path, kind(**source.read(name)))
    dequantize_layers(models[1], source)
    for model in models:
        add_lora(model, LoraConfig(4, 8, 0.0, ("q_proj", "down_proj")))
        torch.manual_seed(4)
        randomize(model)
    return tuple(models)


@pytest.mark.parametrize("number", [8, 4])
def test_gradients_over_integers_are_those_over_their_values(base, number):
    quantized, plain = quantized_and_plain(base, number)
    ids = random_ids(2, 24, vocab_size=1024)
    losses = [model(ids, labels=ids) for model in (quantized, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    names = [name for name, tensor in quantized.named_parameters() if tensor.grad is not None]
    assert len(names) == 2 * 2 * 2
    for name in names:
        ours, theirs = (m.get_parameter(name).grad for m in (quantized, plain))
        assert (ours - theirs).norm() <= 1e-5 * ours.norm() > 0, name


@pytest.mark.parametrize("number", [8, 4])
def test_no_dequantized_weight_is_saved_for_the_backward_pass(base, number):
    model, _ = quantized_and_plain(base, number)
    saved, ids = [], random_ids(1, 7, vocab_size=1024)

    def saved_weights() -> list[tuple]:
        saved.clear()
        save = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
        with save:
            model(ids, labels=ids)
        places = {p.data_ptr() for p in model.parameters()}
        large = [t for t in saved if t.ndim == 2 and min(t.shape) > 16]
        large = [t for t in large if t.data_ptr() not in places]
        return [tuple(t.shape) for t in large if 1024 not in t.shape]

    assert saved_weights() == []
    for path, module in list(model.named_modules()):
        if type(module) is FrozenLinear:
            model.set_submodule(path, module.layer)  # as for decoding
    assert len(saved_weights()) > 6, "this can tell"


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("number", [16, 8, 4])
def test_training_changes_only_the_adapter(base, tmp_path, monkeypatch, number):
    save, seen = fsdp_train.save_result, []

    def check_base(model, *args):
        source = WeightSource(base / "model", number, round_head=False)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            seen.append(name)
            if "lora_" not in name:
                tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                stem, _, part = name.replace(".base", "").replace(".layer.", ".").rpartition(".")
                assert torch.equal(bits(tensor), bits(source.read(f"{stem}.weight")[part])), name
        return save(model, *args)

    monkeypatch.setattr(fsdp_train, "save_result", check_base)
    succeeded(train(lora_flags(base, tmp_path / "run", bits=number)))
    adapter = trained_adapter(tmp_path / "run")
    assert len(adapter) == 2 * 2 * 4 and len(seen) >= 2 * 9 + 3 + len(adapter)
    assert all(tensor.dtype == torch.float32 and tensor.norm() > 0 for tensor in adapter.values())
    assert not (tmp_path / "run/model").exists()


def test_bf16_training_keeps_the_adapter_in_fp32(base, tmp_path, monkeypatch):
    seen, step = {}, fsdp_train.train_step

    def watched(model, optimizer, *rest):
        hook = model.model.layers[0].self_attn.q_proj.lora_A.register_forward_hook(
            lambda module, inputs, out: seen.update(compute=out.dtype)
        )
        result = step(model, optimizer, *rest)
        hook.remove()
        seen["base"] = {p.dtype for p in model.parameters() if not p.requires_grad}
        seen["trained"] = {p.dtype for p in model.parameters() if p.requires_grad}
        seen["moments"] = {s["exp_avg"].dtype for s in optimizer.state.values()}
        return result

    monkeypatch.setattr(fsdp_train, "train_step", watched)
    succeeded(train(lora_flags(base, tmp_path / "run", dtype="bf16", max_steps=1)))
    assert seen["base"] == {torch.bfloat16} and seen["compute"] == torch.bfloat16
    assert seen["trained"] == seen["moments"] == {torch.float32}


def test_held_out_loss_is_computed_without_dropout(base, tmp_path):
    out, records = tmp_path / "run", load_records(write_records(tmp_path / "held_out.json", 4))
    words = lora_flags(base, out, lora_dropout=0.5, eval_data=tmp_path / "held_out.json")
    succeeded(train(words))
    logged = [r["held_out_loss"] for r in metrics(out) if "held_out_loss" in r]
    model, total, count = load_model(base / "model", out / "adapter"), 0.0, 0
    for record in records:
        ids, labels = (part[:128] for part in encode_record(record, load_tokenizer(TOKENIZER))[:2])
        with torch.no_grad():
            total += model(torch.tensor([ids]), labels=torch.tensor([labels])).item()
        count += sum(label != -100 for label in labels)
    assert logged[-1] == pytest.approx(total / count, rel=1e-4)


def test_run_of_another_adapter_or_of_all_weights_is_refused(base, tmp_path):
    out = tmp_path / "run"
    succeeded(train(lora_flags(base, out, max_steps=1)))
    other_rank = train(lora_flags(base, out, max_steps=1, lora_rank=5))
    assert_refused(other_rank, "another run", "rank=4")
    assert_refused(train(lora_flags(base, out, max_steps=1, bits=8)), "another run", "16 bits")
    assert_refused(train(flags(base, out, max_steps=1)), "another run", "now it is None")
    moved = train(lora_flags(base, tmp_path / "other", bits=4, offload=True))
    assert_refused(moved, "--offload cannot move quantized weights")
    assert not (tmp_path / "other").exists()
