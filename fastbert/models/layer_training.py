"""A layer from its attention on, for training: one autograd function that keeps less than its parts, and costs less.

With ``qkv`` the queries, keys and values of the layer's input ``x``::

    context = attention(qkv)
    z1 = x + dropout(context Woᵀ + bo)        y1 = LayerNorm(z1)
    pre = y1 W1ᵀ + b1                         act = gelu(pre)
    z2 = y1 + dropout(act W2ᵀ + b2)           y2 = LayerNorm(z2)

One by one, these keep qkv, context, z1, y1, pre, act and z2 for their backward: with an intermediate size of 4 H, 15 H
elements a token. y1 and act are elementwise in z1 and pre: here they are computed again, and 10 H are kept. With x that
makes 11 H, 22 H bytes in 16 bits. Recomputing what is cheap: Chen et al., arXiv:1604.06174.

The two gradients of y1, from the product and from the residual, are added up inside the backward of the LayerNorm. Ops
are called without PyTorch's dispatcher, which takes a third of a millisecond a layer on a slow host.
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


class Attention(NamedTuple):
    """What attention takes beside queries, keys and values; see ``ops.attention``."""

    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    dropout_p: float
    seed: Tensor | None


class _Kernels(NamedTuple):
    """The implementations of the ops, chosen once for the forward and the backward."""

    attention: Any
    fused1: Any
    fused2: Any
    linear_gelu: Any
    bias_gelu: Any
    layer_norm: Any


class _Dtypes(NamedTuple):
    """Of the products, and of the residual stream, which under autocast may be wider."""

    product: torch.dtype
    hidden: torch.dtype


def from_attention(
    states: Tensor,
    x: Tensor,
    attention: Attention | None,
    parameters: Parameters,
    settings: Settings,
    seed1: Tensor | None,
    seed2: Tensor | None,
) -> Tensor:
    """y2 ``[T, H]`` of the formulas above, from ``x`` ``[T, H]`` and ``states``.

    These are qkv ``[T, 3, A, D]``; or, where ``attention`` is None, the context ``[T, H]`` that something else has
    computed. A seed is an int64 with one element; None draws one, where anything is dropped. Under autocast the
    products run in its dtype, as those of PyTorch do.
    """
    device = x.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
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
    if attention is None:
        attend, states = None, states.to(product)
    else:
        seed = checks.dropout_seed(attention.dropout_p, attention.seed, x.device)
        attention = attention._replace(seed=seed, dropout_p=0.0 if seed is None else attention.dropout_p)
        request = select.Request(device, states.dtype, attention.dropout_p, states.shape[3])
        attend = select.best("attention", request)
    kernels = _Kernels(
        attend,
        _best(_FUSED, x, dtypes.hidden, settings.p1),
        _best(_FUSED, x, dtypes.hidden, settings.p2),
        _best("linear_gelu", x, product),
        _best("bias_gelu", x, product),
        _best("layer_norm", x, dtypes.hidden),
    )
    seed1 = checks.dropout_seed(settings.p1, seed1, x.device)
    seed2 = checks.dropout_seed(settings.p2, seed2, x.device)
    # torch gives apply no types.
    y2: Tensor = _FromAttention.apply(
        states, x.to(dtypes.hidden), *tensors, seed1, seed2, attention, settings, dtypes, kernels
    )  # type: ignore[no-untyped-call]
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


class _FromAttention(torch.autograd.Function):
    # With the context as an argument: for a ``setup_context`` torch binds the arguments to their names at every call.
    @staticmethod
    def forward(ctx: Any, states: Tensor, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, seed1, seed2, attention, settings, dtypes, kernels = arguments
        p = Parameters(*tensors)
        with _on(x.device), torch.autocast(x.device.type, enabled=False):
            context, lse = states, None
            if attention is not None:
                context, lse = kernels.attention.forward(states, *attention)
                context = context.flatten(1)
            projected = F.linear(context.to(dtypes.product), p.out_weight).to(dtypes.hidden)
            y1, z1, mean1, rstd1 = kernels.fused1.forward(
                projected, p.out_bias, x, p.norm1_weight, p.norm1_bias, settings.eps1, settings.p1, seed1, True
            )
            act, pre = kernels.linear_gelu.forward(
                y1.to(dtypes.product), p.up_weight, p.up_bias, settings.approximate, True
            )
            projected = F.linear(act, p.down_weight).to(dtypes.hidden)
            y2: Tensor
            y2, z2, mean2, rstd2 = kernels.fused2.forward(
                projected, p.down_bias, y1, p.norm2_weight, p.norm2_bias, settings.eps2, settings.p2, seed2, True
            )
        ctx.attention, ctx.settings, ctx.dtypes, ctx.kernels = None, settings, dtypes, kernels
        cu_seqlens = seed = None
        if attention is not None:
            cu_seqlens, _, _, _, seed = attention
            # Of its tensors autograd is told, so that it sees whether they change.
            ctx.attention = attention._replace(cu_seqlens=None, seed=None)
        weights = (p.out_weight, p.norm1_weight, p.norm1_bias, p.up_weight, p.down_weight, p.norm2_weight)
        ctx.save_for_backward(
            states, None if attention is None else context, lse, cu_seqlens, seed, *weights, seed1, seed2,
            z1, mean1, rstd1, pre, z2, mean2, rstd2,
        )  # fmt: skip
        return y2

    # Kernels record nothing: without this a second derivative would be wrong instead of refused.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy2: Tensor) -> tuple[Tensor | None, ...]:
        (
            states, context, lse, cu_seqlens, seed,
            out_weight, norm1_weight, norm1_bias, up_weight, down_weight, norm2_weight, seed1, seed2,
            z1, mean1, rstd1, pre, z2, mean2, rstd2,
        ) = ctx.saved_tensors  # fmt: skip
        settings, (product, hidden), kernels = ctx.settings, ctx.dtypes, ctx.kernels
        needs_states, _, *rest = ctx.needs_input_grad
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
            attended = states if ctx.attention is None else context
            dout = dprojected.T @ attended.to(product) if needs.out_weight else None
            dstates: Tensor | None = dprojected @ out_weight if needs_states else None
            if dstates is not None and ctx.attention is not None:
                _, max_seqlen, scale, dropout_p, _ = ctx.attention
                shape = (states.shape[0], *states.shape[2:])
                dstates = kernels.attention.backward(
                    dstates.to(states.dtype).view(shape), states, context.view(shape), lse, cu_seqlens, max_seqlen,
                    scale, dropout_p, seed,
                )  # fmt: skip
        gradients = (dout, *grads1, dup, dup_bias, ddown, *grads2)
        wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return dstates, dx, *wanted, None, None, None, None, None, None
