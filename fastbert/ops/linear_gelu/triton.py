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
float32    TF32 where torch allows it, or else three such products (``triton_utils.dot_precision``)
=========  =======================================================================================
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends import launch
from fastbert.backends.launcher import Launcher
from fastbert.backends.triton_utils import ceil_div, dot, dot_precision, gelu, jit, rows_of
from fastbert.ops.linear_gelu.gradients import backward, backward_with_output

__all__ = ["backward", "backward_with_output", "forward"]


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
    y = gelu(hidden, TANH, SHORT=y_ptr.dtype.element_ty != tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["M"])
def forward_kernel(
    x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, y_ptr, hidden_ptr, M, N, K,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_HIDDEN: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block ``[BLOCK_M, BLOCK_N]`` of y ``[M, N]``, and of hidden where that is needed."""
    program, blocks_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    block_m, block_n = tl.swizzle2d(program // blocks_n, program % blocks_n, tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M)
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


_launch = Launcher(forward_kernel)


def _options(dtype: torch.dtype, M: int, N: int) -> dict[str, int]:
    """The launch of a product ``[M, N]``: in large blocks, or in smaller ones where those would be too few."""
    bits = f"{8 * dtype.itemsize} bits"
    large = launch.options("linear_gelu", f"{bits}, large")
    if ceil_div(M, large["BLOCK_M"]) * ceil_div(N, large["BLOCK_N"]) < _FEW:
        return launch.options("linear_gelu", f"{bits}, small")
    return large


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
    options = _options(x.dtype, M, N)
    constants = {
        "TANH": approximate == "tanh", "HAS_BIAS": bias is not None, "NEEDS_HIDDEN": needs_hidden,
        "EVEN_K": K % options["BLOCK_K"] == 0, "PRECISION": dot_precision(x.dtype), "GROUP_M": _GROUP_M,
    }  # fmt: skip
    operands = flat, flat.stride(0), weight, weight.stride(0), y if bias is None else bias.contiguous()
    _launch(
        (ceil_div(M, options["BLOCK_M"]) * ceil_div(N, options["BLOCK_N"]),),
        (*operands, y, hidden, M, N, K),
        {**constants, **options},
    )
    return y, hidden
