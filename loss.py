"""The language-model loss without the logits: cross-entropy of W h, summed, some rows at a time.

With a vocabulary of 32,000 the logits are by far the largest tensor of a training step: 8,192
tokens make 1 GiB of them in fp32, their gradient another. Two facts do away with both:

  - A row's loss, -log softmax(W h)[y] = logsumexp(W h) - (W h)[y], needs that row's logits only.
  - Its gradient, softmax(W h) - onehot(y), is at hand the moment the loss is. Taken there, in the
    forward pass, the logits are made once, dropped, and not made again for the backward pass.

Value and gradients equal the naive ones (tests/test_loss.py); the gradient's own gradient is not to
be had. Taking gradients early is Liger Kernel's idea, arXiv:2410.10989.

Shown by tests/test_loss.py: test_value_and_gradients_equal_the_naive_ones.
"""

import torch
from torch import Tensor

CHUNK = 2**23  # logits held at once: 32 MiB in fp32, 262 tokens of LLaMA's vocabulary


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ -log softmax(weight · h)[target]: hidden (N, C), weight (V, C), targets (N); N may be 0."""
    # Asked here, since inside an autograd function gradients are always off.
    learn = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _Summed.apply(hidden, weight, targets, learn)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if learn else None  # (N, C)
        grad_weight = None  # (V, C), summed over the chunks in fp32
        if learn and weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], targets[rows, None]
            log_p = p = None  # the chunk before makes room
            # (rows, V), of the only logits there are; one fused pass, where logsumexp takes five
            log_p = torch.log_softmax(h @ weight.T, -1, dtype=torch.float32)
            total -= log_p.gather(1, target).sum()
            if learn:
                p = log_p.exp_()  # in place: the same memory from here on
                p.scatter_add_(1, target, torch.full_like(p[:, :1], -1.0))  # softmax - onehot
                p = p.type_as(h)
                grad_hidden[rows] = p @ weight
                if grad_weight is not None:
                    grad_weight += p.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.dtype)
        return (grad_hidden * upstream).type_as(grad_hidden), grad_weight, None, None
