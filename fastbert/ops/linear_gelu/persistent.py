"""Linear-GELU as one product in Triton whose programs stay on their multiprocessor, and which copies by TMA.

=========  =======================================================================================
forward    a program takes one block of the product after another, in the order of ``triton.py``.
           TMA (the copy engine of compute capability 9.0 and later) brings blocks of x and W into
           shared memory; the loops over blocks and over k are one, so the first copies of the next
           block run beside the epilogue of this one
epilogue   in parts of some columns each: adds the bias, applies the GELU, rounds once, and TMA takes
           the part from shared memory to y
overlap    two programs on a multiprocessor share its tensor cores. In step, both would multiply and
           then both apply the GELU. So the second begins later, by the time that the products of a
           block take: one multiplies while the other is in its epilogue
saves      h = x Wᵀ + b in the dtype of x, and only where a gradient needs it; y isn't saved
backward   that of ``gradients.py``
traffic    x and W once for each block of columns and rows, less what the L2 saves; y and h once
layouts    TMA asks for rows at multiples of 16 bytes: others are copied first, padded by zeros
=========  =======================================================================================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.backends import launch
from fastbert.backends.launcher import Launcher
from fastbert.backends.triton_utils import (
    ceil_div,
    dot,
    dot_precision,
    gelu,
    jit,
    multiprocessors,
    rows_of,
)
from fastbert.ops.linear_gelu.gradients import backward, backward_with_output

__all__ = ["backward", "backward_with_output", "forward"]


# What TMA's addresses and strides are multiples of, in bytes.
_ALIGNMENT = 16


@jit
def _clock():
    """Cycles of the multiprocessor."""
    return tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@jit
def _delay(first_delayed, cycles):
    """Wait for ``cycles`` in programs from ``first_delayed`` on."""
    if tl.program_id(0) >= first_delayed:
        begin = _clock() + cycles
        while _clock() < begin:
            pass


@jit
def _store(
    hidden, bias_ptr, y_desc, hidden_desc, row, column, N,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_HIDDEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add the bias and store a block at (``row``, ``column``) and its GELU, ``PARTS`` parts one after another."""
    if PARTS == 1:
        if HAS_BIAS:
            columns = column + tl.arange(0, hidden.shape[1])
            hidden += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if NEEDS_HIDDEN:
            hidden_desc.store([row, column], hidden.to(hidden_desc.dtype))
        y_desc.store([row, column], gelu(hidden, TANH, SHORT=True).to(y_desc.dtype))
    else:
        half: tl.constexpr = hidden.shape[1] // 2
        halves = tl.permute(tl.reshape(hidden, [hidden.shape[0], 2, half]), (0, 2, 1))
        left, right = tl.split(halves)
        _store(left, bias_ptr, y_desc, hidden_desc, row, column, N, TANH, HAS_BIAS, NEEDS_HIDDEN, PARTS // 2)
        _store(right, bias_ptr, y_desc, hidden_desc, row, column + half, N, TANH, HAS_BIAS, NEEDS_HIDDEN, PARTS // 2)


@jit(do_not_specialize=["M", "first_delayed"])
def persistent_kernel(
    bias_ptr, x_desc, weight_desc, y_desc, hidden_desc, M, N, K, first_delayed,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    DELAY: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Blocks ``[BLOCK_M, BLOCK_N]`` of y ``[M, N]``, and of hidden where that is needed.

    ``bias_ptr`` is any tensor where there is no bias. Programs from ``first_delayed`` on begin later, by ``DELAY``
    cycles a step over k.
    """
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    if DELAY > 0:
        _delay(first_delayed, steps * DELAY)
    for block in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        block_m, block_n = tl.swizzle2d(block // blocks_n, block % blocks_n, blocks_m, blocks_n, GROUP_M)
        row, column = block_m * BLOCK_M, block_n * BLOCK_N
        hidden = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for step in range(steps):
            start = step * BLOCK_K
            hidden = dot(x_desc.load([row, start]), weight_desc.load([column, start]).T, hidden, PRECISION)
        _store(hidden, bias_ptr, y_desc, hidden_desc, row, column, N, TANH, HAS_BIAS, NEEDS_HIDDEN, PARTS)


_launch_persistent = Launcher(persistent_kernel)


def _aligned(x: Tensor) -> Tensor:
    """``x`` ``[rows, columns]`` as TMA takes it: itself or a copy, where need be with columns of zeros more."""
    size = x.element_size()
    if missing := -x.shape[1] % (_ALIGNMENT // size):
        return F.pad(x, (0, missing))
    if x.data_ptr() % _ALIGNMENT or x.stride(0) * size % _ALIGNMENT or x.stride(0) < x.shape[1]:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool
) -> tuple[Tensor, Tensor]:
    """(gelu(h) ``[..., I]``, h ``[..., I]``, or ``[0]`` where it isn't needed)."""
    (N, K), shape = weight.shape, (*x.shape[:-1], weight.shape[0])
    M = x.numel() // K
    pitch = N + -N % (_ALIGNMENT // x.element_size())
    y = x.new_empty(M, pitch)
    hidden = x.new_empty((M, pitch) if needs_hidden else 0)
    if y.numel() > 0:
        _launch(
            _aligned(rows_of(x)), _aligned(rows_of(weight)), bias, y, hidden if needs_hidden else None, N, approximate
        )
    if pitch > N:
        y, hidden = y[:, :N].contiguous(), hidden[:, :N].contiguous() if needs_hidden else hidden
    return y.view(shape), hidden.view(shape) if needs_hidden else hidden


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, hidden: Tensor | None, N: int, approximate: str
) -> None:
    M, K = x.shape
    options = launch.options("linear_gelu_persistent", "16 bits")
    at_once = multiprocessors(x.device)
    resident = options.pop("PROGRAMS") * at_once
    block_m, block_n, block_k = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    blocks = ceil_div(M, block_m) * ceil_div(N, block_n)
    programs = min(resident, blocks)
    # With fewer than two blocks each, what a late begin costs at the end isn't won back.
    first_delayed = at_once if blocks >= 2 * resident else programs
    part = [block_m, block_n // options["PARTS"]]
    operands = (
        x if bias is None else bias.contiguous(),
        TensorDescriptor(x, [M, K], [x.stride(0), 1], [block_m, block_k]),
        TensorDescriptor(weight, [N, K], [weight.stride(0), 1], [block_n, block_k]),
        TensorDescriptor(y, [M, N], [y.stride(0), 1], part),
        None if hidden is None else TensorDescriptor(hidden, [M, N], [hidden.stride(0), 1], part),
    )
    constants = {
        "TANH": approximate == "tanh", "HAS_BIAS": bias is not None, "NEEDS_HIDDEN": hidden is not None,
        "PRECISION": dot_precision(x.dtype),
    }  # fmt: skip
    _launch_persistent((programs,), (*operands, M, N, K, first_delayed), {**constants, **options})
