"""A model as it is decoded with computes what it did."""

import pytest
import torch
from helpers.models import small_model

from alpaca.weights.kernels import BlockLinear, optimize_layout
from alpaca.weights.loading import load_model
from alpaca.weights.writer import save_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 16, 100])
def test_blocks_change_no_number(dtype, rows):
    weight = torch.randn(176, 64).to(dtype)
    x = torch.randn(rows, 64).to(dtype)
    exact = x.double() @ weight.double().T
    bits = {torch.float32: 2**-18, torch.bfloat16: 2**-8}[dtype]
    out = BlockLinear(weight)(x[None])[0]
    assert out.dtype == dtype
    assert (
        (out.double() - exact).abs() <= bits * (x.double().abs() @ weight.double().abs().T)
    ).all()


def test_arranging_keeps_every_number_and_lets_go_of_the_files(tmp_path):
    model, laid_out = small_model(), optimize_layout(small_model())
    ids = torch.randint(128, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model(ids), laid_out(ids), atol=1e-4)
    assert not any(isinstance(m, torch.nn.Linear) for m in laid_out.modules())
    folder, model = tmp_path / "m", small_model().bfloat16()
    save_model(model, model.config, folder)
    loaded = optimize_layout(load_model(folder))
    with open("/proc/self/maps") as maps:
        assert str(folder) not in maps.read(), "the weights are in memory twice"
    assert loaded.model.norm.weight.dtype == torch.bfloat16


def test_arranging_twice_does_no_harm():
    model = optimize_layout(small_model())
    ids = torch.randint(128, (1, 5))
    with torch.no_grad():
        assert torch.equal(model(ids), optimize_layout(model)(ids))
