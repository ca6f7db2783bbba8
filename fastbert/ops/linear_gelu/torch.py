"""Linear-GELU with PyTorch's own kernels: a matrix product, then a GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool
) -> tuple[Tensor, Tensor]:
    """(gelu(h) ``[..., I]``, h ``[..., I]``, or ``[0]`` where it isn't needed)."""
    hidden = F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.gelu(hidden, approximate=approximate), hidden if needs_hidden else x.new_empty(0)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx ``[..., H]``, dweight ``[I, H]``, dbias ``[I]``), ``[0]`` where ``output_mask`` leaves one out."""
    dhidden = _aten.gelu_backward(dy.contiguous(), hidden, approximate=approximate).view(-1, weight.shape[0])
    return (
        (dhidden @ weight).view(x.shape) if output_mask[0] else x.new_empty(0),
        dhidden.T @ x.reshape(-1, x.shape[-1]) if output_mask[1] else x.new_empty(0),
        dhidden.sum(0) if output_mask[2] else x.new_empty(0),
    )


def backward_with_output(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(gelu(h) ``[..., I]``, and what ``backward`` gives)."""
    return F.gelu(hidden, approximate=approximate), *backward(dy, x, weight, hidden, approximate, output_mask)
