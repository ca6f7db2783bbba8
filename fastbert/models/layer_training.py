"""A layer in training: one autograd function that keeps less than its parts, and costs less.

With ``x`` the layer's input::

    qkv = x Wqkvᵀ + bqkv                      context = attention(qkv)
    z1 = x + dropout(context Woᵀ + bo)        y1 = LayerNorm(z1)
    pre = y1 W1ᵀ + b1                         act = gelu(pre)
    z2 = y1 + dropout(act W2ᵀ + b2)           y2 = LayerNorm(z2)

One by one, these keep x, qkv, context, z1, y1, pre, act and z2 for their backward: with an intermediate size of 4 H,
16 H elements a token. y1 and act are elementwise in z1 and pre: here they are computed again, and 11 H are kept, 22 H
bytes in 16 bits. Recomputing what is cheap: Chen et al., arXiv:1604.06174.

The two gradients of y1, from the product and from the residual, are added up inside the backward of the LayerNorm, and
those of x inside a product. Ops are called without PyTorch's dispatcher, which takes a third of a millisecond a layer
on a slow host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """How queries, keys and values are made of x, and what attention takes beside them (see ``ops.attention``).

    ``weights`` and ``biases`` are those of query, key and value, or one of all three; without biases there are none.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    head_size: int
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
    layer_norm: Any


class _Dtypes(NamedTuple):
    """Of the products, and of the residual stream, which under autocast may be wider."""

    product: torch.dtype
    hidden: torch.dtype


def layer(
    x: Tensor,
    attention: Attention | Tensor,
    parameters: Parameters,
    settings: Settings,
    seed1: Tensor | None,
    seed2: Tensor | None,
) -> Tensor:
    """y2 ``[T, H]`` of the formulas above, from ``x`` ``[T, H]``.

    In place of ``attention`` its result may be given: a context ``[T, H]`` that something else has computed. A seed is
    an int64 with one element; None draws one, where anything is dropped. Under autocast the products run in its dtype,
    as those of PyTorch do.
    """
    device = x.device.type
    states = attention if isinstance(attention, Tensor) else attention.weights[0]
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
    tensors = [tensor if tensor is None else _cast(tensor, dtype) for tensor, dtype in zip(p, casts, strict=True)]
    given: list[Tensor] = []
    attend = call = None
    if isinstance(attention, Tensor):
        given.append(_cast(attention, product))
    else:
        given += [_cast(tensor, product) for tensor in (*attention.weights, *attention.biases)]
        seed = checks.dropout_seed(attention.dropout_p, attention.seed, x.device)
        dropout_p = 0.0 if seed is None else attention.dropout_p
        # The tensors to be differentiated are arguments of their own.
        call = attention._replace(weights=(), biases=(), seed=seed, dropout_p=dropout_p)
        attend = select.best("attention", select.Request(device, product, dropout_p, attention.head_size))
    kernels = _Kernels(
        attend,
        _best(_FUSED, x, dtypes.hidden, settings.p1),
        _best(_FUSED, x, dtypes.hidden, settings.p2),
        _best("linear_gelu", x, product),
        _best("layer_norm", x, dtypes.hidden),
    )
    seed1 = checks.dropout_seed(settings.p1, seed1, x.device)
    seed2 = checks.dropout_seed(settings.p2, seed2, x.device)
    # torch gives apply no types.
    y2: Tensor = _Layer.apply(_cast(x, dtypes.hidden), call, settings, dtypes, kernels, seed1, seed2, *tensors, *given)  # type: ignore[no-untyped-call]
    return y2


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0]


def _best(op: str, x: Tensor, dtype: torch.dtype, p: float = 0.0) -> Any:
    """The implementation of ``op``: called without PyTorch's dispatcher, since what is differentiated is the whole."""
    return select.best(op, select.Request(x.device.type, dtype, p, index=x.device.index))


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What is launched goes to ``device``, and implementations are chosen by its facts."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


_FUSED = "bias_dropout_residual_layer_norm"


# The arguments of the function below that come before the parameters.
_FIRST = 7


class _Layer(torch.autograd.Function):
    # With the context as an argument: for a ``setup_context`` torch binds the arguments to their names at every call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Attention | None, *arguments: Any) -> Tensor:
        settings, dtypes, kernels, seed1, seed2, *tensors = arguments
        p = Parameters(*tensors[: len(Parameters._fields)])
        given = tensors[len(Parameters._fields) :]
        with _on(x.device), torch.autocast(x.device.type, enabled=False):
            qkv = lse = cu_seqlens = seed = None
            if call is None:
                (context,) = given
            else:
                many = 3 if len(given) >= 3 else 1
                weight = _joined(given[:many])
                bias = _joined(given[many:]) if len(given) > many else None
                qkv = F.linear(_cast(x, dtypes.product), weight, bias)
                qkv = qkv.view(qkv.shape[0], 3, qkv.shape[1] // (3 * call.head_size), call.head_size)
                cu_seqlens, seed = call.cu_seqlens, call.seed
                context, lse = kernels.attention.forward(
                    qkv, cu_seqlens, call.max_seqlen, call.scale, call.dropout_p, seed
                )
                context = context.flatten(1)
            projected = _cast(F.linear(context, p.out_weight), dtypes.hidden)
            y1, z1, mean1, rstd1 = kernels.fused1.forward(
                projected, p.out_bias, x, p.norm1_weight, p.norm1_bias, settings.eps1, settings.p1, seed1, True
            )
            act, pre = kernels.linear_gelu.forward(
                _cast(y1, dtypes.product), p.up_weight, p.up_bias, settings.approximate, True
            )
            projected = _cast(F.linear(act, p.down_weight), dtypes.hidden)
            y2: Tensor
            y2, z2, mean2, rstd2 = kernels.fused2.forward(
                projected, p.down_bias, y1, p.norm2_weight, p.norm2_bias, settings.eps2, settings.p2, seed2, True
            )
        ctx.numbers = None if call is None else (call.max_seqlen, call.scale, call.dropout_p)
        ctx.settings, ctx.dtypes, ctx.kernels = settings, dtypes, kernels
        made = (qkv, context, lse, z1, mean1, rstd1, pre, z2, mean2, rstd2)
        ctx.save_for_backward(cu_seqlens, seed, seed1, seed2, *made, x, *tensors)
        return y2

    @staticmethod
    def backward(ctx: Any, dy2: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, saved, dy2)
        if torch.is_grad_enabled():
            # Kernels record nothing: without this a second derivative would be wrong instead of refused.
            given = [x for x in (dy2, *saved) if x is not None and x.requires_grad]
            once: Any = _Once.apply
            found = iter(once(len(given), *given, *(x for x in gradients if x is not None)))
            gradients = tuple(None if x is None else next(found) for x in gradients)
        return gradients


class _Once(torch.autograd.Function):
    """Gradients as they are, which depend on ``count`` tensors in a way that can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("a fused layer has no second derivative: its backward can't be differentiated")


def _gradients(ctx: Any, saved: tuple[Any, ...], dy2: Tensor) -> tuple[Tensor | None, ...]:
    """Of every argument of ``_Layer``, None where it needs none."""
    (
        cu_seqlens, seed, seed1, seed2, qkv, context, lse, z1, mean1, rstd1, pre, z2, mean2, rstd2, x, *tensors,
    ) = saved  # fmt: skip
    settings, (product, hidden), kernels = ctx.settings, ctx.dtypes, ctx.kernels
    p, given = Parameters(*tensors[: len(Parameters._fields)]), tensors[len(Parameters._fields) :]
    needed = ctx.needs_input_grad
    needs_x, rest = needed[0], needed[_FIRST:]
    needs = Parameters(*rest[: len(Parameters._fields)])
    needs_given = rest[len(Parameters._fields) :]
    with _on(z1.device), torch.autocast(z1.device.type, enabled=False):
        dresidual, dprojected, *grads2 = kernels.fused2.backward(
            dy2, None, z2, p.norm2_weight, mean2, rstd2, settings.p2, seed2,
            [needs.down_bias, needs.norm2_weight, needs.norm2_bias],
        )  # fmt: skip
        dprojected = _cast(dresidual if seed2 is None else dprojected, product)
        dact = dprojected @ p.down_weight
        # Only its shape counts where the weight needs no gradient.
        y1 = z1
        if needs.up_weight:
            y1, *_ = kernels.layer_norm.forward(z1, p.norm1_weight, p.norm1_bias, settings.eps1)
        arguments = (dact, _cast(y1, product), p.up_weight, pre, settings.approximate)
        mask, ddown = [True, needs.up_weight, needs.up_bias], None
        if needs.down_weight:
            act, dy1, dup, dup_bias = kernels.linear_gelu.backward_with_output(*arguments, mask)
            ddown = dprojected.T @ act
            del act
        else:
            dy1, dup, dup_bias = kernels.linear_gelu.backward(*arguments, mask)
        del dact, y1, dprojected, arguments
        dx, dprojected, *grads1 = kernels.fused1.backward(
            _cast(dy1, hidden), dresidual, z1, p.norm1_weight, mean1, rstd1, settings.p1, seed1,
            [needs.out_bias, needs.norm1_weight, needs.norm1_bias],
        )  # fmt: skip
        dprojected = _cast(dx if seed1 is None else dprojected, product)
        dout = dprojected.T @ context if needs.out_weight else None
        dgiven: list[Tensor | None] = [None] * len(needs_given)
        if ctx.numbers is None:
            if needs_given[0]:
                dgiven[0] = dprojected @ p.out_weight
        elif needs_x or any(needs_given):
            max_seqlen, scale, dropout_p = ctx.numbers
            shape = (qkv.shape[0], *qkv.shape[2:])
            dqkv = kernels.attention.backward(
                (dprojected @ p.out_weight).view(shape), qkv, context.view(shape), lse, cu_seqlens, max_seqlen, scale,
                dropout_p, seed,
            ).flatten(1)  # fmt: skip
            many = 3 if len(needs_given) >= 3 else 1
            if any(needs_given[:many]):
                dgiven[:many] = (dqkv.T @ _cast(x, product)).chunk(many)
            if any(needs_given[many:]):
                dgiven[many:] = dqkv.sum(0).chunk(many)
            if needs_x:
                weight = _joined(given[:many])
                dx = torch.addmm(dx, dqkv, weight) if hidden == product else dx + (dqkv @ weight).to(hidden)
    gradients = (dout, *grads1, dup, dup_bias, ddown, *grads2, *dgiven)
    wanted = (gradient if need else None for gradient, need in zip(gradients, rest, strict=True))
    return dx if needs_x else None, *(None,) * (_FIRST - 1), *wanted
