"""The ops ``fastbert::bias_gelu`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library


def _forward_fake(x: Tensor, bias: Tensor, approximate: str, impl: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    dy: Tensor, x: Tensor, bias: Tensor, approximate: str, output_mask: list[bool], impl: str
) -> tuple[Tensor, ...]:
    return library.empty_where_masked((x, bias), output_mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mask = ctx.needs_input_grad[:2]
    gradients = torch.ops.fastbert.bias_gelu_bwd(dy, *ctx.saved_tensors, ctx.approximate, mask, ctx.impl)
    return *library.none_where_masked(gradients, mask), None, None


library.define(
    "bias_gelu",
    forward="(Tensor x, Tensor bias, str approximate, str impl) -> Tensor",
    forward_fake=_forward_fake,
    backward="(Tensor dy, Tensor x, Tensor bias, str approximate, bool[2] output_mask, str impl)"
    " -> (Tensor dx, Tensor dbias)",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
