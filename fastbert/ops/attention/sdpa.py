"""PyTorch's flash attention for the CPU, once for each run of neighbouring sequences of one length.

Queries, keys and values are strided views of ``qkv``; no padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from fastbert.ops.formulas import compute_dtype

_aten = torch.ops.aten


def _runs(cu_seqlens: Tensor, max_seqlen: int, rows: int) -> tuple[list[tuple[int, int, int]], int]:
    """The runs, each (first row, number of sequences, their length), and the number of rows that they cover."""
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] > rows or any(not 0 <= length <= max_seqlen for length in lengths):
        raise ValueError(
            f"cu_seqlens is {offsets}; it must ascend from 0 to at most {rows}, the rows of qkv, "
            f"in steps of at most {max_seqlen}, which is max_seqlen"
        )
    runs = []
    start = 0
    for length, sequences in groupby(lengths):
        count = sum(1 for _ in sequences)
        if length > 0:
            runs.append((start, count, length))
        start += count * length
    return runs, start


def _split(x: Tensor, runs: list[tuple[int, int, int]], dim: int = 0) -> Iterator[Tensor]:
    """The part of each run of a packed tensor, with its dimension T replaced by (count, length): views."""
    for start, count, length in runs:
        yield torch.unflatten(x.narrow(dim, start, count * length), dim, (count, length))


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    rows, _, heads, size = qkv.shape
    runs, used = _runs(cu_seqlens, max_seqlen, rows)
    out = qkv.new_empty(rows, heads, size)
    lse = qkv.new_empty(heads, rows, dtype=compute_dtype(qkv.dtype))
    out[used:] = 0.0
    lse[:, used:] = 0.0
    parts = zip(_split(qkv.contiguous(), runs), _split(out, runs), _split(lse, runs, dim=1), strict=True)
    for qkv_part, out_part, lse_part in parts:
        # [count, length, 3, A, D] -> 3 x [count, A, length, D]
        q, k, v = qkv_part.permute(2, 0, 3, 1, 4).unbind(0)
        attended, log_sum_exp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        out_part.copy_(attended.transpose(1, 2))
        lse_part.copy_(log_sum_exp.transpose(0, 1))
    return out, lse


def backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """dqkv ``[T, 3, A, D]``."""
    runs, used = _runs(cu_seqlens, max_seqlen, qkv.shape[0])
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dqkv[used:] = 0.0
    parts = zip(
        *(_split(x, runs) for x in (dqkv, dout.contiguous(), qkv.contiguous(), out)),
        _split(lse, runs, dim=1),
        strict=True,
    )
    for dqkv_part, dout_part, qkv_part, out_part, lse_part in parts:
        q, k, v = qkv_part.permute(2, 0, 3, 1, 4).unbind(0)
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_part.transpose(1, 2),
            q,
            k,
            v,
            out_part.transpose(1, 2),
            lse_part.transpose(0, 1),
            0.0,
            False,
            scale=scale,
        )
        for index, gradient in enumerate(gradients):
            dqkv_part[:, :, index].copy_(gradient.transpose(1, 2))
    return dqkv
