"""What the two compiled implementations share: ``csrc/bias_dropout_residual_layer_norm/`` called with addresses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastbert.backends import extension, philox

Build = Literal["host", "device"]


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
    x, residual = x.contiguous(), residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    weight, ln_bias = _parameter(weight, x.dtype), _parameter(ln_bias, x.dtype)
    out = torch.empty_like(x)
    hidden = x.new_empty(x.shape if needs_backward else 0)
    mean = x.new_empty((*x.shape[:-1], 1) if needs_backward else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
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
        _wanted(hidden),
        _wanted(mean),
        _wanted(rstd),
        x.numel() // cols,
        cols,
        extension.dtype_code(x.dtype),
        extension.memory(seed),
        philox.threshold(p),
        philox.scale(p),
        runner,
    )
    return out, hidden, mean, rstd


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
    dy, hidden = dy.contiguous(), hidden.contiguous()
    dy2 = None if dy2 is None else dy2.contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
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
    """``parameter`` as the extension takes it: contiguous, in ``dtype`` or else in float32."""
    if parameter.dtype == dtype and parameter.is_contiguous():
        return parameter
    return parameter.to(parameter.dtype if parameter.dtype == dtype else torch.float32).contiguous()


def _wanted(result: Tensor) -> tuple[int, int] | None:
    """The memory of ``result``, or None where it isn't wanted."""
    return extension.memory(result) if result.numel() > 0 else None
