"""The chunked loss against the naive one, and the memory it may use."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import CrossEntropy


def naive(hidden, weight, targets, reduction="sum"):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)


def summed_cross_entropy(hidden, weight, targets):
    train = torch.is_grad_enabled() and hidden.requires_grad
    return CrossEntropy.apply(hidden, weight, targets, train).sum()


def random_inputs(tokens=50, dtype=torch.float32):
    hidden = torch.randn(tokens, 24).to(dtype).requires_grad_()
    weight = torch.randn(64, 24).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(64, (tokens,))


class Operations(TorchDispatchMode):
    """Records the operations that run, and the size of the largest tensor any of them makes."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func.overloadpacket))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_loss_and_gradients_equal_the_naive_ones(monkeypatch, chunk, scale):
    monkeypatch.setattr(model, "LOGITS_CHUNK", 64 * chunk)
    hidden, weight, targets = random_inputs()
    expected = naive(hidden, weight, targets) * scale
    gradients = torch.autograd.grad(expected, (hidden, weight))
    found = summed_cross_entropy(hidden, weight, targets) * scale
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_losses_one_by_one_have_gradients_by_their_weights(monkeypatch, chunk, frozen):
    monkeypatch.setattr(model, "LOGITS_CHUNK", 64 * chunk)
    hidden, weight, targets = random_inputs()
    inputs = (hidden,) if frozen else (hidden, weight)
    weight.requires_grad_(not frozen)
    upstream = torch.randn(50)
    expected = naive(hidden, weight, targets, "none")
    gradients = torch.autograd.grad(expected, inputs, upstream)
    with Operations() as seen:
        found = CrossEntropy.apply(hidden, weight, targets, False)
        assert "aten.scatter_add_" not in seen.names, "no gradient before its weight is known"
        ours = torch.autograd.grad(found, inputs, upstream)
    assert seen.largest <= max(64 * chunk, 50 * 24, 64 * 24)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def add_on_cpu(total, a, b, out_dtype, *, beta=1, alpha=1, out):
    """CUDA's addmm with a wider result, and what it asks for."""
    assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == out.dtype == out_dtype
    assert out_dtype == torch.float32 and out.data_ptr() == total.data_ptr(), "in place"
    return out.add_(a.float() @ b.float())


@pytest.mark.parametrize("cuda", [False, True])
def test_loss_in_bf16_is_as_exact_as_the_naive_one(monkeypatch, cuda):
    """On a GPU the weight's gradient is one product, because the chunks are larger."""
    monkeypatch.setattr(model, "LOGITS_CHUNK", 64 * 128)
    library = torch.library.Library("aten", "IMPL")
    if cuda:
        library.impl("addmm.dtype_out", add_on_cpu, "CPU")
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    hidden, weight, targets = random_inputs(512, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(naive(*wide, targets), wide)
    expected = torch.autograd.grad(naive(hidden, weight, targets), (hidden, weight))
    with Operations() as seen:
        total = summed_cross_entropy(hidden, weight, targets)
    assert seen.names.count("aten.addmm") == cuda, "one chunk"
    torch.testing.assert_close(total, naive(hidden, weight, targets), rtol=1e-5, atol=0)
    found = torch.autograd.grad(total, (hidden, weight))
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        assert ours.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert (ours - true).norm() <= 1.1 * (theirs - true).norm()


def test_loss_of_no_tokens_is_zero_with_zero_gradients():
    hidden, weight, targets = random_inputs(tokens=0)
    total = summed_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.item() == 0.0 and not weight.grad.any() and hidden.grad.shape == hidden.shape


def test_loss_computes_no_gradient_that_nobody_needs():
    hidden, weight, targets = random_inputs()
    expected = torch.autograd.grad(naive(hidden, weight, targets), hidden)[0]
    weight.requires_grad_(False)
    with Operations() as seen:
        summed_cross_entropy(hidden, weight, targets).backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None and "aten.zeros_like" not in seen.names
    for frozen in (False, True):
        hidden.requires_grad_(not frozen)
        with Operations() as seen, torch.set_grad_enabled(frozen):
            total = summed_cross_entropy(hidden, weight, targets)
        assert not total.requires_grad and "aten.scatter_add_" not in seen.names
        torch.testing.assert_close(total, naive(hidden, weight, targets).detach())


def test_loss_never_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(model, "LOGITS_CHUNK", 4096)
    hidden, weight, targets = random_inputs(tokens=1000)
    with Operations() as seen:
        summed_cross_entropy(hidden, weight, targets).backward()
    assert seen.largest == 1000 * 24  # the hidden gradient; the logits would be 1000 x 64
    assert seen.names.count("aten.mul") == 0, "the weight's gradient is scaled in place"
    with Operations() as seen:
        naive(hidden, weight, targets)
    assert seen.largest == 1000 * 64
