"""Bias-GELU with PyTorch's own kernels: an addition, then a GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import formulas

_aten = torch.ops.aten


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias): ``[..., I]``; a ``bias`` of None is zero."""
    if bias is None:
        return _aten.gelu(x.contiguous(), approximate=approximate)  # type: ignore[no-any-return]
    hidden = x.contiguous() + bias
    return _aten.gelu_(hidden, approximate=approximate)  # type: ignore[no-any-return]


def backward(dy: Tensor, x: Tensor, bias: Tensor, approximate: str, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx ``[..., I]``, dbias ``[I]``), ``[0]`` where ``output_mask`` leaves one out."""
    dx = _aten.gelu_backward(dy.contiguous(), x.contiguous() + bias, approximate=approximate)
    dbias = formulas.sum_rows(dx) if output_mask[1] else bias.new_empty(0)
    return dx if output_mask[0] else x.new_empty(0), dbias
