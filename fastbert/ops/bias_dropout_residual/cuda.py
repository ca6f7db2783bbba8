"""The CUDA build of the compiled bias-dropout-residual: ``csrc/bias_dropout_residual/device.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import extension, philox


def forward(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """residual + dropout(x + bias): ``[..., H]``."""
    x, residual = extension.dense(x), extension.dense(residual)
    bias = None if bias is None else extension.dense(bias)
    out = torch.empty_like(x)
    cols = x.shape[-1]
    extension.module().bias_dropout_residual_forward_device(
        extension.memory(x),
        extension.memory(bias),
        extension.memory(residual),
        extension.memory(out),
        x.numel() // cols,
        cols,
        extension.dtype_code(x.dtype),
        extension.memory(seed),
        philox.threshold(p),
        philox.scale(p),
        extension.stream(x),
    )
    return out


def backward(dy: Tensor, p: float, seed: Tensor | None, has_bias: bool) -> tuple[Tensor, Tensor]:
    """(dx ``[..., H]``, dbias ``[H]``, or ``[0]`` without a bias)."""
    dy = extension.dense(dy)
    dx = torch.empty_like(dy)
    cols = dy.shape[-1]
    rows = dy.numel() // cols
    library = extension.module()
    dbias = dy.new_empty(cols) if has_bias else None
    scratch = (
        dy.new_empty(library.bias_dropout_residual_backward_scratch(rows, cols), dtype=torch.float32)
        if has_bias
        else None
    )
    library.bias_dropout_residual_backward_device(
        extension.memory(dy),
        extension.memory(dx),
        extension.memory(dbias),
        extension.memory(scratch),
        rows,
        cols,
        extension.dtype_code(dy.dtype),
        extension.memory(seed),
        philox.threshold(p),
        philox.scale(p),
        extension.stream(dy),
    )
    return dx, dy.new_empty(0) if dbias is None else dbias
