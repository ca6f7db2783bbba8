"""The ops ``fastbert::bias_dropout_residual`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library


def _forward_fake(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, seed: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, p: float, seed: Tensor | None, has_bias: bool, impl: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[-1] if has_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, ctx.p, seed, ctx.impl = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(seed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    needs_dx, needs_dbias, needs_dresidual = ctx.needs_input_grad[:3]
    dx = dbias = None
    if needs_dbias or (needs_dx and seed is not None):
        dx, dbias = torch.ops.fastbert.bias_dropout_residual_bwd(dy, ctx.p, seed, needs_dbias, ctx.impl)
    elif needs_dx:
        dx = dy
    return dx if needs_dx else None, dbias if needs_dbias else None, dy if needs_dresidual else None, None, None, None


library.define(
    "bias_dropout_residual",
    forward="(Tensor x, Tensor? bias, Tensor residual, float p, Tensor? seed, str impl) -> Tensor",
    forward_fake=_forward_fake,
    backward="(Tensor dy, float p, Tensor? seed, bool has_bias, str impl) -> (Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
