"""The oracle of bias-dropout-residual-LayerNorm: plain eager PyTorch.

With ``m`` the keep mask of ``backends/philox.py`` and ``s`` = 65536 / threshold(p), about 1 / (1 - p)::

    h = residual + s * m * (x + bias)        y = LayerNorm(h)
    dresidual = dh        dx = s * m * dh        dbias = sum over rows of dx

How each sub-layer of BERT ends: Vaswani et al., arXiv:1706.03762, sections 3.1 and 5.4. ``ops/formulas.py`` has the
LayerNorm, forward and backward.

===========  ==========================================================================
computes in  float32 for 16-bit inputs, otherwise the dtype of ``x``; the variance is a
             second pass over centred values
saves        h ``[..., H]`` in the dtype of ``x``; mean and rstd ``[..., 1]`` of h as saved,
             in the dtype of the computation
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastbert.backends import philox
from fastbert.ops import formulas


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    needs_backward: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, each ``[..., H]``, mean, rstd, each ``[..., 1]``), the last three ``[0]`` without a backward."""
    dtype = formulas.compute_dtype(x.dtype)
    branch = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    hidden = (residual.to(dtype) + philox.hidden_dropout(branch, p, seed)).to(x.dtype)
    y, mean, rstd = formulas.layer_norm(hidden.to(dtype), weight.to(dtype), ln_bias.to(dtype), eps)
    if not needs_backward:
        hidden, mean, rstd = hidden.new_empty(0), mean.new_empty(0), rstd.new_empty(0)
    return y.to(x.dtype).contiguous(), hidden.contiguous(), mean.contiguous(), rstd.contiguous()


def output(*arguments: Any) -> Tensor:
    """y ``[..., H]`` alone, from the arguments of ``forward`` less the last."""
    return forward(*arguments)[0]


def backward(
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
    dtype = mean.dtype
    dy = dy if dy2 is None else dy + dy2
    dhidden, dweight, dln_bias = formulas.layer_norm_grad(dy.to(dtype), hidden.to(dtype), weight.to(dtype), mean, rstd)
    dx = philox.hidden_dropout(dhidden, p, seed)
    empty = hidden.new_empty(0)
    return (
        dhidden.to(hidden.dtype),
        empty if seed is None else dx.to(hidden.dtype),
        formulas.sum_rows(dx).to(hidden.dtype) if output_mask[0] else empty.clone(),
        dweight.to(weight.dtype) if output_mask[1] else weight.new_empty(0),
        dln_bias.to(weight.dtype) if output_mask[2] else weight.new_empty(0),
    )
