"""What the two compiled implementations share: ``csrc/bias_dropout_residual_layer_norm/`` called with addresses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastbert.backends import extension, philox

Build = Literal["host", "device"]


def output(
    build: Build,
    runner: int,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """y ``[..., H]`` alone; ``runner`` is that of ``forward``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run_forward(build, runner, x, bias, residual, weight, ln_bias, eps, p, seed, out, None, None, None)
    return out


def forward(
    build: Build,
    runner: int,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    needs_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, each ``[..., H]``, mean, rstd, each ``[..., 1]``), the last three ``[0]`` without a backward.

    ``runner`` is the number of threads of the host build and the stream of the device build.
    """
    if not needs_backward:
        out = output(build, runner, x, bias, residual, weight, ln_bias, eps, p, seed)
        mean = x.new_empty(0, dtype=torch.float32)
        return out, x.new_empty(0), mean, torch.empty_like(mean)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    hidden = torch.empty_like(out)
    mean = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _run_forward(build, runner, x, bias, residual, weight, ln_bias, eps, p, seed, out, hidden, mean, rstd)
    return out, hidden, mean, rstd


def _run_forward(
    build: Build,
    runner: int,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    out: Tensor,
    hidden: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fill the last four, of which the last three may be None."""
    x, residual = extension.dense(x), extension.dense(residual)
    bias = None if bias is None else extension.dense(bias)
    weight, ln_bias = _parameter(weight, x.dtype), _parameter(ln_bias, x.dtype)
    cols = x.shape[-1]
    function = getattr(extension.module(), f"bias_dropout_residual_layer_norm_forward_{build}")
    function(
        extension.memory(x),
        extension.memory(bias),
        extension.memory(residual),
        extension.memory(weight),
        extension.memory(ln_bias),
        extension.dtype_code(weight.dtype),
        eps,
        extension.memory(out),
        extension.memory(hidden),
        extension.memory(mean),
        extension.memory(rstd),
        x.numel() // cols,
        cols,
        extension.dtype_code(x.dtype),
        extension.memory(seed),
        philox.threshold(p),
        philox.scale(p),
        runner,
    )


def backward(
    build: Build,
    runner: int,
    dy: Tensor,
    dy2: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    seed: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """(dresidual ``[..., H]``, dx ``[..., H]``, dbias, dweight, dln_bias ``[H]``).

    ``dy2`` is a second gradient of the output. The last three are ``[0]`` where ``output_mask`` leaves them out; dx is
    ``[0]`` without dropout, where it equals dresidual.
    """
    dy, hidden = extension.dense(dy), extension.dense(hidden)
    dy2 = None if dy2 is None else extension.dense(dy2)
    mean, rstd = extension.dense(mean), extension.dense(rstd)
    parameter = _parameter(weight, hidden.dtype)
    cols = hidden.shape[-1]
    rows = hidden.numel() // cols
    needs_dbias, needs_dweight, needs_dln_bias = output_mask
    library = extension.module()
    dresidual = torch.empty_like(hidden)
    dx = hidden.new_empty(0 if seed is None else hidden.shape)
    dbias = hidden.new_empty(cols if needs_dbias else 0)
    dweight = parameter.new_empty(cols if needs_dweight else 0)
    dln_bias = parameter.new_empty(cols if needs_dln_bias else 0)
    sums = library.bias_dropout_residual_layer_norm_backward_scratch(rows, cols) if any(output_mask) else 0
    scratch = mean.new_empty(sums)
    getattr(library, f"bias_dropout_residual_layer_norm_backward_{build}")(
        extension.memory(dy),
        extension.memory(dy2),
        extension.memory(hidden),
        extension.memory(parameter),
        extension.dtype_code(parameter.dtype),
        extension.memory(mean),
        extension.memory(rstd),
        extension.memory(dresidual),
        _wanted(dx),
        _wanted(dbias),
        _wanted(dweight),
        _wanted(dln_bias),
        extension.memory(scratch),
        rows,
        cols,
        extension.dtype_code(hidden.dtype),
        extension.memory(seed),
        philox.threshold(p),
        philox.scale(p),
        runner,
    )
    return dresidual, dx, dbias, dweight.to(weight.dtype), dln_bias.to(weight.dtype)


def _parameter(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter`` as the extension takes it: dense, in ``dtype`` or else in float32."""
    return extension.dense(parameter if parameter.dtype == dtype else parameter.float())


def _wanted(result: Tensor) -> tuple[int, int] | None:
    """The memory of ``result``, or None where it isn't wanted."""
    return extension.memory(result) if result.numel() > 0 else None
