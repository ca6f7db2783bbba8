"""PyTorch's flash attention for the CPU, once for each run of neighbouring sequences of one length.

Queries, keys and values are strided views of ``qkv``; no padding is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops.attention import runs
from fastbert.ops.formulas import compute_dtype

_aten = torch.ops.aten


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    rows, _, heads, size = qkv.shape
    found, used = runs.find(cu_seqlens, max_seqlen, rows)
    out = qkv.new_empty(rows, heads, size)
    lse = qkv.new_empty(heads, rows, dtype=compute_dtype(qkv.dtype))
    out[used:] = 0.0
    lse[:, used:] = 0.0
    parts = zip(runs.split(qkv.contiguous(), found), runs.split(out, found), runs.split(lse, found, dim=1), strict=True)
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
    found, used = runs.find(cu_seqlens, max_seqlen, qkv.shape[0])
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dqkv[used:] = 0.0
    parts = zip(
        *(runs.split(x, found) for x in (dqkv, dout.contiguous(), qkv.contiguous(), out)),
        runs.split(lse, found, dim=1),
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
