"""The key/value cache: what decoding remembers, so that a new token costs one token's work.

Attention reads the keys and values of all tokens so far. They do not change once computed, so they
are stored, a row of the cache for every sequence, and each step adds one position to every row.

  - Two calls fill rows. `model(ids, cu_seqlens, cache)` *starts* them: packed document i fills row
    i, whatever it held before. `model(ids, cache=cache)`, ids (rows, T), lets every row *go on*.
  - `lengths[r]` is how much of row r is filled. Setting it to 0 frees the row: it stays free until
    a prompt starts it again; what is computed for it meanwhile means nothing and harms nobody.
  - Prompts of unequal length need no padding: packed one behind the other, each starts its row.
  - `cache[2:5]` is rows 2 to 4 of the same memory: prompts join there while other rows go on.
  - It may be fp32 where the model is bf16: on a CPU, attention of a single bf16 query is slow.

Shapes: B rows, T new tokens, L stored ones, H query heads, K key/value heads, G = H / K, D head
width. Grouped queries, which make caches small: arXiv:2305.13245.

Shown by tests/test_model.py: test_cached_decoding_equals_the_full_forward_at_every_position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    def __init__(self, config, rows: int, max_length: int, device=None, dtype=None):
        known = config.max_position_embeddings
        if max_length > known:
            raise ValueError(f"{max_length} tokens are too many: the model knows {known} positions")
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, max_length)
        self.k = torch.zeros(*shape, config.head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        # Static shapes, so that a step can be compiled or a CUDA graph: the mask spans all slots.
        self.static = self.k.is_cuda

    def __getitem__(self, rows: slice) -> "KVCache":
        assert isinstance(rows, slice), "a part of a cache is a slice of its rows"
        part = object.__new__(KVCache)
        part.k, part.v, part.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]
        part.static = self.static
        return part

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        filled = int(self.lengths[source])
        for kept in (self.k, self.v):
            kept[:, target, :, :filled] = kept[:, source, :, :filled]
        self.lengths[target] = filled

    def check(self, sequences: int, dtype: torch.dtype) -> None:
        """What would go wrong without a word; before anything is stored."""
        assert len(self.lengths) == sequences, "a cache row a sequence: pass cache[first:last]"
        fits = torch.promote_types(self.k.dtype, dtype) == self.k.dtype
        assert fits, f"the cache is {self.k.dtype}, too narrow for a model in {dtype}"
        assert not torch.is_grad_enabled(), "a cache is for torch.no_grad()"

    def next_slots(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row and position, (B, T), of every row's next T tokens; and the mask of what they see."""
        device = self.lengths.device
        position = self.lengths[:, None] + torch.arange(T, device=device)
        row = torch.arange(len(self.lengths), device=device)[:, None].expand_as(position)
        reach = self.k.shape[3]
        if not self.static:
            assert self.lengths.any(), "no row has started: prompts come with cu_seqlens"
            reach = int(position.max()) + 1
        hidden = torch.arange(reach, device=device) > position[:, None, :, None]  # (B, 1, T, L)
        mask = torch.zeros(hidden.shape, device=device, dtype=self.k.dtype)
        return row, position, mask.masked_fill_(hidden, -torch.inf)  # added to the scores

    def grow(self, T: int, cu_seqlens: Tensor | None) -> None:
        """After all layers have stored theirs."""
        longer = self.lengths + T * (self.lengths > 0)
        self.lengths.copy_(longer if cu_seqlens is None else cu_seqlens.diff())


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """New tokens over stored ones. q (B, T, H, D); k and v (B, K, ≥ L, D); mask (B, 1, T, L).

    The G query heads of a key head are laid side by side as if they were tokens: each key is read
    once for all of them, and reading keys is what decoding spends its time on."""
    (B, T, H, D), K, L = q.shape, k.shape[1], mask.shape[-1]
    G = H // K
    q = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    if T > 1:
        mask = mask.expand(B, G, T, L).reshape(B, 1, G * T, L)
    out = F.scaled_dot_product_attention(q.to(k.dtype), k[:, :, :L], v[:, :, :L], attn_mask=mask)
    out = out.to(q.dtype)
    return out.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
