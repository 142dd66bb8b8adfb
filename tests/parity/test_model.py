"""The model against Hugging Face's, with negative controls that must fail."""

import pytest
import torch
from helpers.models import LLAMA3, hf_model, random_ids, small_config
from helpers.parity import apart

import model as model_module
from alpaca.weights.loading import load_model
from model import IGNORE, RMSNorm, rotary_tables

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
    "Llama 3.2": LLAMA3,
    "wide heads": {"head_dim": 24, "rms_norm_eps": 1e-5},
}


def pair(tmp_path, **changes):
    """The same random weights in Hugging Face's model and, through its folder, in ours."""
    theirs = hf_model(small_config(**changes))
    theirs.save_pretrained(tmp_path / "hf")
    return theirs, load_model(tmp_path / "hf")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_equal_hugging_face(tmp_path, changes):
    theirs, ours = pair(tmp_path, **changes)
    ids = random_ids(2, 24, vocab_size=ours.config.vocab_size)
    labels = ids.clone()
    labels[0, :7], labels[1, 20:] = IGNORE, IGNORE
    expected = theirs(ids, labels=labels)
    apart("logits: transformers' LlamaForCausalLM", distance(ours(ids), expected.logits), 1e-4)
    expected.loss.backward()
    (ours(ids, labels=labels) / (labels[:, 1:] != IGNORE).sum()).backward()
    gradients = dict(theirs.named_parameters())
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        difference = distance(parameter.grad, gradients[name].grad)
        apart("gradient of every parameter: transformers", difference, 1e-4)
        assert parameter.grad.abs().max() > 1e-3, f"{name}: both gradients are about 0"


def rotate_neighbours(x, cos, sin):
    """Meta's layout applied to Hugging Face's weights: the classic error."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in (cos, sin))
    return x * cos + turned * sin


def test_parity_fails_for_wrong_rotary_layout_base_or_norm_eps(tmp_path, monkeypatch):
    theirs, ours = pair(tmp_path)
    ids = random_ids(2, 24)
    expected = theirs(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "rotate", rotate_neighbours)
        assert distance(ours(ids), expected) > 1.0
    ours.config.rope_theta = 20000.0
    assert distance(ours(ids), expected) > 1e-2
    ours.config.rope_theta = 10000.0
    assert distance(ours(ids), expected) <= 1e-4
    for module in ours.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-5
    assert distance(ours(ids), expected) > 1e-4


def test_bf16_argmax_equals_hugging_face_beyond_rounding(tmp_path):
    theirs, ours = pair(tmp_path, num_hidden_layers=3)
    ids = random_ids(16, 48)
    with torch.no_grad():
        exact = theirs(ids).logits
        expected = theirs.bfloat16()(ids).logits.float()
        found = ours.bfloat16()(ids).float().argmax(-1)
    noise = distance(expected, exact)  # the error of bf16 in Hugging Face's own model
    best, second = expected.topk(2).values.unbind(-1)
    clear = best - second > noise
    assert 0.2 < clear.float().mean() < 1.0, "nothing to compare"
    assert torch.equal(found[clear], expected.argmax(-1)[clear])


def test_rotary_tables_equal_hugging_face_bitwise():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = small_config(head_dim=48, rope_theta=5e5)
    positions = torch.arange(2048)[None]
    theirs = LlamaRotaryEmbedding(hf_model(config).config)(torch.zeros(1), positions)
    for ours, expected in zip(rotary_tables(positions, config), theirs, strict=True):
        assert torch.equal(ours[:, :, 0].repeat(1, 1, 2), expected)
