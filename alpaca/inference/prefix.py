"""Sequences that begin alike share the keys and values of their beginning.

    prefix, cache = new_cache(model, 1, len(ids)), new_cache(model, 8, max_length=900)
    prefill(model, prefix, [ids])               # once
    fork(prefix, cache)                         # its keys and values in every slot
    hidden = extend(model, cache, rests)        # what follows in each, of any length

A token's keys and values depend on it and on the tokens before it. So a text with which many
sequences begin, such as the examples in front of a question, is computed once; copying its keys and
values takes less than a hundredth of the time.

What branches from a sequence need not even be copied. Two continuations, c d e and f g, of a b lie
in one slot one behind the other, if each is rotated by its own positions and sees no other:

    stored       0 1 2 3 4 5 6
    token        a b c d e f g
    position     0 1 2 3 4 2 3
    branch       0 0 1 1 1 2 2      a token sees the earlier ones of its own branch and of branch 0

This is tree attention (SpecInfer, arXiv:2305.09781); `Branches` is the view of a cache that does
it. Sharing prefixes among requests: SGLang, 2312.07104.
"""

import mmap
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from alpaca.common.errors import UserError
from model import AttentionContext, KVCache, Llama, LlamaConfig

LENGTH_MULTIPLE = 16  # rows are padded to it: on a CPU, oneDNN stores a kernel per length


def new_cache(model: Llama, slots: int, max_length: int) -> KVCache:
    """On a CPU it is fp32: attention with one bf16 query is slow there."""
    weight = model.model.norm.weight
    limit = max(max_length, model.config.max_position_embeddings)  # branches share positions
    config = replace(model.config, max_position_embeddings=limit)
    try:
        if weight.device.type != "cpu":
            return KVCache(config, slots, max_length, weight.device, weight.dtype)
        cache = KVCache(config, slots, max_length, "meta")  # its shapes; memory follows
        cache.k, cache.v = zeros_when_used(cache.k.shape), zeros_when_used(cache.v.shape)
        cache.lengths = torch.zeros(slots, dtype=torch.int64)
        return cache
    except (RuntimeError, OSError):  # no memory, for torch and for Python
        text = f"no memory for the keys and values of {slots} sequences of {max_length} tokens"
        raise UserError(f"{text}: decode fewer together, or have fewer positions") from None


def zeros_when_used(shape: torch.Size) -> Tensor:
    """Like torch.zeros, but takes time and memory only for the parts that are used."""
    memory = mmap.mmap(-1, 4 * shape.numel(), access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def fork(source: KVCache, target: KVCache) -> None:
    """Copy the sequence in the only slot of `source` into every slot of `target`."""
    length = int(source.lengths)
    for ours, theirs in ((source.k, target.k), (source.v, target.v)):
        theirs[..., :length, :] = ours[..., :length, :]  # (layers, slots, K, length, D)
    target.lengths.fill_(length)


def padded_length(length: int, limit: int) -> int:
    """The next multiple, or as near to it as the limit allows."""
    return length + min(-length % LENGTH_MULTIPLE, limit - length)


def pad(rows: list[list[int]], length: int, device: torch.device) -> Tensor:
    return torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)


def prefill(model: Llama, cache: KVCache, rows: list[list[int]]) -> Tensor:
    """Store a row of ids in each slot, in place of what is there; hidden states after each, (B, C).

    Rows are packed one behind the other."""
    device = cache.lengths.device
    widths = [padded_length(len(row), cache.k.shape[3]) for row in rows]
    packed = [row + [0] * (width - len(row)) for row, width in zip(rows, widths, strict=True)]
    ids = torch.tensor([[token for row in packed for token in row]], device=device)
    starts = torch.tensor([0, *accumulate(widths)], device=device)
    tokens = torch.tensor([len(row) for row in rows], device=device)
    hidden = model.model(ids, starts.int(), cache)[0]  # (all tokens, C)
    cache.lengths.copy_(tokens)  # drops the padding: the next tokens overwrite it
    return hidden[starts[:-1] + tokens - 1]


def extend(model: Llama, cache: KVCache, rows: list[list[int]]) -> Tensor:
    """Append a row of ids to the sequence in each slot; hidden states after each, (B, C).

    Each is padded to the longest: rows of similar length waste little."""
    device = cache.lengths.device
    T = padded_length(max(map(len, rows)), cache.k.shape[3] - int(cache.lengths.max()))
    tokens = torch.tensor([len(row) for row in rows], device=device)
    after = cache.lengths + tokens
    hidden = model.model(pad(rows, T, device), cache=cache)  # (B, T, C)
    cache.lengths.copy_(after)
    return hidden[torch.arange(len(rows), device=device), tokens - 1]


class Branches(KVCache):
    """A view of a cache whose slots hold `start` tokens each; the next call appends trees to them.

    `positions` and `branches` (B, T), counted from `start`, are those of its tokens."""

    def __init__(self, cache: KVCache, start: int, positions: Tensor, branches: Tensor):
        self.k, self.v, self.lengths, self.static = cache.k, cache.v, cache.lengths, cache.static
        self.lengths.fill_(start)
        self.start, self.positions, self.branches = start, positions, branches

    def context(self, T: int, config: LlamaConfig) -> AttentionContext:
        of, device = self.branches, self.branches.device
        sees = (of[:, None] == 0) | (of[:, None] == of[:, :, None])  # (B, T, T)
        sees = torch.cat([sees.new_ones(*of.shape, self.start), sees.tril()], -1)  # (B, T, L)
        mask = torch.zeros_like(sees, dtype=self.k.dtype).masked_fill_(~sees, -torch.inf)
        stored = self.start + torch.arange(T, device=device).expand_as(of)
        slots = torch.arange(len(of), device=device)[:, None].expand_as(of)
        context = AttentionContext(config, self.start + self.positions, slots, mask=mask[:, None])
        context.positions = stored  # rotated by one, stored at the other
        return context
