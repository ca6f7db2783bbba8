"""Embedding-LayerNorm with PyTorch's own kernels, in float32 for 16-bit tables.

``embedding_dense_backward`` adds up the gradients of repeated ids in a fixed order on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import philox
from fastbert.ops.formulas import compute_dtype

_aten = torch.ops.aten


def _lookup(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor
) -> Tensor:
    hidden = _aten.embedding(word, input_ids).to(compute_dtype(word.dtype))
    hidden += _aten.embedding(position, position_ids)
    hidden += _aten.embedding(token_type, token_type_ids)
    return hidden  # type: ignore[no-any-return]


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y ``[T, H]``, mean ``[T, 1]``, rstd ``[T, 1]``); ``padding_idx`` is -1 for none."""
    hidden = _lookup(input_ids, position_ids, token_type_ids, word, position, token_type)
    dtype = hidden.dtype
    y, mean, rstd = _aten.native_layer_norm(hidden, hidden.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return philox.hidden_dropout(y, p, seed).to(word.dtype), mean, rstd


def backward(
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
) -> tuple[Tensor, ...]:
    """(dword, dposition, dtoken_type, each of its table's shape, dweight ``[H]``, dbias ``[H]``).

    A gradient that ``output_mask`` leaves out is ``[0]``.
    """
    hidden = _lookup(input_ids, position_ids, token_type_ids, word, position, token_type)
    # The bias has no part in the gradients: the weight stands in for it.
    scale = weight.to(hidden.dtype)
    dhidden, dweight, dbias = _aten.native_layer_norm_backward(
        philox.hidden_dropout(dy.to(hidden.dtype), p, seed),
        hidden,
        hidden.shape[-1:],
        mean,
        rstd,
        scale,
        scale,
        (any(output_mask[:3]), *output_mask[3:]),
    )
    dtables = [
        _scatter(dhidden, ids, table, skipped) if wanted else table.new_empty(0)
        for table, ids, skipped, wanted in (
            (word, input_ids, padding_idx, output_mask[0]),
            (position, position_ids, -1, output_mask[1]),
            (token_type, token_type_ids, -1, output_mask[2]),
        )
    ]
    return (
        *dtables,
        dweight.to(weight.dtype) if output_mask[3] else weight.new_empty(0),
        dbias.to(weight.dtype) if output_mask[4] else weight.new_empty(0),
    )


def _scatter(dhidden: Tensor, ids: Tensor, table: Tensor, skipped: int) -> Tensor:
    """The gradient of a table, in its dtype: each row the sum of those of ``dhidden`` that looked it up."""
    rows = table.shape[0]
    if dhidden.dtype == table.dtype or not table.is_cpu or rows <= ids.numel():
        whole: Tensor = _aten.embedding_dense_backward(dhidden, ids, rows, skipped, False).to(table.dtype)
        return whole
    # Sums of 16 bits are made in float32: for the rows that occur, not in a copy of the whole table.
    found, places = torch.unique(ids, return_inverse=True)
    sums = _aten.embedding_dense_backward(dhidden, places, found.numel(), -1, False).to(table.dtype)
    dtable = table.new_zeros(table.shape).index_copy_(0, found.long(), sums)
    if skipped >= 0:
        dtable[skipped] = 0.0
    return dtable
