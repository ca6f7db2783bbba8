"""The package flash-attn (Dao, arXiv:2307.08691), version 2.7 or later, on packed sequences.

Its dropout has masks of its own, so it isn't used with any. Its backward is asked for a fixed order of all sums. Rows
of no sequence are zeros, in memory that is cleared beforehand or in one more pass over the results.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_interface
from torch import Tensor


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    q, k, v = qkv.unbind(1)
    cu_seqlens = cu_seqlens.contiguous()
    out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p=0.0, softmax_scale=scale, causal=False
    )
    spare = torch.arange(qkv.shape[0], device=qkv.device) >= cu_seqlens[-1]  # without waiting for the device
    return out.masked_fill_(spare[:, None, None], 0.0), lse.masked_fill_(spare, 0.0)


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
    cu_seqlens = cu_seqlens.contiguous()
    dqkv = torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    flash_attn_interface._flash_attn_varlen_backward(
        dout.contiguous(), *qkv.unbind(1), out, lse, *dqkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    return dqkv
