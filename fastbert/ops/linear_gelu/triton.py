"""Linear-GELU as one product in Triton, with the bias and the GELU in its epilogue.

=========  =======================================================================================
forward    a program has one block of the product and sums over k in float32; it adds the bias,
           applies the GELU and rounds once. Programs go down a few blocks of rows, then on to the
           next column of blocks, so that those that run together share rows and weights in the L2
epilogue   takes the left half of the block, then the right one: that halves what is in registers
           beside the sums. erf costs about as many cycles as the products of a few hundred k, so on
           compute capability 9.0 and 10.0 two programs fit on a multiprocessor, and one's epilogue
           can run beside the other's products
saves      h = x Wᵀ + b in the dtype of x, and only where a gradient needs it; y isn't saved
backward   reads dy and h, writes dh, sums dh over rows in a fixed order; dx and dW are products of
           cuBLAS with dh
traffic    x and W once for each block of columns and rows, less what the L2 saves; y and h once
float32    IEEE products, which don't use tensor cores, or TF32 where torch allows it
=========  =======================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.backends.triton_utils import capability, dot, jit, normal, rows_of
from fastbert.ops.linear_gelu.gradients import backward

__all__ = ["backward", "forward"]


class Launch(NamedTuple):
    """The block of a program, ``[block_m, block_n]``, the step in k, the warps and the depth of the pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By compute capability and kind of product: where there are many blocks, and where there are too few to go round.
# Chosen by the registers and shared memory that they compile to; nobody has measured them on a device yet.
LAUNCHES = {
    (80, "16 bits"): (Launch(128, 128, 32, 8, 4), Launch(64, 64, 64, 4, 3)),
    (80, "tf32"): (Launch(128, 128, 32, 8, 3), Launch(64, 64, 32, 4, 3)),
    (80, "ieee"): (Launch(128, 128, 16, 8, 3), Launch(64, 64, 32, 4, 3)),
    (90, "16 bits"): (Launch(128, 128, 64, 8, 3), Launch(64, 64, 64, 4, 4)),
    (90, "tf32"): (Launch(128, 128, 32, 8, 3), Launch(64, 64, 32, 4, 3)),
    (90, "ieee"): (Launch(128, 128, 16, 8, 3), Launch(64, 64, 32, 4, 3)),
    (100, "16 bits"): (Launch(128, 128, 64, 8, 3), Launch(64, 64, 64, 4, 4)),
    (100, "tf32"): (Launch(128, 128, 32, 8, 3), Launch(64, 64, 32, 4, 3)),
    (100, "ieee"): (Launch(128, 128, 16, 8, 3), Launch(64, 64, 32, 4, 3)),
}
# With fewer large blocks than this, multiprocessors would idle: GPUs have 100 to 150 of them.
_FEW = 128
# Blocks of rows that a group of programs goes down before the next column.
_GROUP_M = 8


@jit
def _store(
    hidden, bias_ptr, y_ptr, hidden_ptr, rows, column, N,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Add the bias at ``column``, store the first ``rows`` rows and their GELU; the pointers are to the block's row."""
    row = tl.arange(0, hidden.shape[0])
    inside = (row < rows)[:, None] & (column < N)[None, :]
    offset = row[:, None] * N + column[None, :]
    if HAS_BIAS:
        hidden += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if NEEDS_HIDDEN:
        tl.store(hidden_ptr + offset, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
    phi, _ = normal(hidden, TANH)
    tl.store(y_ptr + offset, (hidden * phi).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def forward_kernel(
    x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, y_ptr, hidden_ptr, M, N, K,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_HIDDEN: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block ``[BLOCK_M, BLOCK_N]`` of y ``[M, N]``, and of hidden where that is needed."""
    program, blocks_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    block_m, block_n = tl.swizzle2d(
        program // blocks_n, program % blocks_n, tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M
    )
    # Beyond the last row or column that one is read again, without a mask, and what comes of it isn't stored.
    row = tl.minimum(block_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    column = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * stride_x + k[None, :]
    weight_ptrs = weight_ptr + column[None, :] * stride_weight + k[:, None]
    hidden = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0.0)
        hidden = dot(x, weight, hidden, PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    left, right = tl.split(tl.permute(tl.reshape(hidden, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    rows = M - block_m * BLOCK_M
    first = block_m.to(tl.int64) * BLOCK_M * N
    y_ptr += first
    hidden_ptr += first
    _store(left, bias_ptr, y_ptr, hidden_ptr, rows, column, N, TANH, HAS_BIAS, NEEDS_HIDDEN)
    column += BLOCK_N // 2
    _store(right, bias_ptr, y_ptr, hidden_ptr, rows, column, N, TANH, HAS_BIAS, NEEDS_HIDDEN)


def launch(dtype: torch.dtype, M: int, N: int) -> tuple[Launch, str]:
    """The launch for a product ``[M, N]`` of ``dtype`` on the present device, and the precision of its inputs."""
    present = capability()
    family = 90 if present == 90 else 100 if present in (100, 103) else 80
    precision = "ieee"
    # allow_tf32 says the same, but raises once somebody has set fp32_precision.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    many, few = LAUNCHES[family, precision if dtype == torch.float32 else "16 bits"]
    return few if triton.cdiv(M, many.block_m) * triton.cdiv(N, many.block_n) < _FEW else many, precision


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool
) -> tuple[Tensor, Tensor]:
    """(gelu(h) ``[..., I]``, h ``[..., I]``, or ``[0]`` where it isn't needed)."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    hidden = x.new_empty(y.shape if needs_hidden else 0)
    if y.numel() == 0:
        return y, hidden
    flat, weight = rows_of(x), rows_of(weight)
    (M, K), N = flat.shape, weight.shape[0]
    config, precision = launch(x.dtype, M, N)
    forward_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)](
        flat, flat.stride(0), weight, weight.stride(0), y if bias is None else bias.contiguous(), y, hidden, M, N, K,
        TANH=approximate == "tanh", HAS_BIAS=bias is not None, NEEDS_HIDDEN=needs_hidden,
        EVEN_K=K % config.block_k == 0, PRECISION=precision, GROUP_M=_GROUP_M,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, hidden
