"""The oracle of LayerNorm: plain eager PyTorch.

``ops/formulas.py`` has the maths, forward and backward: Ba et al., arXiv:1607.06450, section 3.

===========  ==========================================================================
computes in  float32 for 16-bit inputs, otherwise the dtype of ``x``; the variance is a
             second pass over centred values
saves        mean and rstd ``[..., 1]``, in the dtype of the computation
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

from torch import Tensor

from fastbert.ops import formulas


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y ``[..., H]``, mean ``[..., 1]``, rstd ``[..., 1]``)."""
    dtype = formulas.compute_dtype(x.dtype)
    y, mean, rstd = formulas.layer_norm(x.to(dtype), weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(dx ``[..., H]``, dweight ``[H]``, dbias ``[H]``), ``[0]`` where ``output_mask`` leaves one out."""
    dtype = mean.dtype
    gradients = formulas.layer_norm_grad(dy.to(dtype), x.to(dtype), weight.to(dtype), mean, rstd)
    return tuple(
        gradient.to(like.dtype).contiguous() if wanted else like.new_empty(0)
        for gradient, like, wanted in zip(gradients, (x, weight, weight), output_mask, strict=True)
    )
