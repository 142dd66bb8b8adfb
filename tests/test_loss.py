"""The chunked loss against the naive one, and its promise about memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import summed_cross_entropy


def naive(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def inputs(rows=50, vocabulary=64, width=24, dtype=torch.float32):
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("rows_at_once", [1, 7, 50, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_value_and_gradients_equal_the_naive_ones(monkeypatch, rows_at_once, scale):
    monkeypatch.setattr(model, "LOGITS_CHUNK", 64 * rows_at_once)
    hidden, weight, targets = inputs()
    expected = naive(hidden, weight, targets) * scale
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = summed_cross_entropy(hidden, weight, targets) * scale
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * scale)


def test_bf16_is_as_close_to_the_truth_as_the_naive_loss(monkeypatch):
    monkeypatch.setattr(model, "LOGITS_CHUNK", 64 * 128)
    hidden, weight, targets = inputs(rows=512, dtype=torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(naive(*wide, targets), wide)
    wanted = torch.autograd.grad(naive(hidden, weight, targets), (hidden, weight))
    total = summed_cross_entropy(hidden, weight, targets)
    assert abs(total - naive(*wide, targets)) <= 1e-3 * total
    found = torch.autograd.grad(total, (hidden, weight))
    for ours, theirs, true in zip(found, wanted, truth, strict=True):
        assert ours.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert (ours - true).norm() <= 1.1 * (theirs - true).norm()


def test_nothing_supervised_is_zero_loss_and_zero_gradients():
    hidden, weight, targets = inputs(rows=0)
    total = summed_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.item() == 0.0 and not weight.grad.any() and hidden.grad.shape == hidden.shape


def test_frozen_head_and_evaluation_do_no_needless_work():
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(naive(hidden, weight, targets), hidden)[0]
    weight.requires_grad_(False)
    with Largest() as seen:
        summed_cross_entropy(hidden, weight, targets).backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None and "aten.zeros_like" not in seen.operations
    for frozen in (False, True):
        hidden.requires_grad_(not frozen)
        with Largest() as seen, torch.set_grad_enabled(frozen):
            total = summed_cross_entropy(hidden, weight, targets)
        assert not total.requires_grad and "aten.scatter_add_" not in seen.operations
        torch.testing.assert_close(total, naive(hidden, weight, targets).detach())


class Largest(TorchDispatchMode):
    """What operations ran, and the size of the largest tensor any of them made."""

    def __init__(self):
        super().__init__()
        self.numel, self.operations = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.add(str(func.overloadpacket))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(model, "LOGITS_CHUNK", 4096)
    hidden, weight, targets = inputs(rows=1000)
    with Largest() as seen:
        summed_cross_entropy(hidden, weight, targets).backward()
    assert seen.numel == 1000 * 24  # the hidden gradient; the logits would be 1000 x 64
    with Largest() as seen:
        naive(hidden, weight, targets)
    assert seen.numel == 1000 * 64
