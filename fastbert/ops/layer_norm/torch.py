"""PyTorch's own LayerNorm kernels.

On a CPU they keep float32 statistics of a 16-bit ``x`` only next to float32 parameters; they compute
``x * rstd - mean * rstd``, which for constant rows of float16 is off by up to 1; and they add up 16-bit gradients of
the parameters in 16 bits, with errors of several per cent at a thousand rows. So the parameters are widened, float16
is too, and the backward runs in float32. On a GPU ``x`` and the parameters must have one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops.formulas import compute_dtype

_aten = torch.ops.aten


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y ``[..., H]``, mean ``[..., 1]``, rstd ``[..., 1]``)."""
    dtype = compute_dtype(x.dtype)
    operand = x
    if x.is_cpu or weight.dtype != x.dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
        operand = x if x.is_cpu and x.dtype == torch.bfloat16 else x.to(dtype)
    y, mean, rstd = _aten.native_layer_norm(operand, x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(dx ``[..., H]``, dweight ``[H]``, dbias ``[H]``), ``[0]`` where ``output_mask`` leaves one out."""
    dtype = mean.dtype if x.is_cpu or weight.dtype != x.dtype else x.dtype
    operand, parameter = x.to(dtype), weight.to(dtype)
    # The bias has no part in the gradients: the weight stands in for it.
    gradients = _aten.native_layer_norm_backward(
        dy.to(dtype), operand, x.shape[-1:], mean, rstd, parameter, parameter, output_mask
    )
    return tuple(
        gradient.to(like.dtype) if wanted else like.new_empty(0)
        for gradient, like, wanted in zip(gradients, (x, weight, weight), output_mask, strict=True)
    )
