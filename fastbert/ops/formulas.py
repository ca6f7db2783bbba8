"""The maths that the references of several ops share.

LayerNorm: Ba et al., arXiv:1607.06450, section 3. GELU: Hendrycks & Gimpel, arXiv:1606.08415, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums, products and statistics are computed in: float32 for the 16-bit types, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def sum_rows(x: Tensor) -> Tensor:
    """The sum of ``[..., H]`` over all but the last dimension: ``[H]``."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y ``[..., H]``, mean ``[..., 1]``, rstd ``[..., 1]``), the variance from a second pass over centred values.

    With ``xhat = (x - mean) * rstd`` and ``rstd = 1 / sqrt(var + eps)``, ``y = weight * xhat + bias``.
    """
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd * weight + bias, mean, rstd


def layer_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dx ``[..., H]``, dweight ``[H]``, dbias ``[H]``) of :func:`layer_norm`.

    With ``g = weight * dy``, ``dx = rstd * (g - mean(g) - xhat * mean(g * xhat))``; ``dweight`` and ``dbias`` are the
    sums over rows of ``dy * xhat`` and ``dy``.
    """
    xhat = (x - mean) * rstd
    g = dy * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, sum_rows(dy * xhat), sum_rows(dy)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """``x * Phi(x)``, Phi the normal distribution function, or ("tanh") its approximation by tanh.

    ``Phi(x) = erfc(-x / sqrt(2)) / 2``, which stays accurate where ``1 + erf(x / sqrt(2))`` cancels.
    """
    return x * _phi(x, approximate)


def gelu_grad(x: Tensor, approximate: str) -> Tensor:
    """The derivative of :func:`gelu`: ``Phi(x) + x * Phi'(x)``."""
    if approximate == "none":
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2.0 * math.pi)
    else:
        inner = torch.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x**3))
        density = 0.5 * (1.0 - inner.square()) * _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBIC * x.square())
    return _phi(x, approximate) + x * density


def _phi(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return 0.5 * torch.erfc(-x * math.sqrt(0.5))
    return 0.5 * (1.0 + torch.tanh(_TANH_SCALE * (x + _TANH_CUBIC * x**3)))
