"""The oracle of bias-dropout-residual: plain eager PyTorch.

With ``m`` the keep mask of ``backends/philox.py`` and ``s`` = 65536 / threshold(p), about 1 / (1 - p)::

    y = residual + s * m * (x + bias)
    dx = s * m * dy        dbias = sum over rows of dx        dresidual = dy

The residual dropout of BERT: Devlin et al., arXiv:1810.04805, appendix A.2, after Vaswani et al., arXiv:1706.03762,
section 5.4 (dropout on the output of each sub-layer, before it is added to its input).

===========  ==========================================================================
computes in  float32 for 16-bit inputs, otherwise the dtype of the inputs
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import philox
from fastbert.ops.formulas import compute_dtype, sum_rows


def forward(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """residual + dropout(x + bias): ``[..., H]``; ``seed`` is None when nothing is dropped."""
    dtype = compute_dtype(x.dtype)
    hidden = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return (residual.to(dtype) + philox.hidden_dropout(hidden, p, seed)).to(x.dtype).contiguous()


def backward(dy: Tensor, p: float, seed: Tensor | None, has_bias: bool) -> tuple[Tensor, Tensor]:
    """(dx ``[..., H]``, dbias ``[H]``, or ``[0]`` without a bias); the gradient of the residual is ``dy`` itself."""
    dx = philox.hidden_dropout(dy.to(compute_dtype(dy.dtype)), p, seed)
    dbias = sum_rows(dx).to(dy.dtype) if has_bias else dy.new_empty(0)
    return dx.to(dy.dtype, copy=True, memory_format=torch.contiguous_format), dbias
