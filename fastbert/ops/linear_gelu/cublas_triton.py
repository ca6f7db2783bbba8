"""Linear-GELU as a product of cuBLAS, which adds the bias, and the Triton kernel of ``bias_gelu`` without one.

=========  =======================================================================================
forward    h = x Wᵀ + b is rounded to the dtype of x and written by one kernel, read by the next
backward   that of ``gradients.py``
saves      h, and only where a gradient needs it
traffic    beside the product's own, h is read and y written: 4 bytes an element in 16 bits
=========  =======================================================================================
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbert.backends import select
from fastbert.backends.triton_utils import rows_of
from fastbert.ops.linear_gelu.gradients import backward, backward_with_output

__all__ = ["backward", "backward_with_output", "forward"]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool
) -> tuple[Tensor, Tensor]:
    """(gelu(h) ``[..., I]``, h ``[..., I]``, or ``[0]`` where it isn't needed)."""
    hidden = F.linear(rows_of(x), weight, bias).view(*x.shape[:-1], weight.shape[0])
    y = select.load("bias_gelu", "triton").forward(hidden, None, approximate)
    return y, hidden if needs_hidden else x.new_empty(0)
