"""A model laid out for decoding computes what it did before."""

import pytest
import torch
from helpers.checkpoints import TOKENIZER
from helpers.models import small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alpaca.weights import kernels, quantized_linear
from alpaca.weights.kernels import BlockLinear, WideLinear, fastest_layer, optimize_layout
from alpaca.weights.loading import load_model
from alpaca.weights.quantized_linear import LINEAR
from alpaca.weights.writer import save_model
from model import KVCache, Llama, LlamaConfig


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 100])
@torch.no_grad()
def test_fastest_layer_computes_the_product(monkeypatch, dtype, rows, instructions):
    if instructions and not kernels.multiplies_bf16():
        pytest.skip("oneDNN has no product in bf16 for this CPU")
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: instructions)
    linear, x = torch.nn.Linear(64, 600, bias=False).to(dtype), torch.randn(rows, 64).to(dtype)
    blocks = dtype == torch.float32 or (instructions and dtype == torch.bfloat16)
    layer = fastest_layer(linear, compiled=False)
    assert type(layer) is (BlockLinear if blocks else WideLinear)
    weight, out = linear.weight.double(), layer(x[None])[0]
    allowed = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    off = (out.double() - x.double() @ weight.T).abs()
    assert out.dtype == dtype
    assert (off <= allowed * (x.double().abs() @ weight.abs().T) + 1e-7).all()


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


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each operator being a kernel, as on a GPU."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = tensors_in((args, kwargs))
        known = [t.untyped_storage()._cdata for t in inputs]
        new = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in known]
        if func._schema.is_mutable:  # writes its other arguments into the first
            self.bytes += 2 * size(inputs[1:])
        elif new:  # not a view
            self.bytes += size(inputs + new)
        return result


@pytest.mark.parametrize("bits", [16, 8, 4])
@torch.inference_mode()
def test_decoding_on_a_gpu_moves_little_more_than_the_weights(monkeypatch, bits):
    """A token through a block of a 7B, on tensors without data."""
    monkeypatch.setattr(quantized_linear, "GPU", "cpu")
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        model = Llama(LlamaConfig(num_hidden_layers=1))
        cache, x = KVCache(model.config, slots=1, max_length=256), torch.empty(1, 1, 4096)
        for path, module in list(model.model.named_modules()):
            if bits < 16 and isinstance(module, torch.nn.Linear):
                layer = LINEAR[bits](**LINEAR[bits].quantize(module.weight))
                model.model.set_submodule(path, layer)
        block = optimize_layout(model, compiled=True).model.layers[0]
        cache.static = True
        context, weights = cache.context(1, model.config), size([*block.state_dict().values()])
        with Traffic() as traffic:
            block(x, context, cache)
    assert weights < traffic.bytes < 1.1 * weights, f"{traffic.bytes / weights:.3f}"


def test_layout_leaves_fp64_as_it_is():
    linear = torch.nn.Linear(64, 600, bias=False).double()
    assert fastest_layer(linear, compiled=False) is linear, "others compute in fp32"
