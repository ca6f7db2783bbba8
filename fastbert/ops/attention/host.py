"""Attention on the host: one call of the extension for all sequences and heads.

In bfloat16 on processors with AMX ("amx"), in float32 with AVX2 or AVX-512 ("simd"). For each head of a sequence, keys
and values are packed once, in the order in which the products read them. Then a few queries at a time: their scores
(float32) stay in cache, the softmax is exact over all keys, and the probabilities, rounded to the dtype before the
division by their sum, multiply the values. The backward is that of PyTorch's kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import extension, host_linear, select
from fastbert.ops.attention import runs


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    rows, _, heads, size = qkv.shape
    qkv, cu_seqlens = extension.dense(qkv), extension.dense(cu_seqlens)
    out = qkv.new_empty(rows, heads, size)
    lse = qkv.new_empty(heads, rows, dtype=torch.float32)
    done = extension.module().attention_forward(
        extension.memory(qkv),
        extension.memory(cu_seqlens),
        extension.memory(out),
        extension.memory(lse),
        rows,
        cu_seqlens.shape[0] - 1,
        heads,
        size,
        max_seqlen,
        scale,
        host_linear.instructions(qkv.dtype),
        torch.get_num_threads(),
    )
    if not done:
        runs.find(cu_seqlens, max_seqlen, rows)  # raises
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
    dqkv: Tensor = select.load("attention", "sdpa").backward(
        dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, dropout_p, seed
    )
    return dqkv
