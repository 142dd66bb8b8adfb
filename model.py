"""The LLaMA transformer in one file: configuration, layers, key/value cache, attention and loss.

    model = Llama(LlamaConfig(vocab_size=1024, hidden_size=128, …))
    logits = model(ids)                   # ids (B, T) → (B, T, V)
    loss = model(ids, labels=labels)      # cross-entropy, summed over the labels that are not -100

A LLaMA is an embedding, a stack of identical blocks, a norm and a linear head. A block adds two
terms to the residual stream: attention, which gathers from earlier tokens, and a gated MLP, which
transforms each token alone. To read from the top, start with `Llama.forward` at the end.

  - Parameters have Hugging Face's names, so that its checkpoints load without a key map.
  - Three kinds of attention give the same result: for a plain batch, for documents packed into one
    row (`cu_seqlens`), and for new tokens against a key/value cache.
  - Rotary tables are computed in fp32 in each call: a cast or a checkpoint could spoil a buffer.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, G = H / K, D head width,
V vocabulary, L stored tokens, N labels that are not masked. Papers: LLaMA arXiv:2302.13971, RMSNorm
1910.07467, RoPE 2104.09864, grouped-query attention 2305.13245, SwiGLU 2002.05202.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLASH = "cuda"  # where packed documents are one kernel: FlashAttention, arXiv:2307.08691
IGNORE = -100  # the label of a masked token: no loss, no gradient
LOGITS_CHUNK = 2**23  # logits in memory at once: 32 MiB in fp32, 262 tokens of LLaMA's vocabulary
CUDA_LOGITS_CHUNK = 2**26  # of fewer tokens, a GPU would spend its time on adding up gradients


@dataclass
class LlamaConfig:
    """The architecture; field names and meanings are config.json's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore  # default: num_attention_heads
    head_dim: int = None  # type: ignore  # default: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's factors: see `rotary_frequencies`
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int | list[int] = 2  # several: any of them ends an answer

    def __post_init__(self):
        width, heads = self.hidden_size, self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            if heads < 1 or width % heads:
                raise ValueError(f"hidden_size {width} is not divisible by {heads} heads")
            self.head_dim = width // heads
        for name, value in vars(self).items():
            number = type(value) in (int, float) and not name.endswith("token_id")
            if number and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, not {value}")
        if heads % (kv_heads := self.num_key_value_heads):
            raise ValueError(f"{heads} heads are not divisible by num_key_value_heads {kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding rotates pairs")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight: LayerNorm without mean and bias, statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.type_as(x)


def rotary_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/D), the angle that channel pair i turns from one position to the next: (D/2).

    For Llama 3.1's longer context, pairs that made few turns in the original context turn `factor`
    times slower, those that made many as before, and those between by a share of both."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    if scaling := config.rope_scaling:
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (fast + (1 - fast) / scaling["factor"])
    return frequencies


def rotary_tables(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency, the angle by which each channel pair is rotated."""
    frequencies = rotary_frequencies(config, positions.device)
    angles = (positions[..., None].float() * frequencies)[:, :, None]  # (B, T, 1, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]): "half-split", where Meta's files pair neighbours."""
    a, b = x.float().chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class AttentionContext:
    """The positions of a call's tokens and what they may attend to: made once for all blocks.

    Packed documents of 2 and 3 tokens have positions 0 1 0 1 2, cu_seqlens 0 2 5 and slots
    0 0 1 1 1. (Not a dataclass: FSDP would cast the tables in it to bf16.)"""

    def __init__(
        self,
        config: LlamaConfig,
        positions: Tensor,  # (B, T)
        slots: Tensor | None = None,  # (B, T): the cache slot that stores each token
        cu_seqlens: Tensor | None = None,  # document i is tokens cu_seqlens[i] … [i + 1]
        longest: int = 0,  # tokens that no document exceeds
        mask: Tensor | None = None,  # (B, 1, T, L), added to the scores of L stored tokens
    ):
        self.cos, self.sin = rotary_tables(positions, config)  # (B, T, 1, D/2), fp32
        self.positions, self.slots = positions, slots
        self.cu_seqlens, self.longest, self.mask = cu_seqlens, longest, mask


def packed_context(ids: Tensor, config: LlamaConfig, cu_seqlens, longest) -> AttentionContext:
    assert len(ids) == 1, "packed documents are one row of ids"
    T, lengths = ids.shape[1], cu_seqlens.diff()
    longest = min(longest or T, config.max_position_embeddings)
    valid = (lengths >= 0).all() & (lengths <= longest).all()
    valid &= (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T)  # on the device, without waiting for it
    torch._assert_async(valid, "cu_seqlens must rise from 0 to T, by `longest` at most")  # type: ignore
    token, start = torch.arange(T, device=ids.device), cu_seqlens.long()
    document = torch.searchsorted(start, token, right=True) - 1  # (T): the last start ≤ token
    positions = (token - start[document])[None]
    return AttentionContext(config, positions, document[None], cu_seqlens, longest)


class KVCache:
    """The keys and values of all tokens so far, in a slot per sequence. They do not change once
    computed, so a new token costs one token's work.

      - Prefill: `model(ids, cu_seqlens, cache)` stores packed document i in slot i and replaces
        what was there. Prompts of different lengths need no padding.
      - Decode: `model(ids, cache=cache)`, ids (slots, T), appends T tokens to every slot.
      - `lengths[i]` is the number of tokens in slot i. Setting it to 0 frees the slot until its
        next prefill; ignore what decoding computes for it meanwhile.
      - `cache[2:5]` is a view of slots 2 to 4, to prefill prompts there while others are decoded.
      - It may be fp32 where the model is bf16: a CPU is slow at attention with one bf16 query.
    """

    def __init__(self, config: LlamaConfig, slots: int, max_length: int, device=None, dtype=None):
        limit = config.max_position_embeddings
        if max_length > limit:
            raise ValueError(f"{max_length} tokens are too many: the model has {limit} positions")
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_length)
        self.k = torch.zeros(*shape, config.head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.static = self.k.is_cuda  # static shapes, for CUDA graphs: the mask spans max_length

    def __getitem__(self, slots: slice) -> "KVCache":
        assert isinstance(slots, slice), "a part of a cache is a slice of its slots"
        view = object.__new__(KVCache)
        view.k, view.v, view.lengths = self.k[:, slots], self.v[:, slots], self.lengths[slots]
        view.static = self.static
        return view

    def check_call(self, sequences: int, dtype: torch.dtype) -> None:
        """Refuse a call that would otherwise give silently wrong results."""
        assert len(self.lengths) == sequences, "one cache slot per sequence: pass cache[first:last]"
        fits = torch.promote_types(self.k.dtype, dtype) == self.k.dtype
        assert fits, f"the cache is {self.k.dtype}, too narrow for a model in {dtype}"
        assert not torch.is_grad_enabled(), "a cache is for torch.no_grad()"

    def context(self, T: int, config: LlamaConfig) -> AttentionContext:
        """The context of T new tokens in every slot."""
        device, L = self.lengths.device, self.k.shape[3]
        positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        slots = torch.arange(len(self.lengths), device=device)[:, None].expand_as(positions)
        if not self.static:
            assert self.lengths.any(), "all slots are empty: prefill them, with cu_seqlens"
            L = int(positions.max()) + 1
        later = torch.arange(L, device=device) > positions[:, None, :, None]  # (B, 1, T, L)
        mask = torch.zeros_like(later, dtype=self.k.dtype).masked_fill_(later, -torch.inf)
        return AttentionContext(config, positions, slots, mask=mask)

    def update(self, layer: int, k: Tensor, v: Tensor, context) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, T, K, D); return those that attention reads."""
        for new, stored in ((k, self.k[layer]), (v, self.v[layer])):  # stored: (slots, K, L, D)
            # Index tensors on both sides of a slice put their own axes, (B, T), first.
            stored[context.slots, :, context.positions] = new.to(stored.dtype)
        if context.cu_seqlens is not None:  # prefill: a prompt attends to itself only
            return k, v
        return self.k[layer], self.v[layer]

    def advance(self, T: int, cu_seqlens: Tensor | None) -> None:
        """Count the new tokens, after all layers have stored theirs."""
        longer = self.lengths + T * (self.lengths > 0)
        self.lengths.copy_(longer if cu_seqlens is None else cu_seqlens.diff())


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over a token and those before it. q (B, T, H, D); k, v (B, T, K, D)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)  # (B, T, H, D)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Causal attention within each document of a row, q (1, T, H, D); no work across documents."""
    if q.device.type == FLASH and q.dtype in (torch.bfloat16, torch.float16):
        # One kernel for all. Importing it loads torch's compiler: two seconds, at every start.
        from torch.nn.attention.varlen import varlen_attn

        D, options = q.shape[-1], {"scale": q.shape[-1] ** -0.5, "enable_gqa": True}
        if "enable_gqa" not in varlen_attn.__kwdefaults__:  # type: ignore  # torch 2.11
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
            del options["enable_gqa"]
        if D % 8:  # the kernel's heads are as wide as a multiple of 8; zeros change no score
            q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
        options["window_size"] = (-1, 0)  # all earlier tokens and no later one
        bounds = (cu_seqlens, cu_seqlens, longest, longest)  # of the queries and of the keys
        out = varlen_attn(q[0], k[0], v[0], *bounds, **options)  # type: ignore
        return out[None, :, :, :D]  # type: ignore
    lengths = cu_seqlens.diff().tolist()  # split, not slices: its backward is a single cat
    documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), lengths, strict=True)
    return torch.cat([causal_attention(q, k, v) for q, k, v, length in documents if length], dim=1)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """New tokens over stored ones. q (B, T, H, D); k and v (B, K, ≥ L, D); mask (B, 1, T, L).

    The G query heads of a key head are placed side by side as if they were tokens: each key is read
    once for all of them, and reading keys is where decoding spends its time."""
    (B, T, H, D), K, L = q.shape, k.shape[1], mask.shape[-1]
    G = H // K
    q = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    if T > 1:
        mask = mask.expand(B, G, T, L).reshape(B, 1, G * T, L)
    out = F.scaled_dot_product_attention(q.to(k.dtype), k[:, :, :L], v[:, :, :L], attn_mask=mask)
    return out.to(q.dtype).view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, context: AttentionContext, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))  # (B, T, H or K, D)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, context)
        if context.cu_seqlens is not None:
            out = packed_attention(q, k, v, context.cu_seqlens, context.longest)
        elif context.mask is not None:
            out = cached_attention(q, k, v, context.mask)
        else:
            out = causal_attention(q, k, v)
        return self.o_proj(out.flatten(2))  # (B, T, H · D) → (B, T, C)


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) · up(x)): the gate scales each channel."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: AttentionContext, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossEntropy(torch.autograd.Function):
    """The loss without the logits of all tokens, by far the largest tensor of a training step:
    8,192 tokens and a vocabulary of 32,000 make 1 GiB in fp32, and their gradient another.

    A token's loss, -log softmax(W h)[y], needs only that token's logits, so they are computed for a
    chunk of tokens at a time. Their gradient, softmax(W h) - onehot(y), is then known. For summed
    losses it is used at once (Liger Kernel, arXiv:2410.10989). Single losses get their weights in
    `backward`, which computes the logits again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, summed: bool):
        losses, *gradients = by_chunks(hidden, weight, targets, 1.0 if summed else None)
        ctx.save_for_backward(*(gradients if summed else (hidden, weight, targets)))
        return losses.sum() if summed else losses

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (upstream,), gradients = grad_outputs, ctx.saved_tensors
        if upstream.ndim:  # (N), not summed
            (_, *gradients), upstream = by_chunks(*gradients, upstream), 1.0  # type: ignore
        return *(x if x is None else x.mul_(upstream) for x in gradients), None, None  # in place


def by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | float | None):
    """Losses (N) and, with an `upstream` gradient of them, the gradients of hidden (N, C) and
    weight (V, C), the latter summed over the chunks in fp32."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_weight = None if upstream is None else torch.empty_like(hidden), None
    if upstream is not None and weight.requires_grad:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    size = max(1, (CUDA_LOGITS_CHUNK if hidden.is_cuda else LOGITS_CHUNK) // len(weight))
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        h, target = hidden[chunk], targets[chunk, None]
        log_p = p = None  # frees the previous chunk's
        # (size, V), the only logits in memory: as multiplied, in fp32, and normalized
        log_p = torch.log_softmax(h @ weight.T, -1, dtype=torch.float32)
        losses[chunk] = -log_p.gather(1, target)[:, 0]
        if grad_hidden is not None:
            p = log_p.exp_()  # in place: the same memory from here on
            p.scatter_add_(1, target, torch.full_like(p[:, :1], -1.0))  # softmax - onehot
            if isinstance(upstream, Tensor):
                p *= upstream[chunk, None]
            p = p.type_as(h)
            grad_hidden[chunk] = p @ weight
            if grad_weight is not None and h.is_cuda:  # neither rounded to 16 bits nor stored
                torch.addmm(grad_weight, p.T, h, out_dtype=torch.float32, out=grad_weight)
            elif grad_weight is not None:
                grad_weight += p.T @ h
    return losses, grad_hidden, grad_weight


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: ids (B, T) → hidden states (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)  # Llama initializes it
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, cu_seqlens=None, cache=None, longest=None) -> Tensor:
        x = self.embed_tokens(ids)
        if cache is not None:
            cache.check_call(len(ids) if cu_seqlens is None else len(cu_seqlens) - 1, x.dtype)
        if cu_seqlens is not None:
            context = packed_context(ids, self.config, cu_seqlens, longest)
        elif cache is not None:
            context = cache.context(ids.shape[1], self.config)
        else:
            T, limit = ids.shape[1], self.config.max_position_embeddings
            if limit < T:
                raise ValueError(f"{T} tokens are too many: the model has {limit} positions")
            context = AttentionContext(self.config, torch.arange(T, device=ids.device)[None])
        for block in self.layers:
            x = block(x, context, cache)
        if cache is not None:
            cache.advance(ids.shape[1], cu_seqlens)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:  # there it has no effect, but takes half a second at 7B
            self.init_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, *args, **kwargs):
        """`to` and its like. Leaving the meta device makes new parameters: tie them again."""
        super()._apply(*args, **kwargs)
        self.tie_weights()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every parameter; after `to_empty` they contain whatever was in memory."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range)

    def forward(
        self,
        ids: Tensor,  # (B, T); packed documents are one row, (1, T)
        cu_seqlens: Tensor | None = None,  # int32, from 0 to T; T may repeat, for a fixed length
        cache: KVCache | None = None,
        labels: Tensor | None = None,  # (B, T), aligned with ids: the shift by one happens here
        supervised: Tensor | None = None,  # (N): the labels that are not masked, if known already
        longest: int | None = None,  # tokens that no packed document exceeds
        reduction: str = "sum",  # of the cross-entropy, or "none": one for each label, (N)
        temperature: float = 1.0,  # of the losses: they are those of the logits divided by it
    ) -> Tensor:
        """Logits (B, T, V); with labels, the cross-entropy summed over those not masked (-100).

        The first label of each packed document must be masked: the token before it is of another.
        Decoding calls `model.model` and `lm_head`: of a prompt it needs only the last logits."""
        hidden = self.model(ids, cu_seqlens, cache, longest)
        if labels is None:
            return self.lm_head(hidden)
        if supervised is None:  # a GPU has to be waited for here
            supervised = F.pad(labels[:, 1:] != IGNORE, (1, 0)).flatten().nonzero()[:, 0]
        hidden = hidden.flatten(0, 1)[supervised - 1] / temperature  # (N, C)
        summed, targets = reduction == "sum", labels.flatten()[supervised]
        train = summed and hidden.requires_grad  # never without gradients
        losses: Tensor = CrossEntropy.apply(hidden, self.lm_head.weight, targets, train)  # type: ignore
        return losses.sum() if summed else losses
