"""The ops ``fastbert::bias_dropout_residual_layer_norm`` and its backward.

Without ``needs_backward`` a forward need not write what the backward would read: ``hidden``, ``mean`` and ``rstd`` are
then ``[0]``. The backward adds up two gradients of the output, in its dtype, where there is a second one, ``dy2``: in
BERT the output goes to the next product and to the next residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library
from fastbert.ops.formulas import compute_dtype


def _forward_fake(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    needs_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = x.new_empty(x.shape if needs_backward else (0,))
    mean = x.new_empty((*x.shape[:-1], 1) if needs_backward else (0,), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), hidden, mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    dy2: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    seed: Tensor | None,
    output_mask: list[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    dbias = hidden.new_empty(hidden.shape[-1])
    return hidden.new_empty(hidden.shape), *library.empty_where_masked(
        (hidden, dbias, weight, weight), (seed is not None, *output_mask)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, weight, _, _, ctx.p, seed, ctx.needs_backward, ctx.impl = inputs
    _, hidden, mean, rstd = output
    ctx.save_for_backward(hidden, weight, mean, rstd, seed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_backward:
        raise RuntimeError("bias_dropout_residual_layer_norm was called with needs_backward=False: nothing was saved")
    hidden, weight, mean, rstd, seed = ctx.saved_tensors
    needs_dx, needs_dbias, needs_dresidual, needs_dweight, needs_dln_bias = ctx.needs_input_grad[:5]
    mask = (needs_dbias, needs_dweight, needs_dln_bias)
    dresidual, dx, *parameters = torch.ops.fastbert.bias_dropout_residual_layer_norm_bwd(
        dy, None, hidden, weight, mean, rstd, ctx.p, seed, mask, ctx.impl
    )
    dbias, dweight, dln_bias = library.none_where_masked(parameters, mask)
    if seed is None:
        dx = dresidual
    return (
        dx if needs_dx else None,
        dbias,
        dresidual if needs_dresidual else None,
        dweight,
        dln_bias,
        None,
        None,
        None,
        None,
        None,
    )


library.define(
    "bias_dropout_residual_layer_norm",
    forward="(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, float p, Tensor? seed,"
    " bool needs_backward, str impl) -> (Tensor out, Tensor hidden, Tensor mean, Tensor rstd)",
    forward_fake=_forward_fake,
    backward="(Tensor dy, Tensor? dy2, Tensor hidden, Tensor weight, Tensor mean, Tensor rstd, float p, Tensor? seed,"
    " bool[3] output_mask, str impl)"
    " -> (Tensor dresidual, Tensor dx, Tensor dbias, Tensor dweight, Tensor dln_bias)",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
