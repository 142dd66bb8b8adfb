"""The model's kinds of attention against each other, its cache, its initial weights and config."""

import pytest
import torch
import torch.nn.functional as F
from helpers.flash import register_kernels
from helpers.models import random_ids, small_config, small_model

import model as model_module
from alpaca.inference.prefix import fork
from alpaca.weights.presets import preset
from model import (
    IGNORE,
    AttentionContext,
    KVCache,
    Llama,
    LlamaConfig,
    RMSNorm,
    packed_attention,
    rotary_tables,
)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def cu_seqlens(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# ---------------------------------------------------------------- packed documents


BOUNDARIES = [[24], [1, 23], [23, 1], [5, 7, 12], [1] * 24, [9, 0, 15], [8, 16, 0, 0, 0]]


@pytest.mark.parametrize("lengths", BOUNDARIES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_equals_one_document_at_a_time(lengths, kv_heads):
    model = small_model(num_key_value_heads=kv_heads)
    ids, weight = random_ids(1, 24), torch.randn(1, 24, 128)
    packed = model(ids, cu_seqlens(*lengths))
    (packed * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model(doc) for doc in ids.split(lengths, dim=1) if doc.numel()], dim=1)
    (alone * weight).sum().backward()
    assert distance(packed, alone) <= 2e-5
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert distance(parameter.grad, gradients[name]) <= 5e-6 * largest, name


def test_packed_row_may_exceed_the_positions_of_a_document():
    model, ids = small_model(), random_ids(1, 120)
    packed = model(ids, cu_seqlens(60, 60))
    assert distance(packed[:, 60:], model(ids[:, 60:])) <= 2e-5


@pytest.mark.parametrize("bounds", [[0, 65, 70], [0, 5, 80], [1, 70], [0, 40, 30, 70], [0, 60]])
def test_packed_refuses_invalid_cu_seqlens(bounds):
    with pytest.raises(RuntimeError, match="must rise from 0 to T"):
        small_model()(random_ids(1, 70), torch.tensor(bounds, dtype=torch.int32))


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
@pytest.mark.parametrize("width", [64, 80, 100, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_kernel_equals_the_loop(monkeypatch, device, width, kv_heads):
    """On a CPU with kernels that assert what the GPU's need, in torch 2.13 and as in 2.11."""
    varlen = register_kernels()
    monkeypatch.setattr(model_module, "FLASH", device)
    bounds = cu_seqlens(1, 0, 20, 27, *[0] * 27)
    sizes = (1, 48, 4, width), *[(1, 48, kv_heads, width)] * 2
    rows = [torch.randn(size).to(device, torch.bfloat16).requires_grad_() for size in sizes]
    upstream = torch.randn_like(rows[0])
    exact = packed_attention(*(x.float() for x in rows), bounds, 40)
    expected = exact, *torch.autograd.grad(exact, rows, upstream.float())
    varlen_attn = varlen.varlen_attn

    def older(*args, scale=None, window_size=None):  # without enable_gqa
        return varlen_attn(*args, scale=scale, window_size=window_size)

    for function in (varlen_attn, older):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        out = packed_attention(*rows, bounds.to(device), 40)
        found = out, *torch.autograd.grad(out, rows, upstream)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 0.005 * theirs.norm()


# ---------------------------------------------------------------- key/value cache


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_decoding_equals_the_full_forward_everywhere(kv_heads):
    """Prompts of different lengths prefilled in one packed row, then one token at a time for all;
    a sequence joins, one leaves, and a new one takes its slot."""
    model = small_model(num_key_value_heads=kv_heads)
    ids = random_ids(4, 20)
    full = model(ids)
    cache = KVCache(model.config, slots=3, max_length=24)

    def decode(steps: int, *sequences: int) -> None:
        """`sequences`: the line of `ids` that each slot holds."""
        which = torch.tensor(sequences)
        for _ in range(steps):
            at = cache.lengths.clone()
            logits = model(ids[which].gather(1, at[:, None]), cache=cache)
            assert distance(logits[:, 0], full[which, at]) <= 2e-5
            assert torch.equal(cache.lengths, at + 1)

    prompts = torch.cat([ids[0, :5], ids[1, :1]])[None]
    first = model(prompts, cu_seqlens(5, 1), cache[0:2])
    assert distance(first[0, :5], full[0, :5]) <= 2e-5
    assert distance(first[0, 5:], full[1, :1]) <= 2e-5
    assert cache.lengths.tolist() == [5, 1, 0]
    model(ids[2:3, :9], cu_seqlens(9), cache[2:3])
    decode(5, 0, 1, 2)
    cache.lengths[1] = 0
    model(ids[3:4, :11], cu_seqlens(11), cache[1:2])
    decode(3, 0, 3, 2)
    fork(cache[2:3], cache[0:1])
    assert cache.lengths.tolist() == [17, 14, 17]
    decode(3, 2, 3, 2)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_cached_decoding_of_several_tokens_at_once(static):
    model, ids = small_model(), random_ids(2, 20)
    cache = KVCache(model.config, slots=2, max_length=20)
    cache.static = static
    model(ids[:, :7].reshape(1, 14), cu_seqlens(7, 7), cache)
    parts = [model(part, cache=cache) for part in ids[:, 7:].split([1, 12], dim=1)]
    assert distance(torch.cat(parts, dim=1), model(ids)[:, 7:]) <= 2e-5


@torch.no_grad()
def test_cache_slot_stays_free_while_others_are_decoded():
    model, ids = small_model(), random_ids(1, 60)
    full = model(ids)
    cache = KVCache(model.config, slots=3, max_length=60)
    model(ids[:, :2], cu_seqlens(0, 2, 0), cache)
    for at in range(2, 60):
        logits = model(ids[:, at : at + 1].expand(3, 1), cache=cache)
        assert distance(logits[1, 0], full[0, at]) <= 2e-5
        assert cache.lengths.tolist() == [0, at + 1, 0]


@torch.no_grad()
def test_cache_misuse_raises_before_anything_is_stored():
    model = small_model()
    cache = KVCache(model.config, slots=3, max_length=8)
    for ids, bounds in (
        (random_ids(1, 4), cu_seqlens(4)),
        (random_ids(1, 4), cu_seqlens(2, 2)),
        (random_ids(2, 1), None),
    ):
        with pytest.raises(AssertionError, match="one cache slot per sequence"):
            model(ids, bounds, cache)
    with pytest.raises(AssertionError, match="all slots are empty"):
        model(random_ids(3, 2), cache=cache)
    with pytest.raises(AssertionError, match="a slice of its slots"):
        cache[[0, 2]]
    narrow = KVCache(model.config, slots=3, max_length=8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="bfloat16, too narrow for a model in torch.float32"):
        model(random_ids(1, 3), cu_seqlens(1, 1, 1), narrow)
    with pytest.raises(AssertionError, match="for torch.no_grad"), torch.enable_grad():
        model(random_ids(1, 3), cu_seqlens(1, 1, 1), cache)
    assert not cache.k.any() and not cache.lengths.any()


@torch.no_grad()
def test_lengths_beyond_cache_or_model_are_refused():
    model = small_model()
    cache = KVCache(model.config, slots=1, max_length=4)
    model(random_ids(1, 4), cu_seqlens(4), cache)
    with pytest.raises(IndexError):
        model(random_ids(1, 1), cache=cache)
    with pytest.raises(ValueError, match="65 tokens are too many: the model has 64 positions"):
        KVCache(model.config, slots=1, max_length=65)
    with pytest.raises(ValueError, match="65 tokens are too many"):
        model(random_ids(1, 65))


# ---------------------------------------------------------------- precision


def test_rotary_tables_are_fp32_in_a_bf16_model_from_meta():
    position = torch.tensor([[2047]])
    frequencies = 10000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    exact = torch.cos(2047 * frequencies)
    # fp32 resolves 2047 rad to 1.2e-4; tables rounded to bf16 would be off by up to 1
    assert distance(rotary_tables(position, preset("7B"))[0][0, 0, 0], exact) < 2.5e-4

    with torch.device("meta"):
        model = Llama(small_config(max_position_embeddings=2048))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.init_weights()
    ids = random_ids(1, 2048)
    positions = torch.arange(ids.shape[1])[None]
    context = AttentionContext(model.config, positions)
    expected = AttentionContext(small_config(max_position_embeddings=2048), positions)
    assert context.cos.dtype == torch.float32
    assert torch.equal(context.cos, expected.cos) and torch.equal(context.sin, expected.sin)
    assert torch.isfinite(model(ids)).all()
    assert not list(model.buffers()), "a buffer could be cast, or left empty"


def test_norm_and_rotation_compute_in_fp32_inside_a_bf16_model():
    x = torch.randn(4, 64, dtype=torch.float64)
    exact = x.bfloat16().double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(RMSNorm(64, 1e-6).bfloat16()(x.bfloat16()), exact.bfloat16())
    q = torch.randn(1, 30, 2, 32).bfloat16()
    cos, sin = rotary_tables(torch.arange(30)[None], LlamaConfig(32, 32, 32, 1, 1))
    a, b = q.double().chunk(2, dim=-1)
    cos2, sin2 = (torch.cat([table, table], -1).double() for table in (cos, sin))
    exact = q.double() * cos2 + torch.cat([-b, a], -1) * sin2
    rounding = exact.abs() * 2**-8  # bf16 has 8 bits
    assert ((model_module.rotate(q, cos, sin).double() - exact).abs() <= rounding + 1e-6).all()


def test_rotary_tables_stay_fp32_under_fsdp_mixed_precision(tmp_path, monkeypatch):
    """FSDP2 casts the floating-point arguments of blocks, inside dataclasses too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    model, dtypes = small_model(tie_word_embeddings=True), set()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    rotate = model_module.rotate

    def recording_rotate(x, cos, sin):
        dtypes.add((x.dtype, cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    monkeypatch.setattr(model_module, "rotate", recording_rotate)
    ids = random_ids(1, 16)
    model(ids, cu_seqlens(9, 7), labels=ids).backward()
    assert dtypes == {(torch.bfloat16, torch.float32, torch.float32)}
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.to_local().any(), name


# ---------------------------------------------------------------- weights, loss, config


def test_new_model_has_normal_matrices_and_norms_of_one():
    for name, parameter in small_model(initializer_range=0.3).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std() - 0.3) < 0.02 and abs(parameter.mean()) < 0.02, name


def test_meta_model_initializes_nothing_and_stays_tied(monkeypatch):
    monkeypatch.delattr(Llama, "init_weights")  # calling it would raise
    with torch.device("meta"):
        model = Llama(small_config(tie_word_embeddings=True))
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_labels_give_the_summed_cross_entropy_of_shifted_logits():
    model, ids = small_model(), random_ids(3, 17)
    labels = ids.masked_fill(torch.rand(3, 17) < 0.5, IGNORE)
    logits = model(ids)[:, :-1].flatten(0, 1)
    naive = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels), naive)
    assert model(ids, labels=torch.full_like(ids, IGNORE)).item() == 0.0


def test_presets_have_the_published_parameter_counts():
    published = {"7B": 6_738_415_616, "13B": 13_015_864_320, "30B": 32_528_943_616}
    published |= {"65B": 65_285_660_672, "smollm2-135m": 134_515_008}
    published |= {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}
    for name, count in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Llama(preset(name)).parameters()) == count
        old = name in ("7B", "13B", "30B")
        assert preset(name).rms_norm_eps == (1e-6 if old else 1e-5)
    assert sum(p.numel() for p in Llama(preset("tiny")).parameters()) < 3e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65, "head_dim": None}, "hidden_size 65 is not divisible by 4 heads"),
        ({"num_key_value_heads": 3}, "4 heads are not divisible by num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be above 0"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"vocab_size": -1}, "vocab_size must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0"),
    ],
)
def test_config_refuses_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
