"""The ops ``fastbert::layer_norm`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library
from fastbert.ops.formulas import compute_dtype


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: list[bool], impl: str
) -> tuple[Tensor, ...]:
    return library.empty_where_masked((x, weight, weight), output_mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.impl = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mask = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastbert.layer_norm_bwd(dy, *ctx.saved_tensors, mask, ctx.impl)
    return *library.none_where_masked(gradients, mask), None, None


library.define(
    "layer_norm",
    forward="(Tensor x, Tensor weight, Tensor bias, float eps, str impl) -> (Tensor out, Tensor mean, Tensor rstd)",
    forward_fake=_forward_fake,
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[3] output_mask, str impl)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
