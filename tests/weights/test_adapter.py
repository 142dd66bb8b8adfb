"""Adapters in PEFT's files: what is read and refused, decoding with one, and merging it."""

import json
import shutil

import pytest
import torch
from helpers.checkpoints import TOKENIZER, bits, edit_json, read_tensors
from helpers.commands import assert_refused
from helpers.lora import (
    WEIGHTS,
    dequantize_layers,
    distance,
    write_adapter,
    write_lora_base,
)
from helpers.models import random_ids
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError
from alpaca.weights.adapter import load_adapter, read_adapter, read_lora_config, save_adapter
from alpaca.weights.checkpoint import read_config
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.lora import LoraConfig, ThinLinear
from alpaca.weights.quantize import WeightSource
from alpaca.weights.writer import save_model

PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_lora_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter")


def merge(command, base, adapter, out, *flags) -> str:
    words = "--base", base, "--adapter", adapter, "--out", out, *flags
    code, printed, err = command("merge", *words)
    assert code == 0, err
    return printed


def base_in(base, folder, dtype: torch.dtype):
    model = load_model(base / "model")
    save_model(model, model.config, folder, dtype, TOKENIZER)
    return folder


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapter_of_any_dtype_is_read_as_fp32(base, adapter, tmp_path, dtype):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    stored = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    _, found = read_adapter(folder, read_config(base / "model"))
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[PREFIX + name].float())


def test_loaded_adapter_has_the_models_dtype(base, adapter):
    model = load_model(base / "model", adapter, dtype=torch.bfloat16)
    assert {m.weight.dtype for m in model.modules() if type(m) is ThinLinear} == {torch.bfloat16}


def test_alpaca_loras_published_settings_are_read(tmp_path):
    """adapter_config.json as it was written in 2023, with the fields of that time."""
    fields = {"base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none"}
    fields |= {"enable_lora": None, "fan_in_fan_out": False, "inference_mode": True}
    fields |= {"lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False}
    fields |= {"modules_to_save": None, "peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM"}
    fields["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_lora_config(tmp_path / "adapter_config.json") == LoraConfig()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ".*_proj"}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "targets"),
        ({"r": "remove"}, "r is"),
        ({"r": 0}, "rank"),
        ({"r": 2**20 + 1}, "rank must be from 1 to 1048576"),
        ({"r": True}, "r is true, an integer or a number was expected"),
        ({"lora_alpha": 1e300}, "alpha must be above 0 and at most 1048576"),
        ({"lora_alpha": 1e308, "use_rslora": True}, "alpha must be"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is NaN"),
        ({"lora_alpha": -1}, "alpha must be"),
        ({"lora_alpha": "16"}, 'lora_alpha is "16", an integer or a number was expected'),
    ],
    ids=str,
)
def test_other_methods_than_plain_lora_are_refused(base, adapter, command, tmp_path, changes, word):
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(tmp_path / "adapter/adapter_config.json", **changes)
    words = "--base", base / "model", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"
    assert_refused(command("merge", *words), "adapter_config.json", word)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


B0, UP1 = f"{Q_PROJ}.lora_B.weight", "model.layers.1.mlp.up_proj.lora_A.weight"
B2 = B0.replace("layers.0", "layers.2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {PREFIX + UP1: w[PREFIX + UP1][:, 1:].clone()}, [UP1, "[4, 63]", "[4, 64]"]),
        (lambda w: {PREFIX + B0: None}, [f"missing {B0}"]),
        (lambda w: {PREFIX + B2: torch.ones(64, 4)}, [f"unexpected {B2}"]),
        (lambda w: {PREFIX + B0: w[PREFIX + B0] / 0}, [B0, "not finite"]),
        (lambda w: {PREFIX + B0: w[PREFIX + B0].double() * 1e99}, [B0, "not finite in fp32"]),
        (lambda w: {B0: w[PREFIX + B0] + 1}, [f"{B0} is there twice"]),
        (lambda w: {PREFIX + B0: w[PREFIX + B0].to(torch.float8_e4m3fn)}, ["float8", "not supp"]),
    ],
    ids=["shape", "missing", "unexpected", "not finite", "too large", "twice", "dtype"],
)
def test_tensors_that_do_not_fit_are_refused(base, adapter, command, tmp_path, change, words):
    file = shutil.copytree(adapter, tmp_path / "adapter") / WEIGHTS
    weights = load_file(file)
    weights |= change(weights)
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
    flags = "--model-dir", base / "model", "--adapter", tmp_path / "adapter"
    assert_refused(command("generate", *flags, "Hello"), WEIGHTS, *words)


def test_folders_that_cannot_be_combined_are_refused(base, adapter, command, tmp_path):
    flags = "--model-dir", base / "model", "--adapter"
    assert_refused(command("generate", *flags, tmp_path / "nowhere", "Hello"), "no such folder")
    (shutil.copytree(adapter, tmp_path / "half") / WEIGHTS).unlink()
    assert_refused(command("generate", *flags, tmp_path / "half", "Hello"), "adapter_model.bin")
    assert_refused(command("generate", "--adapter", adapter, "Hello"), "needs --model-dir")
    assert_refused(command("generate", "--model-dir", adapter, "Hello"), "is an adapter")
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/settings.json").touch()
    run = command("generate", "--model-dir", tmp_path / "run", "Hello")
    assert_refused(run, f"the folder of a run: give --model-dir {tmp_path / 'run/model'}")
    if not torch.cuda.is_available():
        cuda = command("generate", "--model-dir", base / "model", "--device", "cuda", "Hello")
        assert_refused(cuda, "no such GPU here")


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("number", [16, 8, 4])
@torch.no_grad()
def test_adapter_works_on_a_quantized_base(base, adapter, number):
    """Against plain fp32 matrices of the same values; the integers' kernels compute in less."""
    ids, plain = random_ids(1, 24, vocab_size=1024), load_model(base / "model")
    dequantize_layers(plain, WeightSource(base / "model", number))
    without = plain(ids)
    load_adapter(plain, adapter)
    expected = plain(ids)
    found = optimize_layout(load_model(base / "model", adapter, number))(ids)
    near = {16: 1e-5, 8: 1e-3, 4: 0.03}[number] * expected.abs().max()
    assert distance(found, expected) <= near
    assert distance(without, expected) > 5 * near


def test_generate_answers_as_the_merged_model(base, adapter, command, tmp_path):
    merge(command, base / "model", adapter, tmp_path / "merged")
    ask = ("--max-new-tokens", 12, "Name a fruit.", "--model-dir")
    code, out, err = command("generate", *ask, base / "model", "--adapter", adapter)
    assert code == 0, err
    assert out == command("generate", *ask, tmp_path / "merged")[1]
    assert out != command("generate", *ask, base / "model")[1]
    (tmp_path / "asked.jsonl").write_text('{"instruction": "Go", "output": "Gone"}\n')
    words = ("--model-dir", base / "model", "--data", tmp_path / "asked.jsonl", "--n", 1)
    words += ("--out", tmp_path / "answers.jsonl", "--max-new-tokens", 3)
    assert command("samples", *words, "--adapter", adapter)[0] == 0
    assert_refused(command("samples", *words), "answers.jsonl", "another")


# ---------------------------------------------------------------- alpaca merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_rounds_once_and_changes_nothing_else(base, adapter, command, tmp_path, dtype):
    folder = base_in(base, tmp_path / "base", dtype)
    printed = merge(command, folder, adapter, tmp_path / "out")
    assert f"14 of 14 adapted matrices have changed, rounded once to {str(dtype)[6:]}" in printed
    before, thin, changed = read_tensors(folder), load_file(adapter / WEIGHTS), 0
    for name, weight in read_tensors(tmp_path / "out").items():
        expected, stem = before[name], PREFIX + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in thin:
            A, B = (thin[f"{stem}.lora_{side}.weight"] for side in "AB")
            twice = expected + (B @ A * 2).to(dtype)
            expected = (expected.float() + B @ A * 2).to(dtype)
            changed += 1
            if dtype != torch.float32:
                assert not torch.equal(twice, weight), "rounding twice would show"
        assert torch.equal(bits(weight), bits(expected)), name
    assert changed == 14 and (tmp_path / "out/tokenizer.model").exists()


def test_merge_has_the_dtype_of_the_embedding_or_of_the_flag(base, adapter, command, tmp_path):
    folder = base_in(base, tmp_path / "base", torch.bfloat16)
    mixed = {n: t.float() if "norm" in n else t.clone() for n, t in read_tensors(folder).items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    merge(command, folder, adapter, tmp_path / "out")
    assert {t.dtype for t in read_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    merge(command, folder, adapter, tmp_path / "wide", "--dtype", "fp32")
    assert {t.dtype for t in read_tensors(tmp_path / "wide").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "factor", "word"),
    [
        (torch.float32, 1e38, "would be written with NaN or infinity"),
        (torch.bfloat16, 1e38, "would be written with NaN or infinity"),
        (torch.float16, 1e4, "too large for fp16"),
    ],
)
def test_merge_that_overflows_is_refused(base, adapter, command, tmp_path, dtype, factor, word):
    file = shutil.copytree(adapter, tmp_path / "adapter") / WEIGHTS
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)
    folder = base_in(base, tmp_path / "base", dtype)
    words = "--base", folder, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"
    assert_refused(command("merge", *words), f"{Q_PROJ}.weight", word)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.norm.weight"])
def test_merge_refuses_a_base_that_is_not_finite(base, adapter, command, tmp_path, name):
    file = shutil.copytree(base / "model", tmp_path / "base") / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[5] = float("nan")
    save_file(weights, file, {"format": "pt"})
    words = "--base", tmp_path / "base", "--adapter", adapter, "--out", tmp_path / "out"
    assert_refused(command("merge", *words), f"base: {name} holds NaN or infinity")
    assert not list(tmp_path.glob("out*"))


def test_adapter_that_is_not_finite_is_not_written(tmp_path):
    pairs = [("a.lora_A.weight", torch.ones(2)), ("a.lora_B.weight", torch.ones(2) / 0)]
    with pytest.raises(UserError, match=r"a\.lora_B\.weight would be written with NaN"):
        save_adapter(pairs, LoraConfig(), tmp_path / "adapter", "base")
    assert not list(tmp_path.iterdir())


def test_merge_that_changes_nothing_is_refused(base, adapter, command, tmp_path):
    weights = load_file(adapter / WEIGHTS)
    for name, factor in (("zero", 0.0), ("small", 1e-4)):
        folder = shutil.copytree(adapter, tmp_path / name)
        save_file({n: t * factor for n, t in weights.items()}, folder / WEIGHTS)
    words = "--out", tmp_path / "out", "--base"
    zero = command("merge", *words, base / "model", "--adapter", tmp_path / "zero")
    assert_refused(zero, "zero changes nothing")
    folder = base_in(base, tmp_path / "bf16", torch.bfloat16)
    small = command("merge", *words, folder, "--adapter", tmp_path / "small")
    assert_refused(small, "nothing", "bfloat16")
    assert not list(tmp_path.glob("out*"))
    merge(command, base / "model", tmp_path / "small", tmp_path / "fp32")


def test_merge_refuses_bases_it_cannot_use(base, adapter, command, tmp_path):
    words = "--adapter", adapter, "--out", tmp_path / "out", "--base"
    assert_refused(command("merge", *words, tmp_path / "nowhere"), "nowhere")
    flags = "--bits", 8, "--model-dir", base / "model", "--out", tmp_path / "int8"
    assert command("quantize", *flags)[0] == 0
    assert_refused(command("merge", *words, tmp_path / "int8"), "is quantized")
    bare = shutil.copytree(base / "model", tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert_refused(command("merge", *words, bare), "no tokenizer", "--tokenizer")
    (bare / "tokenizer.model").write_bytes(TOKENIZER.read_bytes()[:-100])
    assert_refused(command("merge", *words, bare), "tokenizer.model: not a SentencePiece model")
    merge(command, bare, adapter, tmp_path / "out", "--tokenizer", TOKENIZER)
    assert_refused(command("merge", *words, base / "model"), "exists already")
