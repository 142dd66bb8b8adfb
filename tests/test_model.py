"""The model against Hugging Face's, and its three ways through attention against each other."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import hf_model, random_ids, small_config, small_model
from helpers.parity import apart

import model as model_module
from alpaca.weights.loading import load_model
from model import IGNORE, KVCache, Llama, LlamaConfig, RMSNorm, plain_context, rotary_tables

SHAPES = {
    "heads = kv heads": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "rope_theta 1e6": {"rope_theta": 1e6},
    "odd sizes": {
        "vocab_size": 131,
        "hidden_size": 90,
        "intermediate_size": 113,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "wide heads": {"head_dim": 24, "rms_norm_eps": 1e-5},
}


def pair(tmp_path, **changes):
    """The same random weights in Hugging Face's model and, through its folder, in ours."""
    theirs = hf_model(small_config(**changes))
    theirs.save_pretrained(tmp_path / "hf")
    return theirs, load_model(tmp_path / "hf")


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---------------------------------------------------------------- against Hugging Face


@pytest.mark.parity
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_equal_hugging_face(tmp_path, changes):
    theirs, ours = pair(tmp_path, **changes)
    ids = random_ids(2, 24, vocab_size=ours.config.vocab_size)
    labels = ids.clone()
    labels[0, :7], labels[1, 20:] = IGNORE, IGNORE
    expected = theirs(ids, labels=labels)
    apart("logits: transformers' LlamaForCausalLM", closeness(ours(ids), expected.logits), 1e-4)
    expected.loss.backward()
    (ours(ids, labels=labels) / (labels[:, 1:] != IGNORE).sum()).backward()
    gradients = dict(theirs.named_parameters())
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        distance = closeness(parameter.grad, gradients[name].grad)
        apart("gradient of every parameter: transformers", distance, 1e-4)
        assert parameter.grad.abs().max() > 1e-3, f"{name} is compared at nothing"


def neighbours_rotated(x, cos, sin):
    """Meta's layout applied to Hugging Face's weights: the classic mistake."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in (cos, sin))
    return x * cos + turned * sin


def test_parity_notices_a_wrong_rotary_layout(tmp_path, monkeypatch):
    theirs, ours = pair(tmp_path)
    ids = random_ids(2, 24)
    monkeypatch.setattr(model_module, "rotate", neighbours_rotated)
    assert closeness(ours(ids), theirs(ids).logits) > 1.0


def test_parity_notices_a_wrong_base_or_norm_eps(tmp_path):
    theirs, ours = pair(tmp_path)
    ids = random_ids(2, 24)
    expected = theirs(ids).logits
    ours.config.rope_theta = 20000.0
    assert closeness(ours(ids), expected) > 1e-2
    ours.config.rope_theta = 10000.0
    assert closeness(ours(ids), expected) <= 1e-4
    for module in ours.modules():
        if isinstance(module, model_module.RMSNorm):
            module.eps = 1e-5
    assert closeness(ours(ids), expected) > 1e-4


def test_bf16_chooses_the_same_token_wherever_bf16_can_tell(tmp_path):
    theirs, ours = pair(tmp_path, num_hidden_layers=3)
    ids = random_ids(16, 48)
    with torch.no_grad():
        exact = theirs(ids).logits
        expected = theirs.bfloat16()(ids).logits.float()
        chosen = ours.bfloat16()(ids).float().argmax(-1)
    noise = closeness(expected, exact)  # what bf16 costs Hugging Face itself
    best, second = expected.topk(2).values.unbind(-1)
    decided = best - second > noise
    assert 0.2 < decided.float().mean() < 1.0, "the test must have something to decide"
    assert torch.equal(chosen[decided], expected.argmax(-1)[decided])


# ---------------------------------------------------------------- packed documents


def cut(total: int, lengths: list[int]) -> torch.Tensor:
    assert sum(lengths) == total
    return torch.tensor([0, *lengths]).cumsum(0).int()


BOUNDARIES = [[24], [1, 23], [23, 1], [5, 7, 12], [1] * 24, [9, 0, 15], [8, 16, 0, 0, 0]]


@pytest.mark.parametrize("lengths", BOUNDARIES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_equals_one_document_at_a_time(lengths, kv_heads):
    model = small_model(num_key_value_heads=kv_heads)
    ids, weight = random_ids(1, 24), torch.randn(1, 24, 128)
    packed = model(ids, cut(24, lengths))
    (packed * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model(doc) for doc in ids.split(lengths, dim=1) if doc.numel()], dim=1)
    (alone * weight).sum().backward()
    assert closeness(packed, alone) <= 2e-5
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert closeness(parameter.grad, gradients[name]) <= 5e-6 * largest, name


def test_no_document_sees_another():
    model, bounds = small_model(), cut(24, [9, 8, 7])
    ids = random_ids(1, 24)
    before = model(ids, bounds)
    for start, end in ((0, 9), (9, 17), (17, 24)):
        changed = ids.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % 128
        after = model(changed, bounds)
        same = [i for i in range(24) if not start <= i < end]
        assert torch.equal(before[:, same], after[:, same])
        assert not torch.equal(before[:, start:end], after[:, start:end])


def test_packed_loss_is_the_sum_of_the_documents_losses():
    model, lengths = small_model(), [9, 8, 7]
    ids = random_ids(1, 24)
    labels = ids.clone()  # first labels included: the model itself must not learn across documents
    parts = zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
    alone = sum(model(doc, labels=label) for doc, label in parts)
    torch.testing.assert_close(model(ids, cut(24, lengths), labels=labels), alone)


# ---------------------------------------------------------------- key/value cache


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_decoding_equals_the_full_forward_at_every_position(kv_heads):
    """Unequal prompts prefilled in one packed row, then everybody one token at a time."""
    model = small_model(num_key_value_heads=kv_heads)
    prompts, total = [5, 1, 9], 20
    ids = random_ids(3, total)
    full = model(ids)
    cache = KVCache(model.config, slots=3, max_length=32)
    packed = torch.cat([ids[row, :n] for row, n in enumerate(prompts)])[None]
    first = model(packed, cut(15, prompts), cache=cache)
    for row, logits in enumerate(first.split(prompts, dim=1)):
        assert closeness(logits[0], full[row, : prompts[row]]) <= 2e-5
    assert cache.lengths.tolist() == prompts
    for _ in range(total - max(prompts)):
        at = cache.lengths.clone()
        step = ids.gather(1, at[:, None])
        logits = model(step, cache=cache)
        assert closeness(logits[:, 0], full[torch.arange(3), at]) <= 2e-5
    assert cache.lengths.tolist() == [n + total - max(prompts) for n in prompts]


@torch.no_grad()
def test_rows_join_leave_and_start_afresh_while_others_go_on():
    model = small_model()
    ids = random_ids(4, 20)
    full = model(ids)
    cache = KVCache(model.config, slots=3, max_length=24)
    model(ids[:2, :6].reshape(1, 12), cut(12, [6, 6]), cache=cache[0:2])
    assert cache.lengths.tolist() == [6, 6, 0]
    model(ids[2:3, :4], cut(4, [4]), cache=cache[2:3])  # one joins
    row_of = torch.arange(3)
    for _ in range(3):
        at = cache.lengths.clone()
        logits = model(ids[row_of].gather(1, at[:, None]), cache=cache)
        assert closeness(logits[:, 0], full[row_of, at]) <= 2e-5
    cache.lengths[1] = 0  # one leaves, and the fourth takes its row
    model(ids[3:4, :11], cut(11, [11]), cache=cache[1:2])
    row_of = torch.tensor([0, 3, 2])
    for _ in range(3):
        at = cache.lengths.clone()
        logits = model(ids[row_of].gather(1, at[:, None]), cache=cache)
        assert closeness(logits[:, 0], full[row_of, at]) <= 2e-5


@torch.no_grad()
def test_several_tokens_can_go_on_at_once():
    model = small_model()
    ids = random_ids(2, 20)
    cache = KVCache(model.config, slots=2, max_length=20)
    model(ids[:, :7].reshape(1, 14), cut(14, [7, 7]), cache=cache)
    parts = [model(part, cache=cache) for part in ids[:, 7:].split([1, 12], dim=1)]
    assert closeness(torch.cat(parts, dim=1), model(ids)[:, 7:]) <= 2e-5


@torch.no_grad()
def test_a_free_row_stays_free_however_long_the_others_go_on():
    model = small_model()
    ids = random_ids(1, 60)
    full = model(ids)
    cache = KVCache(model.config, slots=3, max_length=60)
    model(ids[:, :2], cut(2, [0, 2, 0]), cache=cache)
    for at in range(2, 60):
        logits = model(ids[:, at : at + 1].expand(3, 1), cache=cache)
        assert closeness(logits[1, 0], full[0, at]) <= 2e-5
        assert cache.lengths.tolist() == [0, at + 1, 0]


@torch.no_grad()
def test_a_misused_cache_is_an_error_before_anything_is_stored():
    model = small_model()
    cache = KVCache(model.config, slots=3, max_length=8)
    for ids, bounds in (
        (random_ids(1, 4), cut(4, [4])),
        (random_ids(1, 4), cut(4, [2, 2])),
        (random_ids(2, 1), None),
    ):
        with pytest.raises(AssertionError, match="a cache row a sequence"):
            model(ids, bounds, cache=cache)
    with pytest.raises(AssertionError, match="no row has started"):
        model(random_ids(3, 2), cache=cache)
    with pytest.raises(AssertionError, match="a slice of its rows"):
        cache[[0, 2]]
    narrow = KVCache(model.config, slots=3, max_length=8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="bfloat16, too narrow for a model in torch.float32"):
        model(random_ids(1, 3), cut(3, [1, 1, 1]), cache=narrow)
    with pytest.raises(AssertionError, match="for torch.no_grad"), torch.enable_grad():
        model(random_ids(1, 3), cut(3, [1, 1, 1]), cache=cache)
    assert not cache.k.any() and not cache.lengths.any()


@torch.no_grad()
def test_a_full_cache_is_an_error_and_not_a_wrong_answer():
    model = small_model()
    cache = KVCache(model.config, slots=1, max_length=4)
    model(random_ids(1, 4), cut(4, [4]), cache=cache)
    with pytest.raises(IndexError):
        model(random_ids(1, 1), cache=cache)
    with pytest.raises(ValueError, match="65 tokens are too many: the model knows 64 positions"):
        KVCache(model.config, slots=1, max_length=65)
    with pytest.raises(ValueError, match="65 tokens are too many"):
        model(random_ids(1, 65))


@pytest.mark.parametrize("bounds", [[0, 65, 70], [0, 5, 80], [1, 70], [0, 40, 30, 70], [0, 60]])
def test_bounds_that_do_not_cover_the_row_are_refused(bounds):
    with pytest.raises(RuntimeError, match="must rise from 0 to T"):
        small_model()(random_ids(1, 70), torch.tensor(bounds, dtype=torch.int32))


# ---------------------------------------------------------------- rotary tables, dtypes, devices


def test_rotary_tables_are_fp32_truth_whatever_the_model_is_cast_to():
    config = LlamaConfig.preset("7B")
    position = torch.tensor([[2047]])
    speed = 10000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    truth = torch.cos(2047 * speed)
    # 2047 rad in fp32 is known to 1.2e-4; tables rounded to bf16 would be off by up to 1
    assert closeness(rotary_tables(position, config)[0][0, 0, 0], truth) < 2.5e-4

    with torch.device("meta"):
        late = Llama(small_config(max_position_embeddings=2048))
    late = late.to(torch.bfloat16).to_empty(device="cpu")
    late.init_weights()
    ids = random_ids(1, 2048)
    plain = plain_context(ids, small_config(max_position_embeddings=2048))
    after = plain_context(ids, late.config)
    assert after.cos.dtype == torch.float32
    assert torch.equal(plain.cos, after.cos) and torch.equal(plain.sin, after.sin)
    assert torch.isfinite(late(ids)).all()
    assert not list(late.buffers()), "a buffer could be cast, or left empty"


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
    rounding = exact.abs() * 2**-8  # bf16 keeps 8 bits
    assert ((model_module.rotate(q, cos, sin).double() - exact).abs() <= rounding + 1e-6).all()


def test_a_new_model_has_llamas_initial_weights():
    model = small_model(initializer_range=0.3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std() - 0.3) < 0.02 and abs(parameter.mean()) < 0.02, name


def test_rotary_tables_are_bitwise_hugging_faces():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = small_config(head_dim=48, rope_theta=5e5)
    positions = torch.arange(2048)[None]
    theirs = LlamaRotaryEmbedding(hf_model(config).config)(torch.zeros(1), positions)
    for ours, expected in zip(rotary_tables(positions, config), theirs, strict=True):
        assert torch.equal(ours[:, :, 0].repeat(1, 1, 2), expected)


def test_rotary_tables_stay_fp32_under_fsdp_mixed_precision(tmp_path, monkeypatch):
    """FSDP2 casts the floating-point arguments of blocks, inside dataclasses too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    model, seen = small_model(tie_word_embeddings=True), []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    rotate = model_module.rotate

    def watched(x, cos, sin):
        seen.append((x.dtype, cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    monkeypatch.setattr(model_module, "rotate", watched)
    ids = random_ids(1, 16)
    loss = model(ids, cut(16, [9, 7]), labels=ids)
    loss.backward()
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.to_local().any(), name


def test_laying_a_model_out_fills_nothing(monkeypatch):
    """It did, at every opening of a folder, in half a second for 7B."""
    monkeypatch.delattr(Llama, "init_weights")
    with torch.device("meta"):
        Llama(small_config())


def test_tied_weights_stay_one_tensor_through_meta_init():
    with torch.device("meta"):
        model = Llama(small_config(tie_word_embeddings=True))
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_packed_row_may_be_longer_than_any_document():
    """A packed row may be longer than the positions known; only documents may not."""
    model = small_model()
    ids = random_ids(1, 120)
    packed = model(ids, cut(120, [60, 60]))
    assert closeness(packed[:, 60:], model(ids[:, 60:])) <= 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_packed_equals_one_document_at_a_time_on_cuda(kv_heads):
    model = small_model(num_key_value_heads=kv_heads, num_attention_heads=4, head_dim=64)
    model = model.to("cuda", torch.bfloat16)
    ids, lengths = random_ids(1, 48).cuda(), [1, 20, 27, 0]
    packed = model(ids, cut(48, lengths).cuda()).float()
    alone = torch.cat([model(doc) for doc in ids.split(lengths, 1) if doc.numel()], 1).float()
    packed.sum().backward()
    assert closeness(packed, alone) <= 0.02 * alone.abs().max()


# ---------------------------------------------------------------- loss, config


def test_labels_give_the_summed_cross_entropy_of_the_shifted_logits():
    model = small_model()
    ids = random_ids(3, 17)
    labels = ids.masked_fill(torch.rand(3, 17) < 0.5, IGNORE)
    naive = F.cross_entropy(
        model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(model(ids, labels=labels), naive)
    assert model(ids, labels=torch.full_like(ids, IGNORE)).item() == 0.0


def test_presets_have_llamas_parameter_counts():
    published = {"7B": 6_738_415_616, "13B": 13_015_864_320, "30B": 32_528_943_616}
    for name, count in {**published, "65B": 65_285_660_672}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Llama(LlamaConfig.preset(name)).parameters()) == count
    assert sum(p.numel() for p in Llama(LlamaConfig.preset("tiny")).parameters()) < 3e6
    eps = {name: LlamaConfig.preset(name).rms_norm_eps for name in ("7B", "13B", "30B", "65B")}
    assert eps == {"7B": 1e-6, "13B": 1e-6, "30B": 1e-6, "65B": 1e-5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65, "head_dim": None}, "hidden_size 65 does not divide by 4 heads"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 does not divide by num_key_value_heads",
        ),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"vocab_size": -1}, "vocab_size must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
    with pytest.raises(ValueError, match="no preset '8B': choose from tiny, 7B, 13B, 30B, 65B"):
        LlamaConfig.preset("8B")
