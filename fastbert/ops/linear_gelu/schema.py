"""The ops ``fastbert::linear_gelu`` and its backward.

``needs_hidden`` says that a gradient will be wanted; without it the second result is empty and nothing stores it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool, impl: str
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if needs_hidden else (0,))


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool], impl: str
) -> tuple[Tensor, ...]:
    return library.empty_where_masked((x, weight, weight.new_empty(weight.shape[0])), output_mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.approximate, ctx.needs_hidden, ctx.impl = inputs
    _, hidden = output
    ctx.save_for_backward(x, weight, hidden)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_hidden:
        raise RuntimeError("fastbert::linear_gelu ran with needs_hidden=False, and its gradient needs it")
    mask = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastbert.linear_gelu_bwd(dy, *ctx.saved_tensors, ctx.approximate, mask, ctx.impl)
    return *library.none_where_masked(gradients, mask), None, None, None


library.define(
    "linear_gelu",
    forward="(Tensor x, Tensor weight, Tensor? bias, str approximate, bool needs_hidden, str impl)"
    " -> (Tensor out, Tensor hidden)",
    forward_fake=_forward_fake,
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor hidden, str approximate, bool[3] output_mask, str impl)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
