"""The product of a few rows with int8 weights, on a GPU: every weight is read once, as a byte.

Each program computes BLOCK_N columns of the output for up to 32 rows. It loads bytes, converts them
in registers and multiplies them on the tensor cores, while the next blocks are loaded: reading the
weights is what takes the time. The sums, in fp32, are scaled at the end.

Shapes: x (R, K), q (N, K), scale (N), out (R, N).
"""

import triton  # type: ignore  # not there without a GPU
import triton.language as tl  # type: ignore
from torch import Tensor


@triton.jit
def int8_kernel(
    x, q, scale, out, R, N, K, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        weights = tl.load(q + n * K + k[None, :], (n < N) & (k[None, :] < K), 0)
        inputs = tl.load(x + r * K + k[:, None], (r < R) & (k[:, None] < K), 0)
        sums = tl.dot(weights.to(inputs.dtype), inputs, sums)
    sums *= tl.load(scale + n, n < N, 0)
    tl.store(out + r * N + n, sums.to(out.dtype.element_ty), (n < N) & (r < R))


def multiply(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    (R, K), N = x.shape, len(q)
    out = x.new_empty(R, N)
    rows, block = (16 if R <= 16 else 32), 32  # a tensor core's tile has 16 rows
    grid = triton.cdiv(N, block), triton.cdiv(R, rows)
    sizes = R, N, K, rows, block, 128
    int8_kernel[grid](x, q, scale, out, *sizes, num_stages=4)  # type: ignore
    return out
