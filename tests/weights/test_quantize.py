"""Quantized weights: what rounding gives, and that the kernels compute what the integers say."""

import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import TOKENIZER
from helpers.commands import assert_refused
from helpers.models import small_config
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError
from alpaca.weights import quantized_linear
from alpaca.weights.checkpoint import read_config
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.quantize import WeightSource, save_quantized
from alpaca.weights.quantized_linear import (
    FEW_ROWS,
    LINEAR,
    Int4Linear,
    Int8Linear,
    split_bytes,
)
from alpaca.weights.writer import save_model
from model import Llama
from tokenizer import load_tokenizer

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
UP = "model.layers.0.mlp.up_proj"


def matrix(N: int, K: int) -> torch.Tensor:
    """Weights with outliers, a group of equal numbers and a row of zeros."""
    weight = torch.randn(N, K) * torch.rand(N, 1)
    weight[0] = 0
    weight[1, :32] = 0.37
    weight[2, 5] = 9.0
    return weight


def quantized(bits: int, weight: torch.Tensor) -> Int8Linear | Int4Linear:
    return LINEAR[bits](**LINEAR[bits].quantize(weight))


def load(folder, bits=16, dtype=None, compiled=False) -> Llama:
    return optimize_layout(load_model(folder, bits=bits, dtype=dtype), compiled)


def write_folder(path, dtype=torch.bfloat16, **changes):
    config = small_config(**{"vocab_size": 1024, "intermediate_size": 192, **changes})
    torch.manual_seed(0)
    save_model(Llama(config), config, path, dtype, TOKENIZER)
    return path


def dequantized(source: WeightSource) -> Llama:
    """The same model with plain fp32 weights that are what the integers say."""
    model = Llama(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind, tensors = source.linear_class(name), source.read(name)
            parameter.copy_(kind(**tensors).dequantize() if kind else tensors["weight"].float())
    return model


# ---------------------------------------------------------------- one matrix


def test_docstring_example_is_rounded_as_written():
    weight = torch.tensor([[-0.3, 0.1, 0.22, 0.45] * 8] * 16)
    int8, int4 = quantized(8, weight), quantized(4, weight)
    assert int8.q[0, :4].tolist() == [-85, 28, 62, 127]
    assert int4.integers()[0, :4].tolist() == [0, 8, 10, 15]
    assert torch.allclose(int4.dequantize()[0, :4], torch.tensor([-0.3, 0.1, 0.2, 0.45]), atol=2e-3)


def test_int8_rounds_to_nearest_row_by_row():
    weight = matrix(48, 64)
    layer = quantized(8, weight)
    scale = layer.scale.float()[:, None]
    assert layer.scale.dtype == torch.bfloat16
    off = (layer.dequantize() - weight).abs()
    # half a step; or where the scale was rounded down, what the largest number loses by that
    assert (off <= (scale * 0.5).maximum(weight.abs() * 2**-8) + 1e-9).all()
    assert off.max() > 0 and (layer.q[0] == 0).all()
    assert (layer.q[1:].abs().amax(1) == 127).all(), "all of the eight bits are used"


def test_int4_rounds_to_nearest_in_groups_of_32():
    weight = matrix(48, 96)
    layer = quantized(4, weight)
    assert layer.q.shape == (48, 48) and layer.scales.shape == (3, 48, 2)
    scale = layer.scales[..., 0].float().T.repeat_interleave(32, dim=1)
    reach = weight.view(48, 3, 32).abs().amax(-1).repeat_interleave(32, dim=1)
    off = (layer.dequantize() - weight).abs()
    assert (off <= 0.5 * scale + reach * 2**-6 + 1e-9).all()  # s and z are rounded to bf16
    assert (off[1, :32] <= 0.37 * 2**-8).all(), "a group of equal numbers is that number"
    low, high = layer.integers().view(48, 3, 32)[2:].aminmax(dim=-1)
    assert (high - low >= 14).all(), "all of the four bits are used"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 64, 200])
@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (8, (48, 64)),
        (8, (1008, 352)),
        (8, (33, 50)),  # torch's own kernel for int8 reads past the end of such rows
        (4, (48, 64)),
        (4, (1008, 352)),
        (4, (16, 256)),
        (4, (320, 128)),  # in blocks of 32 or 64, as a CPU dequantizes it for many rows
    ],
)
@torch.no_grad()
def test_kernels_compute_what_the_integers_say(rows, bits, shape, device):
    layer = quantized(bits, matrix(*shape)).to(device)
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    weight = layer.dequantize().double()
    exact = x.double() @ weight.T
    # what bf16 may lose: a bit of every product's size and of the result
    allowed = (x.double().abs() @ weight.abs().T) * 2**-8 + exact.abs() * 2**-7
    assert ((layer(x).double() - exact).abs() <= allowed).all()
    layer.pack()
    instructions = device == "cpu" and torch.cpu._is_vnni_supported()
    assert layer.packed == (bits == 4 or instructions)
    for given in (x, x.T.contiguous().T):  # as rows and as columns in memory
        out = layer(given[None])
        assert out.shape == (1, rows, shape[0]) and out.dtype == torch.bfloat16
        assert ((out[0].double() - exact).abs() <= allowed).all()


def pack_int4_for_gpu(q: torch.Tensor, tiles: int) -> torch.Tensor:
    """The order in memory of `_convert_weight_to_int4pack`, which a CPU does not have."""
    (N, K), packed = q.shape, torch.zeros(len(q) // 8, q.shape[1] // (16 * tiles), 32, tiles // 2)
    packed = packed.long()
    for n, k in itertools.product(range(N), range(K)):
        tile, inside = divmod(k, 16)  # columns of a tile: 0 1 8 9, 2 3 10 11, ... by lane
        lane, half = (n % 8) * 4 + inside % 8 // 2, inside // 8
        nibble = 4 * (k % 2) + 2 * (tile % 2) + half
        packed[n // 8, tile // tiles, lane, tile % tiles // 2] += int(q[n, k]) << 4 * nibble
    return packed.to(torch.int32)


@pytest.mark.parametrize(("tiles", "group"), [(2, 32), (4, 64), (8, 32)])
def test_int4_on_a_gpu_is_dequantized_for_many_rows(monkeypatch, tiles, group):
    monkeypatch.setattr(quantized_linear, "GPU", "cpu")
    layer = Int4Linear(**Int4Linear.quantize(matrix(16, 256), group))
    weight, x = layer.dequantize().bfloat16(), torch.randn(FEW_ROWS + 1, 256)
    layer.q, layer.packed = pack_int4_for_gpu(layer.integers(), tiles), True
    assert torch.equal(layer(x), F.linear(x.bfloat16(), weight).float())
    with pytest.raises(NotImplementedError, match="_weight_int4pack_mm"):  # a GPU's kernel
        layer(x[1:])


def test_int8_on_a_gpu_has_a_gradient_where_one_is_wanted(monkeypatch):
    """Its kernel for few rows has none."""
    monkeypatch.setattr(quantized_linear, "GPU", "cpu")
    layer, x = Int8Linear(**Int8Linear.quantize(matrix(16, 64))), torch.randn(2, 64)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, 64))


def test_activations_are_rounded_to_16_bits():
    x = torch.randn(5, 64)
    step, both = split_bytes(x)
    low, high = (half.int() - 128 for half in both.chunk(2))
    assert ((256 * high + low) * step - x).abs().le(0.51 * step).all()


def test_int8_keeps_small_activations_beside_an_outlier():
    """LLaMA has activations a thousand times as large as their neighbours; 8 bits would round the
    neighbours to zero."""
    layer = quantized(8, torch.randn(64, 512))
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


@pytest.mark.parametrize(
    ("bits", "tied", "dtype"),
    [
        (8, False, torch.bfloat16),
        (8, True, torch.float32),
        (8, False, torch.float16),
        (4, True, torch.bfloat16),
        (4, False, torch.float32),
        (4, False, torch.float16),
    ],
)
@torch.no_grad()
def test_model_equals_the_dequantized_one(tmp_path, bits, tied, dtype):
    folder = write_folder(tmp_path / "m", dtype, tie_word_embeddings=tied, initializer_range=0.05)
    source, model = WeightSource(folder, bits), load(folder, bits)
    exact, ids = dequantized(source), torch.randint(3, 1024, (1, 40))
    for few in (ids[:, :3], ids):
        ours, expected = model(few), exact(few)
        assert ours.dtype == model.model.norm.weight.dtype == dtype
        assert (ours.float() - expected).norm() / expected.norm() < 0.02
    kinds = {type(m) for m in model.modules()}
    assert (Int4Linear in kinds) == (bits == 4) and Int8Linear in kinds  # the head
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    if bits == 4:  # the bound above can fail: 4 bits are farther from the stored weights
        stored = load_model(folder)(ids).float()
        assert (ours.float() - stored).norm() / stored.norm() > 0.04
    other = load(folder, bits, torch.bfloat16)
    assert other.model.norm.weight.dtype == other(ids[:, :3]).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "tied"), [(8, False), (4, True)])
def test_saved_and_loaded_is_identical(tmp_path, command, bits, tied):
    folder, packed = write_folder(tmp_path / "m", tie_word_embeddings=tied), tmp_path / "packed"
    code, out, _ = command("quantize", "--model-dir", folder, "--bits", bits, "--out", packed)
    assert code == 0
    mean, largest = map(float, re.findall(r"error (\S+) on average, at most (\S+)", out)[0])
    assert {8: 0.003, 4: 0.05}[bits] < mean < largest < {8: 0.015, 4: 0.12}[bits]
    ids = torch.randint(3, 1024, (1, 30))
    with torch.no_grad():
        for few in (ids[:, :1], ids):
            assert torch.equal(load(folder, bits)(few), load(packed)(few))
    config = json.loads((packed / "config.json").read_text())
    stored = {"bits": bits, "head": 8, "embeddings": 16, "group": 32}
    assert config["quantization_config"] == {"quant_method": "round to nearest", **stored}
    assert load_tokenizer(packed).vocab_size == 1024
    with pytest.raises(UserError, match="quantization_config"):
        read_config(packed)  # for those who read plain models only
    with pytest.raises(UserError, match=f"quantized already, to {bits} bits"):
        load(packed, 12 - bits)


@torch.no_grad()
def test_layout_for_the_compiler_computes_the_same(tmp_path):
    folder, ids = write_folder(tmp_path / "m"), torch.randint(3, 1024, (1, 9))
    plain = load(folder, 8, torch.float32, compiled=True)
    assert {m.packed for m in plain.modules() if type(m) is Int8Linear} == {False}
    assert torch.allclose(plain(ids), load(folder, 8, torch.float32)(ids), atol=1e-3)


# ---------------------------------------------------------------- errors


def test_int4_refuses_shapes_that_do_not_fit(tmp_path):
    odd = write_folder(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(UserError, match=r"down_proj.*columns in 32s, not 64 x 80"):
        load(odd, 4)
    load(odd, 8)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, name):
    folder = write_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = float(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} .* not finite"):
        load(folder, 8)


@pytest.mark.parametrize("numbers", [(3.4e38, -3.4e38), (3.402e38, 3.402e38), (1e30, -1e30)])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_too_large_to_round_are_refused(tmp_path, command, bits, numbers):
    folder = write_folder(tmp_path / "m", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight"][3] = torch.tensor(numbers).repeat(32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = "--model-dir", folder, "--bits", bits, "--out", tmp_path / "out"
    assert_refused(command("quantize", *words), f"{UP}.weight holds numbers too large to round")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("name", "shape"), [("norm", (1,)), ("embed_tokens", (256, 64))])
def test_quantized_folder_with_another_shape_is_refused(tmp_path, name, shape):
    folder = tmp_path / "packed"
    save_quantized(WeightSource(write_folder(tmp_path / "m"), 8), folder)
    tensors = load_file(folder / "model.safetensors") | {f"model.{name}.weight": torch.ones(shape)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not what its config.json says"):
        load(folder)


def test_damaged_or_older_quantized_folder_is_refused(tmp_path):
    folder = tmp_path / "packed"
    save_quantized(WeightSource(write_folder(tmp_path / "m"), 4), folder)
    tensors = load_file(folder / "model.safetensors")
    whole = tensors[f"{UP}.scales"].clone()
    tensors[f"{UP}.scales"][0, 0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.scales .* not finite"):
        load(folder)
    del tensors["model.layers.0.self_attn.q_proj.scales"]
    save_file(tensors | {f"{UP}.scales": whole}, folder / "model.safetensors")
    with pytest.raises(UserError, match="not what its config.json says"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("bits", 3), ("head", 16), ("embeddings", 8)):
        changed = {"quantization_config": config["quantization_config"] | {field: value}}
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match="quantize the original again"):
            load(folder)


def test_quantize_needs_a_tokenizer_that_the_result_is_opened_with(tmp_path, command):
    folder, out = write_folder(tmp_path / "m"), tmp_path / "out"
    (folder / "tokenizer.model").unlink()
    words = "--model-dir", folder, "--bits", 8, "--out", out
    assert_refused(command("quantize", *words), f"{folder}: no tokenizer in it", "--tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    assert_refused(command("quantize", *words), "tokenizer.json: model is missing")
    other = write_folder(tmp_path / "other", vocab_size=1000)
    assert_refused(command("quantize", "--model-dir", other, *words[2:]), "only 1000 embeddings")
    assert not list(tmp_path.glob("out*"))
    assert command("quantize", *words, "--tokenizer", TOKENIZER)[0] == 0
    assert command("generate", "--model-dir", out, "--max-new-tokens", 2, "Hello")[0] == 0


def test_quantize_errors_are_one_line(tmp_path, command):
    folder = write_folder(tmp_path / "m")
    code, out, _ = command("quantize", "--model-dir", folder, "--bits", 4)
    assert code == 0 and "relative error" in out and not (tmp_path / "p").exists()
    assert_refused(command("quantize", "--model-dir", folder), "--bits")
    assert command("quantize", "--model-dir", folder, "--bits", 4, "--out", tmp_path / "p")[0] == 0
    assert_refused(command("quantize", "--model-dir", tmp_path / "p", "--bits", 4), "already")
    assert_refused(command("quantize", "--model-dir", tmp_path / "x", "--bits", 8), "x")
    again = command("quantize", "--model-dir", folder, "--bits", 8, "--out", tmp_path / "p")
    assert again[0] == 2 and "exists" in again[2]


def test_group_size_is_recorded_and_read_back(tmp_path, command):
    folder, out = write_folder(tmp_path / "m"), tmp_path / "out"
    words = "--model-dir", folder, "--group-size", 64
    assert_refused(command("quantize", *words, "--bits", 8), "--group-size goes with --bits 4")
    assert command("quantize", *words, "--bits", 4, "--out", out)[0] == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group"] == 64
    source, ids = WeightSource(folder, 4, group=64), torch.arange(1, 9)[None]
    assert source.read(f"{UP}.weight")["scales"].shape == (1, 192, 2)
    expected, narrow = dequantized(source)(ids), dequantized(WeightSource(folder, 4))(ids)
    off = (load(out, dtype=torch.float32)(ids) - expected).abs().max()
    assert off < 0.1 < 0.2 < (narrow - expected).abs().max()
