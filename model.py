"""The LLaMA transformer, whole, in one file.

A LLaMA is an embedding, a stack of identical blocks, a norm and a linear head. A block adds two
things to the residual stream: what attention gathers from earlier tokens, and what a gated MLP
makes of each token by itself. Definitions run leaf to root; to read from the top, begin with
`Llama.forward` at the end. Worth knowing:

  - Parameter names are Hugging Face's, so an HF checkpoint needs no key map, and the logits are
    HF's too: held to 1e-4 by tests/test_model.py, where a wrong rotary layout shifts them by 6.
  - Attention goes three ways that give the same numbers: a plain batch, packed documents
    (`cu_seqlens`), and a key/value cache for decoding (model.py).
  - The rotary tables are computed in fp32 from each call's positions. There is no buffer that a
    cast to bf16 could round, meta-device construction leave empty, or a checkpoint contradict.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary,
N supervised tokens, L stored ones. Papers: LLaMA arXiv:2302.13971, RMSNorm 1910.07467, RoPE
2104.09864, SwiGLU 2002.05202.

Shown by tests/test_model.py: test_logits_and_gradients_equal_hugging_face.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if torch.cuda.device_count():  # it brings torch's compiler along, two seconds at every start
    from torch.nn.attention.varlen import varlen_attn

IGNORE = -100  # a label that is not learned from
LOGITS_CHUNK = 2**23  # logits held at once: 32 MiB in fp32, 262 tokens of LLaMA's vocabulary

SIZES = {  # LLaMA 1 as released: width, ffn width, layers, heads, norm eps
    "7B": (4096, 11008, 32, 32, 1e-6),
    "13B": (5120, 13824, 40, 40, 1e-6),
    "30B": (6656, 17920, 60, 52, 1e-6),
    "65B": (8192, 22016, 80, 64, 1e-5),
}


@dataclass
class LlamaConfig:
    """The architecture; field names and meanings are config.json's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self):
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            if heads < 1 or self.hidden_size % heads:
                raise ValueError(f"hidden_size {self.hidden_size} does not divide by {heads} heads")
            self.head_dim = self.hidden_size // heads
        for name, value in vars(self).items():
            number = type(value) in (int, float) and not name.endswith("token_id")
            if number and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, not {value}")
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} does not divide by num_key_value_heads "
                f"{self.num_key_value_heads}: every key head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")

    @classmethod
    def preset(cls, name: str) -> "LlamaConfig":
        """`tiny` trains on two CPU cores in about a minute; the others are LLaMA 1's four sizes."""
        if name == "tiny":  # its vocabulary is data/tokenizer.model's
            # Narrow layers start wider, or attention is too even for heads that copy to form.
            return cls(1024, 128, 352, 4, 4, max_position_embeddings=512, initializer_range=0.06)
        if name not in SIZES:
            raise ValueError(f"no preset {name!r}: choose from tiny, {', '.join(SIZES)}")
        width, ffn, layers, heads, eps = SIZES[name]
        return cls(32000, width, ffn, layers, heads, rms_norm_eps=eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight: LayerNorm without mean or bias, its statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.type_as(x)


def rotary_tables(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i/D): the angle that channel pair i is turned by."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    speed = 1.0 / config.rope_theta ** (even / config.head_dim)  # (D/2)
    angles = (positions[..., None].float() * speed)[:, :, None]  # (B, T, 1, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]), the "half-split" layout; Meta's files pair neighbours."""
    a, b = x.float().chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class AttentionContext:
    """Where the tokens of a call stand and what they may see: made once, shared by all blocks.

    A plain batch needs the tables only; packed documents `cu_seqlens`, say [0, 2, 5] for documents
    of 2 and 3 tokens, at positions 0 1 0 1 2; a cache `slots`, and `mask` unless prompts start.
    (Not a dataclass: FSDP looks into those, and would cast the tables to bf16.)"""

    def __init__(self, config: LlamaConfig, position: Tensor, cu_seqlens=None, row=None, mask=None):
        self.cos, self.sin = rotary_tables(position, config)  # (B, T, 1, D/2), fp32
        self.cu_seqlens = cu_seqlens  # packed: document i is tokens cu_seqlens[i] … [i + 1]
        self.longest = config.max_position_embeddings  # no document is longer than that
        self.slots = row, position  # cache: where each token is kept, (B, T) both
        self.mask = mask  # cache: (B, 1, T, L), the stored tokens that a token sees


def plain_context(ids: Tensor, config: LlamaConfig) -> AttentionContext:
    T, known = ids.shape[1], config.max_position_embeddings
    if known < T:
        raise ValueError(f"{T} tokens are too many: the model knows {known} positions")
    return AttentionContext(config, torch.arange(T, device=ids.device)[None])


def packed_context(ids: Tensor, config: LlamaConfig, cu_seqlens: Tensor) -> AttentionContext:
    assert len(ids) == 1, "packed documents are one row of ids"
    T, lengths = ids.shape[1], cu_seqlens.diff()
    fits = (lengths >= 0).all() & (lengths <= config.max_position_embeddings).all()
    fits &= (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T)  # checked on the device, without waiting
    torch._assert_async(fits, "cu_seqlens must rise from 0 to T, by no more than known positions")
    step, start = torch.arange(T, device=ids.device), cu_seqlens.long()
    document = torch.searchsorted(start, step, right=True) - 1  # (T): the last start ≤ step
    return AttentionContext(config, (step - start[document])[None], cu_seqlens, document[None])


class KVCache:
    """The key/value cache: what decoding remembers, so that a new token costs one token's work.

    Attention reads the keys and values of all tokens so far. They do not change once computed, so
    they are stored, a row of the cache for every sequence, and each step adds one position to every
    row.

      - Two calls fill rows. `model(ids, cu_seqlens, cache)` *starts* them: packed document i fills
        row i, whatever it held before. `model(ids, cache=cache)`, ids (rows, T), lets every row *go
        on*.
      - `lengths[r]` is how much of row r is filled. Setting it to 0 frees the row: it stays free
        until a prompt starts it again; what is computed for it meanwhile means nothing and harms
        nobody.
      - Prompts of unequal length need no padding: packed one behind the other, each starts its row.
      - `cache[2:5]` is rows 2 to 4 of the same memory: prompts join there while other rows go on.
      - It may be fp32 where the model is bf16: on a CPU, attention of a single bf16 query is slow.

    Shapes: B rows, T new tokens, L stored ones, H query heads, K key/value heads, G = H / K, D head
    width. Grouped queries, which make caches small: arXiv:2305.13245.
    """

    def __init__(self, config, slots: int, max_length: int, device=None, dtype=None):
        known = config.max_position_embeddings
        if max_length > known:
            raise ValueError(f"{max_length} tokens are too many: the model knows {known} positions")
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_length)
        self.k = torch.zeros(*shape, config.head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
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


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over the tokens up to one's own. q (B, T, H, D); k, v (B, T, K, D)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)  # (B, T, H, D)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Causal attention inside each document of one row, q (1, T, H, D), and no work across them."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # all documents in one kernel
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        bounds = (cu_seqlens, cu_seqlens, longest, longest)  # of queries, of keys; causal is a
        return varlen_attn(q[0], k[0], v[0], *bounds, window_size=(-1, 0))[None]  # one-sided window
    lengths = cu_seqlens.diff().tolist()  # split, not slices: its backward is a single cat
    documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), lengths, strict=True)
    return torch.cat([causal_attention(q, k, v) for q, k, v, length in documents if length], dim=1)


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


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(
        self, x: Tensor, layout: AttentionContext, stored: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))  # (B, T, H or K, D)
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        if stored is not None:
            row, position = layout.slots
            # (B, T, K, D) into (rows, K, max_length, D): index tensors on both sides of a slice put
            # their own axes, (B, T), first
            for new, kept in zip((k, v), stored, strict=True):
                kept[row, :, position] = new.to(kept.dtype)
        if layout.cu_seqlens is not None:
            out = packed_attention(q, k, v, layout.cu_seqlens, min(T, layout.longest))
        elif stored is not None:
            out = cached_attention(q, *stored, layout.mask)
        else:
            out = causal_attention(q, k, v)
        return self.o_proj(out.reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) · up(x)): the gate says how much of each channel passes."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: AttentionContext, stored=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, stored)
        return x + self.mlp(self.post_attention_layernorm(x))


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ -log softmax(weight · h)[target]: hidden (N, C), weight (V, C), targets (N); N may be 0."""
    # Asked here, since inside an autograd function gradients are always off.
    learn = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _Summed.apply(hidden, weight, targets, learn)


class _Summed(torch.autograd.Function):
    """The language-model loss without the logits: cross-entropy of W h, summed, some rows at a
    time.

    With a vocabulary of 32,000 the logits are by far the largest tensor of a training step: 8,192
    tokens make 1 GiB of them in fp32, their gradient another. Two facts do away with both:

      - A row's loss, -log softmax(W h)[y] = logsumexp(W h) - (W h)[y], needs that row's logits
        only.
      - Its gradient, softmax(W h) - onehot(y), is at hand the moment the loss is. Taken there, in
        the forward pass, the logits are made once, dropped, and not made again for the backward
        pass.

    Value and gradients equal the naive ones (tests/test_loss.py); the gradient's own gradient is
    not to be had. Taking gradients early is Liger Kernel's idea, arXiv:2410.10989.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if learn else None  # (N, C)
        grad_weight = None  # (V, C), summed over the chunks in fp32
        if learn and weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, LOGITS_CHUNK // len(weight))
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


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()  # only a prefix: Hugging Face's names begin with `model.`
        table = torch.empty(config.vocab_size, config.hidden_size)  # filled below, once
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:  # there it would fill nothing, in half a second for 7B
            self.init_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, *args, **kwargs):
        """`to` and the like. Leaving the meta device makes new parameters: tie them again."""
        super()._apply(*args, **kwargs)
        self.tie_weights()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter afresh; after `to_empty` they hold whatever was in memory."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range)

    def forward(
        self,
        ids: Tensor,  # (B, T); packed documents are one row, (1, T)
        cu_seqlens: Tensor | None = None,  # int32, 0 … T; may repeat T: empty documents, which
        # let its length stay the same from call to call
        cache: KVCache | None = None,
        labels: Tensor | None = None,  # (B, T), aligned with ids: the shift by one happens here
    ) -> Tensor:
        """Logits (B, T, V), or with labels the cross-entropy summed over those not IGNORE.

        A packed document's first label is never learned: the token before it is another's."""
        hidden = self.hidden_states(ids, cu_seqlens, cache)
        if labels is None:
            return self.lm_head(hidden)
        if cu_seqlens is not None:  # mark the starts; the last one, T, lies outside and is cut off
            first = torch.zeros(ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
            labels = labels.masked_fill(first.index_fill(0, cu_seqlens.long(), True)[:-1], IGNORE)
        learned = labels[:, 1:] != IGNORE
        hidden, targets = hidden[:, :-1][learned], labels[:, 1:][learned]  # (N, C) and (N)
        return summed_cross_entropy(hidden, self.lm_head.weight, targets)

    def hidden_states(self, ids: Tensor, cu_seqlens=None, cache: KVCache | None = None) -> Tensor:
        """What the head reads, (B, T, C): decoding wants the last logits of a prompt, not all."""
        x = self.model.embed_tokens(ids)
        if cache is not None:
            cache.check(len(ids) if cu_seqlens is None else len(cu_seqlens) - 1, x.dtype)
        if cu_seqlens is not None:
            layout = packed_context(ids, self.config, cu_seqlens)
        elif cache is not None:
            row, position, mask = cache.next_slots(ids.shape[1])
            layout = AttentionContext(self.config, position, None, row, mask)
        else:
            layout = plain_context(ids, self.config)
        for i, block in enumerate(self.model.layers):
            x = block(x, layout, None if cache is None else (cache.k[i], cache.v[i]))
        if cache is not None:
            cache.grow(ids.shape[1], cu_seqlens)
        return self.model.norm(x)
