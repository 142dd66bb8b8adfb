"""Linear layers whose weights are integers of 8 or 4 bits.

Decoding one token reads every weight once, so its speed is that of memory: half the bytes, twice
the tokens. A weight w becomes the nearest integer q on a scale s:

    int8   w ≈ q · s            s = max|w| / 127 over a row of the matrix
    int4   w ≈ (q - 8) · s + z  s = (max w - min w) / 15 and z = min w + 8 s over 32 neighbours

32 int4 take 16 bytes, and 4 for s and z: 0.625 bytes a weight; 0.5625 in groups of 64. Four weights
as an example, w = (-0.3, 0.1, 0.22, 0.45), of which no error is larger than s / 2:

    int8   s = 0.45 / 127 = 0.00354       q = (-85, 28, 62, 127)  w ≈ (-0.301, 0.099, 0.220, 0.45)
    int4   s = 0.75 / 15 = 0.05, z = 0.1  q = (0, 8, 10, 15)      w ≈ (-0.3, 0.1, 0.2, 0.45)

Activations keep the precision of bf16, sums are fp32. A layer holds its integers as they are
stored, and computes with dequantized weights, until `pack` brings them into the order of this
machine's kernel. Such a kernel multiplies few rows of activations at the speed of memory; for many,
the weights are dequantized once, a part at a time that stays in the cache.

Shapes: W (N, K), R rows of activations. Papers: arXiv:2208.07339 (int8), 2212.09720 (why 4 bits).
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpaca.common.errors import UserError

GPU = "cuda"
FEW_ROWS = 128  # of activations: for more, a GPU dequantizes once and takes a plain product
CPU_FEW_ROWS = {16: 3, 8: 16, 4: 64}  # by bits, for a CPU; found by measuring
GROUP_SIZES = (32, 64)  # neighbours that share s and z in int4
PART = 2**19  # numbers of W that are dequantized at a time: 2 MiB in fp32
INT4_BLOCK = {"AVX2": 32, "AVX512": 64}  # rows of W that a CPU's int4 kernel reads together
aten, onednn, mkldnn = torch.ops.aten, torch.ops.onednn, torch.ops.mkldnn


def multiplies_bf16() -> bool:
    """Whether this CPU does; others convert bf16 to fp32."""
    return torch.backends.mkldnn.is_available() and mkldnn._is_mkldnn_bf16_supported()


def multiply_parts(x: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """x Wᵀ from parts of W's rows, each forgotten before the next one is made; no gradients."""
    return torch.cat([F.linear(x, part) for part in parts], dim=-1)


def fp32_parts(matrix: Tensor) -> Iterator[Tensor]:
    count = -(-PART // matrix.shape[1])
    wide = torch.empty(count, matrix.shape[1])  # one for all: new memory would cost more than sums
    for rows in matrix.split(count):
        yield wide[: len(rows)].copy_(rows)


@torch.library.custom_op("alpaca::multiply_int8", mutates_args=())
def multiply_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    from alpaca.weights.int8_kernel import multiply  # needs Triton, which torch for a GPU has

    return multiply(x, q, scale)


@multiply_int8.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(q))


class Int8Linear(nn.Module):
    """x Wᵀ, W (N, K) as int8 with a scale for each row.

    On a CPU with int8 instructions the activations become integers too, of 16 bits: that loses less
    than bf16 does, and the weights are multiplied as they are stored. So they are for a few rows on
    a GPU and, with activations in bf16, on other CPUs."""

    q: Tensor  # (N, K) int8
    scale: Tensor  # (N) bf16

    def __init__(self, q: Tensor, scale: Tensor):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.packed = False

    @staticmethod
    def quantize(weight: Tensor, group: int = 0) -> dict[str, Tensor]:  # a row is a group
        weight = weight.float()
        scale = (weight.abs().amax(1) / 127).bfloat16()  # rounded first, so that q fits it
        steps = weight / scale.float().clamp_min(1e-30)[:, None]
        return {"q": steps.round_().clamp_(-127, 127).to(torch.int8), "scale": scale}

    def dequantize(self) -> Tensor:
        assert not self.packed, "the integers are in the kernel's order"
        return self.q.float() * self.scale.float()[:, None]

    def pack(self) -> None:
        """Bring the integers into the order of this machine's kernel."""
        if self.q.device.type != "cpu" or not torch.cpu._is_vnni_supported():
            return
        self.scale = self.scale.float()
        self.q, self.packed = onednn.qlinear_prepack(self.q, None), True
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        if x.device.type == GPU and len(rows) <= FEW_ROWS and not torch.is_grad_enabled():
            return multiply_int8(rows, self.q, self.scale).view(*x.shape[:-1], -1)
        if not self.packed:
            if x.device.type != "cpu" or torch.is_grad_enabled():
                return F.linear(x, self.q.to(x.dtype) * self.scale.to(x.dtype)[:, None])
            few = x.dtype == torch.bfloat16 and len(rows) <= CPU_FEW_ROWS[8]
            if few and self.in_features % 16 == 0:  # it reads rows in 16s, and past their end
                out = aten._weight_int8pack_mm(rows, self.q, self.scale)
            else:
                out = multiply_parts(rows.float(), fp32_parts(self.q)).mul_(self.scale)
            return out.to(x.dtype).view(*x.shape[:-1], -1)
        step, low_high = split_bytes(rows)
        weight = self.q, self.scale, self.zeros, None  # no bias
        out = 1.0, 0, torch.float32, "none", [], ""  # its scale, zero and dtype; no activation
        products = onednn.qlinear_pointwise(low_high, 1.0, 128, *weight, *out)
        low, high = products.chunk(2)  # (R, N) each
        out = torch.add(low, high, alpha=256) * step
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def split_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of x (R, K) to 16 bits: x ≈ step · (256 · (high - 128) + (low - 128)).

    Returns step (R, 1) and the bytes (2R, K), all low ones first: the kernel multiplies bytes by
    bytes, so a row of 16 bits is two rows to it."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    step = largest.clamp_min(1e-30) / 32600  # (R, 1)
    integers = (x / step).add_(0x8080 + 0.5).to(torch.uint16)  # above 0: + 0.5 rounds to nearest
    low_high = integers.view(torch.uint8).view(*x.shape, 2)  # little-endian: (R, K, low and high)
    return step, low_high.permute(2, 0, 1).flatten(0, 1)


class Int4Linear(nn.Module):
    """x Wᵀ, W (N, K) as two int4 to a byte, with s and z for every G neighbours of a row."""

    q: Tensor  # (N, K/2) uint8, the first of two neighbours in the high half
    scales: Tensor  # (K/G, N, 2) bf16: s and z

    def __init__(self, q: Tensor, scales: Tensor):
        super().__init__()
        self.out_features, self.in_features = q.shape[0], 2 * q.shape[1]
        self.group = self.in_features // scales.shape[0]
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self.packed = False

    @staticmethod
    def quantize(weight: Tensor, group: int = GROUP_SIZES[0]) -> dict[str, Tensor]:
        N, K = weight.shape
        if K % group or N % 16:
            raise UserError(f"int4 needs rows in 16s and columns in {group}s, not {N} x {K}")
        groups = weight.float().view(N, K // group, group)
        low, high = groups.aminmax(dim=-1)  # (N, K/G)
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        steps = (groups - zero.float()[..., None]) / scale.float().clamp_min(1e-30)[..., None]
        q = steps.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(N, K // 2, 2)
        scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        return {"q": q[..., 0] << 4 | q[..., 1], "scales": scales}

    def integers(self) -> Tensor:
        return torch.stack([self.q >> 4, self.q & 15], dim=-1).flatten(1)  # (N, K) uint8

    def dequantize(self) -> Tensor:
        assert not self.packed, "the integers are in the kernel's order"
        scale, zero = self.scales.float().transpose(0, 1).unbind(-1)  # (N, K/G) each
        groups = self.integers().view(self.out_features, -1, self.group).float() - 8
        return (groups * scale[..., None] + zero[..., None]).flatten(1)

    def pack(self) -> None:
        """Bring the integers into the order of this machine's kernel."""
        if self.q.is_mps:  # dequantized in every pass
            return
        if self.q.device.type == GPU:
            tiles = next(n for n in (8, 4, 2) if self.in_features % (16 * n) == 0)
            self.q = aten._convert_weight_to_int4pack(self.q, tiles)
        else:
            self.q = aten._convert_weight_to_int4pack_for_cpu(self.integers().int(), 1)
        self.packed = True

    def dequantized_parts(self, block: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Rows of W, (n, K), from the order of a CPU's kernel: column by column of a block of rows,
        a byte has a number of its first half of rows (low) and one of its second (high)."""
        K, groups, half = self.in_features, len(self.scales), block // 2
        packed = self.q.view(-1, groups, self.group, half)  # (N/block, K/G, G, half)
        pairs = self.scales.float().view(groups, -1, 2, 1, half, 2)  # (K/G, N/block, 2, 1, half, 2)
        scale, zero = pairs.permute(5, 2, 1, 0, 3, 4).contiguous()  # (2, N/block, K/G, 1, half)
        count = -(-PART // (K * block))
        zero, buffer = zero - 8 * scale, torch.empty(count * block * K, dtype=dtype)
        parts = (x.split(count, dim) for x, dim in ((packed, 0), (scale, 1), (zero, 1)))
        for bytes_, s, z in zip(*parts, strict=True):
            columns = buffer[: K * block * len(bytes_)].view(K, -1)  # Wᵀ, (K, n)
            out = columns.view(groups, self.group, -1, 2, half).permute(3, 2, 0, 1, 4)
            for i, q in enumerate((bytes_ & 15, bytes_ >> 4)):  # one call for both is slower
                torch.addcmul(z[i], q.float(), s[i], out=out[i])
            yield columns.T

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.dequantize().to(x.dtype))
        rows, gpu = x.flatten(0, -2).contiguous().bfloat16(), x.device.type == GPU
        block = INT4_BLOCK.get(torch.backends.cpu.get_cpu_capability(), self.out_features + 1)
        if gpu and len(rows) > FEW_ROWS:  # whose kernel reads all weights again for every 16 rows
            scale, zero = self.scales.transpose(0, 1)[..., None, :].unbind(-1)  # (N, K/G, 1) each
            groups = unpack_int4(self.q).view(torch.int8).unflatten(1, (-1, self.group)) - 8
            out = F.linear(rows, torch.addcmul(zero, groups, scale).flatten(1))
        elif not gpu and len(rows) > CPU_FEW_ROWS[4] and self.out_features % block == 0:
            dtype = torch.bfloat16 if multiplies_bf16() else torch.float32
            out = multiply_parts(rows.to(dtype), self.dequantized_parts(block, dtype))
        else:
            multiply = aten._weight_int4pack_mm if gpu else aten._weight_int4pack_mm_for_cpu
            out = multiply(rows, self.q, self.group, self.scales)
        return out.view(*x.shape[:-1], -1).to(x.dtype)


def unpack_int4(packed: Tensor) -> Tensor:
    """The integers (N, K) in the order of a GPU's kernel, int32 (N/8, K/16t, 32, t/2).

    k = 16 t o + 32 j + 16 h + 8 e + 2 c + b is in int32 j of lane 4 n + c, for n of 8 rows. Of its
    four bytes, b and h choose one, and e a half of it."""
    parts = packed.view(torch.uint8).view(*packed.shape[:2], 8, 4, -1, 2, 2)
    integers = torch.stack([parts & 15, parts >> 4])  # (e, N/8, o, n, c, j, b, h)
    return integers.permute(1, 3, 2, 5, 7, 0, 4, 6).reshape(8 * len(packed), -1)


LINEAR = {8: Int8Linear, 4: Int4Linear}
