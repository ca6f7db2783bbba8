"""LayerNorm in Triton, forward and backward; the maths is in ``ops/formulas.py``.

A row is read once and stays in registers: its mean, then the mean of the squared differences. It lies there in two
pieces whose sizes are powers of two, 768 as 512 + 256, so that few lanes idle. Narrow rows take a warp each, wide ones
a block of threads.

=========  =======================================================================================
forward    reads x, writes y, mean and rstd
backward   reads dy and x, writes dx; mean and rstd are read, xhat is computed again
weights    the gradients of weight and bias are sums over rows: as many programs as fill the device
           add up rows in a fixed order into a row each of a float32 buffer, and the buffer's rows
           are added up afterwards, so runs on one device agree bit for bit
traffic    4 bytes an element forward and 6 backward in 16 bits, and 8 bytes a row for the statistics
=========  =======================================================================================
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends import launch
from fastbert.backends.launcher import Launcher
from fastbert.backends.partial_sums import add_partials
from fastbert.backends.triton_utils import ceil_div, jit, multiprocessors, pieces, rows_of


@jit(do_not_specialize=["rows", "eps"])
def forward_kernel(
    x_ptr, stride_x, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, eps,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of y ``[rows, H]``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = (row < rows)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_x + column, mask=valid, other=0.0).to(tl.float32)
    total = tl.sum(x, 1)
    if REST > 0:
        rest = BLOCK + tl.arange(0, REST)[None, :]
        inside = valid & (rest < H)
        x_rest = tl.load(x_ptr + row[:, None] * stride_x + rest, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x_rest, 1)
    mean = total / H
    x -= mean[:, None]
    squares = tl.sum(x * x, 1)
    if REST > 0:
        x_rest = tl.where(rest < H, x_rest - mean[:, None], 0.0)
        squares += tl.sum(x_rest * x_rest, 1)
    rstd = 1.0 / tl.sqrt(squares / H + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + column).to(tl.float32)
    bias = tl.load(bias_ptr + column).to(tl.float32)
    y = x * rstd[:, None] * weight + bias
    tl.store(y_ptr + row[:, None] * H + column, y.to(y_ptr.dtype.element_ty), mask=valid)
    if REST > 0:
        weight = tl.load(weight_ptr + rest, mask=rest < H, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + rest, mask=rest < H, other=0.0).to(tl.float32)
        y = x_rest * rstd[:, None] * weight + bias
        tl.store(y_ptr + row[:, None] * H + rest, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    dy_ptr, stride_dy, x_ptr, stride_x, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, rows,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    NEEDS_DX: tl.constexpr, NEEDS_SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every ``programs * ROWS``-th group of rows: dx ``[rows, H]`` and partial sums ``[2, programs, H]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if REST > 0:
        rest = BLOCK + tl.arange(0, REST)[None, :]
        weight_rest = tl.load(weight_ptr + rest, mask=rest < H, other=0.0).to(tl.float32)
        dweight_rest = tl.zeros([ROWS, REST], dtype=tl.float32)
        dbias_rest = tl.zeros([ROWS, REST], dtype=tl.float32)
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        valid = (row < rows)[:, None]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dy = tl.load(dy_ptr + row[:, None] * stride_dy + column, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * stride_x + column, mask=valid, other=0.0).to(tl.float32)
        xhat = (x - mean) * rstd
        if NEEDS_SUMS:
            dweight += dy * xhat
            dbias += dy
        g = dy * weight
        g_sum = tl.sum(g, 1)
        gx_sum = tl.sum(g * xhat, 1)
        if REST > 0:
            inside = valid & (rest < H)
            dy_rest = tl.load(dy_ptr + row[:, None] * stride_dy + rest, mask=inside, other=0.0).to(tl.float32)
            x_rest = tl.load(x_ptr + row[:, None] * stride_x + rest, mask=inside, other=0.0).to(tl.float32)
            xhat_rest = tl.where(inside, (x_rest - mean) * rstd, 0.0)
            if NEEDS_SUMS:
                dweight_rest += dy_rest * xhat_rest
                dbias_rest += dy_rest
            g_rest = dy_rest * weight_rest
            g_sum += tl.sum(g_rest, 1)
            gx_sum += tl.sum(g_rest * xhat_rest, 1)
        if NEEDS_DX:
            g_mean, gx_mean = (g_sum / H)[:, None], (gx_sum / H)[:, None]
            dx = rstd * (g - g_mean - xhat * gx_mean)
            tl.store(dx_ptr + row[:, None] * H + column, dx.to(dx_ptr.dtype.element_ty), mask=valid)
            if REST > 0:
                dx = rstd * (g_rest - g_mean - xhat_rest * gx_mean)
                tl.store(dx_ptr + row[:, None] * H + rest, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEEDS_SUMS:
        weight_row = partial_ptr + program.to(tl.int64) * H
        bias_row = weight_row + programs.to(tl.int64) * H
        tl.store(weight_row + column, tl.sum(dweight, 0)[None, :])
        tl.store(bias_row + column, tl.sum(dbias, 0)[None, :])
        if REST > 0:
            tl.store(weight_row + rest, tl.sum(dweight_rest, 0)[None, :], mask=rest < H)
            tl.store(bias_row + rest, tl.sum(dbias_rest, 0)[None, :], mask=rest < H)


_launch_forward = Launcher(forward_kernel)
_launch_backward = Launcher(backward_kernel)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y ``[..., H]``, mean ``[..., 1]``, rstd ``[..., 1]``)."""
    hidden = x.shape[-1]
    y = x.new_empty(x.shape)
    mean = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    rows = mean.numel()
    if y.numel() == 0:
        return y, mean, rstd
    flat = rows_of(x)
    block, rest = pieces(hidden)
    options = launch.options("layer_norm_forward", launch.row_class(hidden))
    _launch_forward(
        (ceil_div(rows, options["ROWS"]),),
        (flat, flat.stride(0), weight.contiguous(), bias.contiguous(), y, mean, rstd, rows, eps),
        {"H": hidden, "BLOCK": block, "REST": rest, **options},
    )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(dx ``[..., H]``, dweight ``[H]``, dbias ``[H]``), ``[0]`` where ``output_mask`` leaves one out."""
    hidden, rows = x.shape[-1], mean.numel()
    needs_dx, needs_sums = output_mask[0], output_mask[1] or output_mask[2]
    dx = x.new_empty(x.shape if needs_dx else 0)
    options = launch.options("layer_norm_backward", launch.row_class(hidden))
    programs = min(ceil_div(rows, options["ROWS"]), options.pop("PROGRAMS") * multiprocessors(x.device))
    partial = x.new_empty((2, programs if needs_sums else 0, hidden), dtype=torch.float32)
    if x.numel() > 0 and (needs_dx or needs_sums):
        flat_dy, flat_x = rows_of(dy), rows_of(x)
        block, rest = pieces(hidden)
        constants = {"H": hidden, "BLOCK": block, "REST": rest, "NEEDS_DX": needs_dx, "NEEDS_SUMS": needs_sums}
        operands = flat_dy, flat_dy.stride(0), flat_x, flat_x.stride(0)
        _launch_backward(
            (programs,), (*operands, weight.contiguous(), mean, rstd, dx, partial, rows), {**constants, **options}
        )
    sums = add_partials(partial, weight.dtype) if needs_sums else ()
    dweight, dbias = (sums[i] if output_mask[1 + i] else weight.new_empty(0) for i in range(2))
    return dx, dweight, dbias
