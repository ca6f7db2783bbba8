"""PyTorch's own flash attention for CUDA, on packed sequences (what ``torch.nn.attention.varlen`` calls).

Its dropout has masks of its own, so it isn't used with any. Its backward adds up dQ with atomics, and in a fixed order
where ``torch.use_deterministic_algorithms`` asks for that. It leaves the rows of no sequence as they are in fresh
memory; they are filled with zeros afterwards, one more pass over the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def _rows_of_no_sequence(cu_seqlens: Tensor, rows: int) -> Tensor:
    """bool ``[rows]``, without waiting for the device."""
    return torch.arange(rows, device=cu_seqlens.device) >= cu_seqlens[-1]


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    q, k, v = qkv.unbind(1)
    cu_seqlens = cu_seqlens.contiguous()
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False, scale=scale
    )
    spare = _rows_of_no_sequence(cu_seqlens, qkv.shape[0])
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
    q, k, v = qkv.unbind(1)
    cu_seqlens = cu_seqlens.contiguous()
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=qkv.device)  # the state of a generator that isn't used
    gradients = _aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False,
        no_dropout, no_dropout.new_empty(0), scale=scale,
    )  # fmt: skip
    dqkv = torch.stack(gradients, dim=1)
    return dqkv.masked_fill_(_rows_of_no_sequence(cu_seqlens, qkv.shape[0])[:, None, None, None], 0.0)
