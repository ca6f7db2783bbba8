"""Bias and GELU in Triton, forward and backward; the maths is in ``ops/formulas.py``.

=========  =======================================================================================
forward    reads x, writes y: a program has a block of rows and columns
backward   reads dy and x, writes dx; x + bias and its GELU are computed again, nothing is saved.
           Where the GELU itself is wanted too, it takes the place of dy
bias       its gradient is a sum over rows: for each block of columns as many programs as together
           fill the device add up rows in a fixed order into a row each of a float32 buffer, and the
           buffer's rows are added up afterwards, so runs on one device agree bit for bit
order      programs next to each other have columns next to each other
traffic    4 bytes an element forward and 6 backward in 16 bits, 8 with the GELU
=========  =======================================================================================
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends import launch
from fastbert.backends.launcher import Launcher
from fastbert.backends.partial_sums import add_partials
from fastbert.backends.triton_utils import ceil_div, gelu, gelu_grad, jit, multiprocessors, rows_of


@jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, stride_x, bias_ptr, y_ptr, rows, columns,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block ``[ROWS, COLUMNS]`` of y."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    h = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    y = gelu(h, TANH, SHORT=x_ptr.dtype.element_ty != tl.float32)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    dy_ptr, stride_dy, x_ptr, stride_x, bias_ptr, dx_ptr, y_ptr, partial_ptr, rows, columns,
    TANH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_Y: tl.constexpr, NEEDS_SUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every ``programs``-th group of rows in one block of columns: dx, and a row of partial ``[programs, columns]``.

    ``y_ptr`` may be ``dy_ptr``: an element is read before one is written in its place.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (column < columns)
        dy = tl.load(dy_ptr + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            h += bias
        dx = dy * gelu_grad(h, TANH, SHORT=x_ptr.dtype.element_ty != tl.float32)
        if NEEDS_DX:
            tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEEDS_Y:
            y = gelu(h, TANH, SHORT=x_ptr.dtype.element_ty != tl.float32)
            tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)
        if NEEDS_SUM:
            dbias += dx
    if NEEDS_SUM:
        total = tl.sum(dbias, 0)[None, :]
        tl.store(partial_ptr + program.to(tl.int64) * columns + column, total, mask=column < columns)


_launch_forward = Launcher(forward_kernel)
_launch_backward = Launcher(backward_kernel)


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias): ``[..., I]``; a ``bias`` of None, which ``linear_gelu`` passes, is zero."""
    columns = x.shape[-1]
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    flat = rows_of(x)
    options = launch.options("bias_gelu_forward", "all")
    _launch_forward(
        (ceil_div(flat.shape[0], options["ROWS"]) * ceil_div(columns, options["COLUMNS"]),),
        (flat, flat.stride(0), flat if bias is None else bias.contiguous(), y, flat.shape[0], columns),
        {"TANH": approximate == "tanh", "HAS_BIAS": bias is not None, **options},
    )
    return y


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """(dx ``[..., I]``, dbias ``[I]``), ``[0]`` where ``output_mask`` leaves one out; with a ``bias`` of None too."""
    return _backward(dy, x, bias, approximate, output_mask, None)


def backward_with_output(
    dy: Tensor, x: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(gelu(x) ``[..., I]``, and what ``backward`` gives without a bias); a contiguous dy is overwritten."""
    y = dy if dy.is_contiguous() else torch.empty_like(dy, memory_format=torch.contiguous_format)
    return y, *_backward(dy, x, None, approximate, output_mask, y)


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, output_mask: list[bool], y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``backward``, with gelu(x) written to ``y``."""
    needs_dx, needs_sum = output_mask
    columns = x.shape[-1]
    flat_dy, flat_x = rows_of(dy), rows_of(x)
    rows = flat_x.shape[0]
    options = launch.options("bias_gelu_backward", "all")
    blocks = ceil_div(columns, options["COLUMNS"])
    resident = options.pop("PROGRAMS") * multiprocessors(x.device)
    programs = min(ceil_div(rows, options["ROWS"]), max(1, resident // blocks))
    dx = x.new_empty(x.shape if needs_dx else 0)
    partial = x.new_empty((1, programs, columns if needs_sum else 0), dtype=torch.float32)
    if x.numel() > 0 and (needs_dx or needs_sum or y is not None):
        constants = {
            "TANH": approximate == "tanh", "HAS_BIAS": bias is not None, "NEEDS_DX": needs_dx,
            "NEEDS_Y": y is not None, "NEEDS_SUM": needs_sum,
        }  # fmt: skip
        operands = flat_dy, flat_dy.stride(0), flat_x, flat_x.stride(0), flat_x if bias is None else bias.contiguous()
        _launch_backward(
            (programs * blocks,),
            (*operands, dx, dx if y is None else y, partial, rows, columns),
            {**constants, **options},
        )
    dtype = x.dtype if bias is None else bias.dtype
    return dx, add_partials(partial, dtype)[0] if needs_sum else x.new_empty(0, dtype=dtype)
