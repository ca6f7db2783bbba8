"""The ops ``fastbert::embedding_layer_norm`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library
from fastbert.ops.formulas import compute_dtype


def _forward_fake(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    padding_idx: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = word.new_empty(input_ids.shape[0], 1, dtype=compute_dtype(word.dtype))
    return word.new_empty(input_ids.shape[0], word.shape[1]), mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    seed: Tensor | None,
    padding_idx: int,
    output_mask: list[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    return library.empty_where_masked((word, position, token_type, weight, weight), output_mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.p, seed, ctx.padding_idx, ctx.impl = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd, seed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    mask = ctx.needs_input_grad[3:8]
    gradients = torch.ops.fastbert.embedding_layer_norm_bwd(dy, *tensors, ctx.p, seed, ctx.padding_idx, mask, ctx.impl)
    return None, None, None, *library.none_where_masked(gradients, mask), None, None, None, None, None


_IDS_AND_TABLES = (
    "Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, Tensor token_type"
)
library.define(
    "embedding_layer_norm",
    forward=f"({_IDS_AND_TABLES}, Tensor weight, Tensor bias, float eps, float p, Tensor? seed, int padding_idx,"
    " str impl) -> (Tensor out, Tensor mean, Tensor rstd)",
    forward_fake=_forward_fake,
    backward=f"(Tensor dy, {_IDS_AND_TABLES}, Tensor weight, Tensor mean, Tensor rstd, float p, Tensor? seed,"
    " int padding_idx, bool[5] output_mask, str impl)"
    " -> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
