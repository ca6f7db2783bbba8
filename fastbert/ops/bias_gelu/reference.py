"""The oracle of bias-GELU: plain eager PyTorch.

With ``Phi`` the normal distribution function, or its approximation by tanh (Hendrycks & Gimpel, arXiv:1606.08415,
section 2), and ``h = x + bias``::

    y = h * Phi(h)
    dx = dy * (Phi(h) + h * Phi'(h))        dbias = sum over rows of dx

===========  ==========================================================================
computes in  float32 for 16-bit inputs, otherwise the dtype of ``x``
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

from torch import Tensor

from fastbert.ops import formulas


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias): ``[..., I]``; a ``bias`` of None is zero."""
    dtype = formulas.compute_dtype(x.dtype)
    hidden = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return formulas.gelu(hidden, approximate).to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, bias: Tensor, approximate: str, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx ``[..., I]``, dbias ``[I]``), ``[0]`` where ``output_mask`` leaves one out."""
    dtype = formulas.compute_dtype(x.dtype)
    dx = dy.to(dtype) * formulas.gelu_grad(x.to(dtype) + bias.to(dtype), approximate)
    dbias = formulas.sum_rows(dx).to(bias.dtype) if output_mask[1] else bias.new_empty(0)
    return dx.to(x.dtype).contiguous() if output_mask[0] else x.new_empty(0), dbias
