"""The oracle of linear-GELU: plain eager PyTorch.

With ``Phi`` the normal distribution function, or its approximation by tanh (Hendrycks & Gimpel, arXiv:1606.08415,
section 2), and ``h = x Wᵀ + b``::

    y = h * Phi(h)
    dh = dy * (Phi(h) + h * Phi'(h))        dx = dh W        dW = dhᵀ x        db = sum over rows of dh

===========  ==========================================================================
computes in  float32 for 16-bit inputs, otherwise the dtype of ``x``
saves        h ``[..., I]``, in the dtype of ``x``, where a gradient will be wanted
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

from torch import Tensor

from fastbert.ops import formulas


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool
) -> tuple[Tensor, Tensor]:
    """(gelu(h) ``[..., I]``, h ``[..., I]``, or ``[0]`` where it isn't needed)."""
    dtype = formulas.compute_dtype(x.dtype)
    hidden = x.to(dtype).reshape(-1, x.shape[-1]) @ weight.to(dtype).T
    if bias is not None:
        hidden = hidden + bias.to(dtype)
    hidden = hidden.view(*x.shape[:-1], weight.shape[0])
    y = formulas.gelu(hidden, approximate).to(x.dtype)
    return y, hidden.to(x.dtype) if needs_hidden else x.new_empty(0)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(dx ``[..., H]``, dweight ``[I, H]``, dbias ``[I]``), ``[0]`` where ``output_mask`` leaves one out."""
    dtype = formulas.compute_dtype(x.dtype)
    dhidden = dy.to(dtype) * formulas.gelu_grad(hidden.to(dtype), approximate)
    rows = dhidden.reshape(-1, dhidden.shape[-1])
    gradients = (
        (rows @ weight.to(dtype)).view(x.shape),
        rows.T @ x.to(dtype).reshape(-1, x.shape[-1]),
        rows.sum(0),
    )
    return tuple(
        gradient.to(x.dtype).contiguous() if wanted else x.new_empty(0)
        for gradient, wanted in zip(gradients, output_mask, strict=True)
    )


def backward_with_output(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(gelu(h) ``[..., I]``, and what ``backward`` gives)."""
    y = formulas.gelu(hidden.to(formulas.compute_dtype(x.dtype)), approximate).to(x.dtype)
    return y, *backward(dy, x, weight, hidden, approximate, output_mask)
