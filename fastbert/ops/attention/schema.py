"""The ops ``fastbert::attention`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.backends import library
from fastbert.ops.formulas import compute_dtype


def _forward_fake(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, size = qkv.shape
    return qkv.new_empty(rows, heads, size), qkv.new_empty(heads, rows, dtype=compute_dtype(qkv.dtype))


def _backward_fake(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    impl: str,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.dropout_p, seed, ctx.impl = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    dqkv = torch.ops.fastbert.attention_bwd(dout, *tensors, ctx.max_seqlen, ctx.scale, ctx.dropout_p, seed, ctx.impl)
    return dqkv, None, None, None, None, None, None


library.define(
    "attention",
    forward="(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed, str impl)"
    " -> (Tensor out, Tensor lse)",
    forward_fake=_forward_fake,
    backward="(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale,"
    " float dropout_p, Tensor? seed, str impl) -> Tensor",
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
