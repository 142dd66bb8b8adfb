"""A model laid out for decoding computes what it did before."""

import pytest
import torch
from helpers.checkpoints import TOKENIZER
from helpers.models import small_model

from alpaca.weights.kernels import BlockLinear, optimize_layout
from alpaca.weights.loading import load_model
from alpaca.weights.writer import save_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 16, 100])
def test_block_linear_computes_the_product(dtype, rows):
    weight, x = torch.randn(176, 64).to(dtype), torch.randn(rows, 64).to(dtype)
    exact = x.double() @ weight.double().T
    relative = {torch.float32: 2**-18, torch.bfloat16: 2**-8}[dtype]
    allowed = relative * (x.double().abs() @ weight.double().abs().T)
    out = BlockLinear(weight)(x[None])[0]
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= allowed).all()


def test_optimize_layout_changes_no_logits_and_can_be_repeated():
    model, laid_out = small_model(), optimize_layout(small_model())
    ids = torch.randint(128, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model(ids), laid_out(ids), atol=1e-4)
        first = laid_out(ids)
        assert torch.equal(first, optimize_layout(laid_out)(ids))
    assert not any(isinstance(m, torch.nn.Linear) for m in laid_out.modules())


def test_optimize_layout_releases_the_mapped_files(tmp_path):
    folder, model = tmp_path / "m", small_model(vocab_size=1024).bfloat16()
    save_model(model, model.config, folder, tokenizer=TOKENIZER)

    def mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return str(folder) in maps.read()

    loaded = load_model(folder)
    assert mapped(), "this can tell"
    loaded = optimize_layout(loaded)
    assert not mapped(), "the weights are in memory twice"
    assert loaded.model.norm.weight.dtype == torch.bfloat16
