"""A layer from the output of its attention on, for training: one autograd function that keeps less than its parts.

With ``context`` the output of attention and ``x`` the layer's input::

    z1 = x + dropout(context Woᵀ + bo)        y1 = LayerNorm(z1)
    pre = y1 W1ᵀ + b1                         act = gelu(pre)
    z2 = y1 + dropout(act W2ᵀ + b2)           y2 = LayerNorm(z2)

One by one, these keep context, z1, y1, pre, act and z2 for their backward: with an intermediate size of 4 H, 12 H
elements a token. y1 and act are elementwise in z1 and pre: here they are computed again, and 7 H are kept. With x and
the layer's queries, keys and values that makes 11 H, 22 H bytes in 16 bits. Recomputing what is cheap: Chen et al.,
arXiv:1604.06174.

The two gradients of y1, from the product and from the residual, are added up inside the backward of the LayerNorm.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import ops  # noqa: F401  registers the ops
from fastbert.backends import checks, select


class Parameters(NamedTuple):
    """The weights and biases of the three products and two LayerNorms; a product's bias may be None."""

    out_weight: Tensor
    out_bias: Tensor | None
    norm1_weight: Tensor
    norm1_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor


class Settings(NamedTuple):
    """What isn't a tensor; ``p1`` and ``p2`` are the probabilities of the two dropouts."""

    eps1: float
    p1: float
    eps2: float
    p2: float
    approximate: str


class _Kernels(NamedTuple):
    """The implementations of the ops, chosen once for the forward and the backward."""

    fused1: Any
    fused2: Any
    linear_gelu: Any
    bias_gelu: Any
    layer_norm: Any


class _Dtypes(NamedTuple):
    """Of the products, and of the residual stream, which under autocast may be wider."""

    product: torch.dtype
    hidden: torch.dtype


def after_attention(
    context: Tensor,
    x: Tensor,
    parameters: Parameters,
    settings: Settings,
    seed1: Tensor | None,
    seed2: Tensor | None,
) -> Tensor:
    """y2 ``[T, H]`` of the formulas above, from ``context`` and ``x`` ``[T, H]``.

    A seed is an int64 with one element; None draws one, where anything is dropped. Under autocast the products run in
    its dtype, as those of PyTorch do.
    """
    device = context.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else context.dtype
    dtypes = _Dtypes(product, torch.promote_types(product, x.dtype))
    p = parameters
    norms = [
        torch.promote_types(weight.dtype, bias.dtype)
        for weight, bias in ((p.norm1_weight, p.norm1_bias), (p.norm2_weight, p.norm2_bias))
    ]
    casts = (
        product, dtypes.hidden, norms[0], norms[0], product, product, product, dtypes.hidden, norms[1], norms[1],
    )  # fmt: skip
    tensors = [
        tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
        for tensor, dtype in zip(p, casts, strict=True)
    ]
    kernels = _Kernels(
        _best(_FUSED, x, dtypes.hidden, settings.p1),
        _best(_FUSED, x, dtypes.hidden, settings.p2),
        _best("linear_gelu", x, product),
        _best("bias_gelu", x, product),
        _best("layer_norm", x, dtypes.hidden),
    )
    seed1 = checks.dropout_seed(settings.p1, seed1, x.device)
    seed2 = checks.dropout_seed(settings.p2, seed2, x.device)
    # torch gives apply no types.
    y2: Tensor = _AfterAttention.apply(
        context.to(product), x.to(dtypes.hidden), *tensors, seed1, seed2, settings, dtypes, kernels
    )[0]  # type: ignore[no-untyped-call]
    return y2


def _best(op: str, x: Tensor, dtype: torch.dtype, p: float = 0.0) -> Any:
    """The implementation of ``op``: called without PyTorch's dispatcher, since what is differentiated is the whole."""
    return select.best(op, select.Request(x.device.type, dtype, p, index=x.device.index))


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is launched goes to ``device``, and implementations are chosen by its facts."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


_FUSED = "bias_dropout_residual_layer_norm"


class _AfterAttention(torch.autograd.Function):
    """The results after the first are what the backward needs."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        context, x, *tensors, seed1, seed2, settings, dtypes, kernels = arguments
        p = Parameters(*tensors)
        with _on(x.device), torch.autocast(x.device.type, enabled=False):
            projected = F.linear(context, p.out_weight).to(dtypes.hidden)
            y1, z1, mean1, rstd1 = kernels.fused1.forward(
                projected, p.out_bias, x, p.norm1_weight, p.norm1_bias, settings.eps1, settings.p1, seed1, True
            )
            act, pre = kernels.linear_gelu.forward(
                y1.to(dtypes.product), p.up_weight, p.up_bias, settings.approximate, True
            )
            projected = F.linear(act, p.down_weight).to(dtypes.hidden)
            y2, z2, mean2, rstd2 = kernels.fused2.forward(
                projected, p.down_bias, y1, p.norm2_weight, p.norm2_bias, settings.eps2, settings.p2, seed2, True
            )
        return y2, z1, mean1, rstd1, pre, z2, mean2, rstd2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        context, _, *tensors, seed1, seed2, ctx.settings, ctx.dtypes, ctx.kernels = inputs
        p = Parameters(*tensors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        weights = (p.out_weight, p.norm1_weight, p.norm1_bias, p.up_weight, p.down_weight, p.norm2_weight)
        ctx.save_for_backward(context, *weights, seed1, seed2, *output[1:])

    # Kernels record nothing: without this a second derivative would be wrong instead of refused.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy2: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy2 is None:
            return (None,) * len(ctx.needs_input_grad)
        (
            context, out_weight, norm1_weight, norm1_bias, up_weight, down_weight, norm2_weight, seed1, seed2,
            z1, mean1, rstd1, pre, z2, mean2, rstd2,
        ) = ctx.saved_tensors  # fmt: skip
        settings, (product, hidden), kernels = ctx.settings, ctx.dtypes, ctx.kernels
        needs_context, _, *rest = ctx.needs_input_grad
        needs = Parameters(*rest[: len(Parameters._fields)])
        with _on(z1.device), torch.autocast(z1.device.type, enabled=False):
            dresidual, dprojected, *grads2 = kernels.fused2.backward(
                dy2, None, z2, norm2_weight, mean2, rstd2, settings.p2, seed2,
                [needs.down_bias, needs.norm2_weight, needs.norm2_bias],
            )  # fmt: skip
            dprojected = (dresidual if seed2 is None else dprojected).to(product)
            ddown = None
            if needs.down_weight:
                ddown = dprojected.T @ kernels.bias_gelu.forward(pre, None, settings.approximate)
            dact = dprojected @ down_weight
            # Only its shape counts where the weight needs no gradient.
            y1 = z1
            if needs.up_weight:
                y1, *_ = kernels.layer_norm.forward(z1, norm1_weight, norm1_bias, settings.eps1)
            dy1, dup, dup_bias = kernels.linear_gelu.backward(
                dact, y1.to(product), up_weight, pre, settings.approximate, [True, needs.up_weight, needs.up_bias]
            )
            del dact, y1, dprojected
            dx, dprojected, *grads1 = kernels.fused1.backward(
                dy1.to(hidden), dresidual, z1, norm1_weight, mean1, rstd1, settings.p1, seed1,
                [needs.out_bias, needs.norm1_weight, needs.norm1_bias],
            )  # fmt: skip
            dprojected = (dx if seed1 is None else dprojected).to(product)
            dout = dprojected.T @ context if needs.out_weight else None
            dcontext = dprojected @ out_weight if needs_context else None
        gradients = (dout, *grads1, dup, dup_bias, ddown, *grads2)
        wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return dcontext, dx, *wanted, None, None, None, None, None
