"""Rounded weights: the kernels compute what the integers say, on disk and in memory alike."""

import json

import pytest
import torch
from helpers.commands import ROOT, assert_refused
from helpers.models import small_config
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.checkpoint import read_config
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.quantize import (
    Int4Linear,
    Int8Linear,
    WeightSource,
    save_quantized,
    split_bytes,
)
from alpaca.weights.writer import save_model
from model import Llama
from tokenizer import Tokenizer

TOKENIZER = ROOT / "data/tokenizer.model"
KINDS = {"int8": Int8Linear, "int4": Int4Linear}


def matrix(N: int, K: int) -> torch.Tensor:
    """Weights with outliers, equal groups and a row of zeros."""
    weight = torch.randn(N, K) * torch.rand(N, 1)
    weight[0] = 0
    weight[1, :32] = 0.37
    weight[2, 5] = 9.0
    return weight


def load(folder, bits=16, dtype=None, compiled=False) -> Llama:
    return optimize_layout(load_model(folder, bits=bits, dtype=dtype), compiled)


def folder_of(path, dtype=torch.bfloat16, **changes):
    config = small_config(**{"vocab_size": 1024, "intermediate_size": 192, **changes})
    torch.manual_seed(0)
    save_model(Llama(config), config, path, dtype, TOKENIZER)
    return path


# ---------------------------------------------------------------- one matrix


def test_int8_is_rounding_to_nearest_row_by_row():
    weight = matrix(48, 64)
    parts = Int8Linear.quantize(weight)
    scale = parts["scale"].float()[:, None]
    assert parts["scale"].dtype == torch.bfloat16
    off = (Int8Linear(**parts).dequantize() - weight).abs()
    # half a step, or where the scale was rounded down, what the largest number loses by it
    assert (off <= (scale * 0.5).maximum(weight.abs() * 2**-8) + 1e-9).all()
    assert off.max() > 0 and (parts["q"][0] == 0).all()
    assert (parts["q"][1:].abs().amax(1) == 127).all(), "all of the eight bits are used"


def test_int4_is_rounding_to_nearest_in_groups_of_32():
    weight = matrix(48, 96)
    layer = Int4Linear(**Int4Linear.quantize(weight))
    assert layer.q.shape == (48, 48) and layer.scales.shape == (3, 48, 2)
    scale = layer.scales[..., 0].float().T.repeat_interleave(32, dim=1)
    reach = weight.view(48, 3, 32).abs().amax(-1).repeat_interleave(32, dim=1)
    off = (layer.dequantize() - weight).abs()
    assert (off <= 0.5 * scale + reach * 2**-6 + 1e-9).all()  # s and z are rounded to bf16
    assert torch.equal(layer.integers().view(48, 3, 32)[1, 0], layer.integers()[1, :32])
    assert (off[1, :32] <= 0.37 * 2**-8).all(), "a group of equal numbers is that number"
    low, high = layer.integers().view(48, 3, 32)[2:].aminmax(dim=-1)
    assert (high - low >= 14).all(), "all of the four bits are used"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 15, 16, 17, 64])
@pytest.mark.parametrize("shape", [(48, 64), (16, 32), (1008, 352)])
def test_the_kernels_compute_what_the_integers_say(kind, rows, shape):
    layer = KINDS[kind](**KINDS[kind].quantize(matrix(*shape)))
    x = torch.randn(rows, shape[1]).bfloat16()
    exact = x.double() @ layer.dequantize().double().T
    # what bf16 may lose: a bit of every product's size and of the result
    allowed = (x.double().abs() @ layer.dequantize().double().abs().T) * 2**-8 + exact.abs() * 2**-7
    assert ((layer(x).double() - exact).abs() <= allowed).all()
    layer.pack()
    assert layer.packed
    out = layer(x[None])
    assert out.shape == (1, rows, shape[0]) and out.dtype == torch.bfloat16
    assert ((out[0].double() - exact).abs() <= allowed).all()


def test_activations_become_the_nearest_of_sixteen_bits():
    x = torch.randn(5, 64)
    step, halves = split_bytes(x)
    low, high = (half.int() - 128 for half in halves.chunk(2))
    assert ((256 * high + low) * step - x).abs().le(0.51 * step).all()


def test_any_width_can_be_int8():
    """(torch's own kernel for this reads past the end of rows of 50 columns.)"""
    layer = Int8Linear(**Int8Linear.quantize(matrix(33, 50)))
    x, exact = torch.randn(1, 50).bfloat16(), layer.dequantize()
    layer.pack()
    assert torch.allclose(layer(x).float(), x.float() @ exact.T, rtol=0.02, atol=0.02)


def test_an_outlier_does_not_drown_the_other_activations():
    """LLaMA has activations a thousand times as large as their neighbours. 8 bits could not tell
    the neighbours from nothing."""
    layer = Int8Linear(**Int8Linear.quantize(torch.randn(64, 512)))
    x = torch.randn(4, 512)
    x[:, 7] = 1000
    small = x.clone()
    small[:, 7] = 0
    exact, weight = small.bfloat16().float() @ layer.dequantize().T, layer.dequantize()
    layer.pack()
    ours = layer(x.bfloat16().float()) - 1000 * weight[:, 7]
    assert (ours - exact).norm() / exact.norm() < 0.02
    assert not layer(torch.zeros(2, 512).bfloat16()).any()


# ---------------------------------------------------------------- whole models


def dequantized(source: WeightSource) -> Llama:
    """The same model with plain fp32 weights that are what the integers say."""
    model = Llama(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind, parts = source.linear_class(name), source.read(name)
            true = kind(**parts).dequantize() if kind else parts["weight"].float()
            parameter.copy_(true)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_a_model_is_the_dequantized_one_in_bf16(tmp_path, bits, tied):
    folder = folder_of(tmp_path / "m", tie_word_embeddings=tied, initializer_range=0.05)
    model = load(folder, bits)
    exact = dequantized(WeightSource(folder, bits))
    ids = torch.randint(3, 1024, (1, 40))
    for few in (ids[:, :3], ids):
        ours, truth = model(few).float(), exact(few)
        off = (ours - truth).norm() / truth.norm()
        assert off < 0.02, off
    kinds = {type(m) for m in model.modules()}
    assert (Int4Linear in kinds) == (bits == 4) and Int8Linear in kinds  # the head
    assert type(model.model.embed_tokens) is torch.nn.Embedding


def test_the_test_above_can_fail(tmp_path):
    """int4 is farther from the true weights than bf16's rounding: the bound tells them apart."""
    folder = folder_of(tmp_path / "m", initializer_range=0.05)
    ids = torch.randint(3, 1024, (1, 40))
    with torch.no_grad():
        rounded, true = load(folder, 4)(ids), load_model(folder)(ids)
    assert (rounded.float() - true.float()).norm() / true.float().norm() > 0.04


@pytest.mark.parametrize("bits", [8, 4])
def test_saved_and_loaded_is_identical(tmp_path, bits):
    folder = folder_of(tmp_path / "m")
    save_quantized(WeightSource(folder, bits), tmp_path / "packed", folder)
    ids = torch.randint(3, 1024, (1, 30))
    with torch.no_grad():
        assert torch.equal(load(folder, bits)(ids), load(tmp_path / "packed")(ids))
        assert torch.equal(load(folder, bits)(ids[:, :1]), load(tmp_path / "packed")(ids[:, :1]))
    config = json.loads((tmp_path / "packed/config.json").read_text())
    told = {"bits": bits, "head": 8, "embeddings": 16, "group": 32}
    assert config["quantization_config"] == {"quant_method": "round to nearest", **told}
    assert Tokenizer(tmp_path / "packed").vocab_size == 1024
    with pytest.raises(ValueError, match="quantization_config"):
        read_config(tmp_path / "packed")  # what only reads plain models says so
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path / "packed", 12 - bits)


def test_decoding_with_rounded_weights_is_that_of_the_rounded_model(tmp_path):
    """Joined matrices, kernels for few and many rows, the cache: same tokens as the fp32 model of
    the dequantized weights, where the choice is clear."""
    folder = folder_of(tmp_path / "m", initializer_range=0.2)
    source = WeightSource(folder, 8)
    exact, tokenizer = dequantized(source), Tokenizer(TOKENIZER)
    prompts = [torch.randint(3, 1024, (n,)).tolist() for n in (4, 9, 30)]
    way, same, clear = SamplingParams(max_new_tokens=12), 0, 0
    answers = Engine(load(folder, 8), tokenizer, max_batch_size=3).generate(prompts, way)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + answer.ids]))[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        for token, row, (first, second) in zip(answer.ids, logits, best, strict=True):
            if first - second > 0.05 * row.std():
                clear, same = clear + 1, same + (token == row.argmax())
    assert same == clear > 20


# ---------------------------------------------------------------- mistakes


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    odd = folder_of(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(ValueError, match=r"down_proj.*columns in 32s, not 64 x 80"):
        load(odd, 4)
    load(odd, 8)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = folder_of(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for wrong in ("inf", "-inf", "nan"):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float(wrong)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .* not finite"):
            load(folder, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_what_is_not_rounded_stays_as_the_checkpoint_has_it(tmp_path, dtype, bits):
    folder = folder_of(tmp_path / "m", dtype, initializer_range=0.05)
    ids = torch.randint(3, 1024, (2, 20))
    source = WeightSource(folder, bits)
    save_quantized(source, tmp_path / "p")
    for model in (load(folder, bits), load(tmp_path / "p")):
        assert model.model.norm.weight.dtype == dtype
        out, truth = model(ids), dequantized(source)(ids)
        assert out.dtype == dtype and (out.float() - truth).norm() / truth.norm() < 0.02
    other = load(folder, bits, dtype=torch.bfloat16)
    assert other.model.norm.weight.dtype == torch.bfloat16 == other(ids).dtype


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_contiguous(kind):
    layer = KINDS[kind](**KINDS[kind].quantize(matrix(48, 64)))
    layer.pack()
    x = torch.randn(64, 6).bfloat16().T
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_a_compiled_model_of_integers(tmp_path):
    folder = folder_of(tmp_path / "m", num_hidden_layers=1)
    prompt, way = list(range(3, 9)), SamplingParams(max_new_tokens=5)
    # in fp32, where no two pieces are as likely
    model = load(folder, 8, dtype=torch.float32, compiled=True)
    engine = Engine(model, Tokenizer(TOKENIZER), max_length=12, compile=True)
    (plain,) = Engine(model, Tokenizer(TOKENIZER)).generate([prompt], way)
    assert engine.generate([prompt], way)[0].ids == plain.ids


def test_a_damaged_packed_folder_is_refused(tmp_path):
    folder = folder_of(tmp_path / "m")
    save_quantized(WeightSource(folder, 4), tmp_path / "p")
    tensors = load_file(tmp_path / "p/model.safetensors")
    whole = tensors["model.layers.0.mlp.up_proj.scales"].clone()
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "p/model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.scales .* not finite"):
        load(tmp_path / "p")
    tensors["model.layers.0.mlp.up_proj.scales"] = whole
    del tensors["model.layers.0.self_attn.q_proj.scales"]
    save_file(tensors, tmp_path / "p/model.safetensors")
    with pytest.raises(ValueError, match="not what its config.json says"):
        load(tmp_path / "p")
    config = json.loads((tmp_path / "p/config.json").read_text())
    for field, value in (("bits", 3), ("head", 16), ("embeddings", 8)):
        changed = {"quantization_config": config["quantization_config"] | {field: value}}
        (tmp_path / "p/config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match="quantize the original again"):
            load(tmp_path / "p")


def test_the_command(tmp_path, command):
    folder = folder_of(tmp_path / "m")
    code, out, _ = command("quantize", "--model-dir", folder, "--bits", 4)
    assert code == 0 and "relative error" in out and not (tmp_path / "p").exists()
    assert command("quantize", "--model-dir", folder, "--bits", 4, "--out", tmp_path / "p")[0] == 0
    assert load(tmp_path / "p").config.vocab_size == 1024
    assert_refused(command("quantize", "--model-dir", folder), "--bits")
    assert_refused(command("quantize", "--model-dir", tmp_path / "p", "--bits", 8), "already")
    assert_refused(command("quantize", "--model-dir", tmp_path / "x", "--bits", 8), "x")
    again = command("quantize", "--model-dir", folder, "--bits", 8, "--out", tmp_path / "p")
    assert again[0] == 2 and "exists" in again[2]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_report_is_what_it_says(tmp_path, bits):
    folder = folder_of(tmp_path / "m")
    source, name = WeightSource(folder, bits), "model.layers.0.mlp.up_proj.weight"
    true = source.stored[name].read().float()
    rounded = KINDS[f"int{bits}"](**source.read(name)).dequantize()
    expected = ((rounded - true).square().sum() / true.square().sum()).sqrt().item()
    assert source.relative_error(name) == pytest.approx(expected, rel=1e-4)
    assert {8: 0.003, 4: 0.05}[bits] < expected < {8: 0.015, 4: 0.12}[bits]
