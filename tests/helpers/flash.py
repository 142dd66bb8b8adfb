"""CPU kernels for the flash attention that model.py calls on a GPU; they assert its contract."""

from functools import lru_cache

import torch

import model

CALLS: list[tuple[int, int]] = []  # of each forward call: bounds, longest


def flash_on_cpu(monkeypatch) -> list[tuple[int, int]]:
    """Take the CUDA branch of packed attention on this CPU; returns the list of its calls."""
    register_kernels()
    monkeypatch.setattr(model, "FLASH", "cpu")
    CALLS.clear()
    return CALLS


@lru_cache
def register_kernels():
    """The module of torch that calls them."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(forward_kernel)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward_kernel)
    return varlen


def check_contract(q, k, v, bounds, keys_bounds, longest, longest_key, causal, window) -> None:
    D = q.shape[-1]
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert D % 8 == 0 and D <= 256 and k.shape == v.shape and k.shape[::2] == q.shape[::2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert causal and list(window) == [-1, 0]
    assert bounds.dtype == torch.int32 and torch.equal(bounds, keys_bounds)
    lengths = bounds.diff()
    assert bounds[0] == 0 and bounds[-1] == len(q) and lengths.min() >= 0
    assert lengths.max() <= longest == longest_key


def documents(bounds, *tensors):
    """The documents of (T, H, D), as (H, length, D) in fp32; K heads are repeated to H."""
    H = tensors[0].shape[1]
    wide = [x.repeat_interleave(H // x.shape[1], 1).transpose(0, 1).float() for x in tensors]
    return zip(*(x.split(bounds.diff().tolist(), 1) for x in wide), strict=True)


def probabilities(q, k, scale):
    return (q @ k.mT * scale + torch.full([q.shape[1]] * 2, -torch.inf).triu(1)).softmax(-1)


def forward_kernel(
    q, k, v, bounds, keys_bounds, longest, longest_key, causal=False, scale=None, window=None,
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    check_contract(q, k, v, bounds, keys_bounds, longest, longest_key, causal, window)
    assert enable_gqa or q.shape == k.shape
    CALLS.append((len(bounds), longest))
    out = [probabilities(q, k, scale) @ v for q, k, v in documents(bounds, q, k, v)]
    scores = torch.zeros(q.shape[1], len(q))
    out = torch.cat(out, 1).transpose(0, 1).to(q.dtype).contiguous()
    return out, scores, torch.zeros(2, dtype=torch.uint64)


def backward_kernel(
    grad, q, k, v, out, scores, bounds, keys_bounds, longest, longest_key, causal, state,
    scale=None, window=None,
):  # fmt: skip
    check_contract(q, k, v, bounds, keys_bounds, longest, longest_key, causal, window)
    assert grad.shape == out.shape == q.shape
    results = []
    for query, key, value, result, upstream in documents(bounds, q, k, v, out, grad):
        p = probabilities(query, key, scale)
        of_p = upstream @ value.mT
        of_scores = p * (of_p - (upstream * result).sum(-1, keepdim=True)) * scale
        results.append((of_scores @ key, of_scores.mT @ query, p.mT @ upstream))
    # (T, H, D) each, of which query heads that share a key head add up their gradients
    wide = [torch.cat(parts, 1).transpose(0, 1) for parts in zip(*results, strict=True)]
    return tuple(
        x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype).contiguous()
        for x, like in zip(wide, (q, k, v), strict=True)
    )
