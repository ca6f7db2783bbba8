"""Attention with dropout on the CPU: products for each run of neighbouring sequences of one length.

The probabilities of one run at a time are in memory, in float32. The compiled extension drops them in place, with the
masks of ``backends/philox.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import extension, philox
from fastbert.ops.attention import runs

# Probabilities in memory at a time, unless one sequence has more: 64 MiB.
_MOST = 1 << 24


def _find(cu_seqlens: Tensor, max_seqlen: int, rows: int, heads: int) -> tuple[list[runs.Run], int]:
    """The runs, cut so that each has a bounded number of probabilities, and the number of rows that they cover."""
    found, used = runs.find(cu_seqlens, max_seqlen, rows)
    cut = []
    for row, sequence, count, length in found:
        step = max(1, _MOST // (heads * length * length))
        for first in range(0, count, step):
            cut.append(runs.Run(row + first * length, sequence + first, min(step, count - first), length))
    return cut, used


def _drop(probabilities: Tensor, run: runs.Run, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Drop float32 ``[N, A, S, S]``, contiguous, in place."""
    if seed is not None:
        _, heads, queries, keys = probabilities.shape
        extension.module().attention_dropout_host(
            extension.memory(probabilities),
            run.first_sequence,
            run.sequences,
            heads,
            queries,
            keys,
            extension.memory(seed),
            philox.attention_threshold(dropout_p),
            philox.attention_scale(dropout_p),
            torch.get_num_threads(),
        )
    return probabilities


def _heads_first(part: Tensor) -> Tensor:
    """``[N, S, ..., A, D]`` -> ``[..., N, A, S, D]`` in float32."""
    return part.movedim((0, 1), (-4, -2)).float()


def _softmax(scores: Tensor, log_sum_exp: Tensor) -> Tensor:
    """Softmax in place. The division takes back the rounding error of ``log_sum_exp``, which grows with the scores."""
    probabilities = scores.sub_(log_sum_exp.unsqueeze(-1)).exp_()
    return probabilities.div_(probabilities.sum(-1, keepdim=True))


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    rows, _, heads, size = qkv.shape
    found, used = _find(cu_seqlens, max_seqlen, rows, heads)
    out = qkv.new_empty(rows, heads, size)
    lse = qkv.new_empty(heads, rows, dtype=torch.float32)
    out[used:] = 0.0
    lse[:, used:] = 0.0
    parts = zip(found, *(runs.split(x, found) for x in (qkv, out)), runs.split(lse, found, dim=1), strict=True)
    for run, qkv_part, out_part, lse_part in parts:
        q, k, v = _heads_first(qkv_part)
        scores = (q * scale) @ k.transpose(-1, -2)
        log_sum_exp = torch.logsumexp(scores, -1)
        lse_part.copy_(log_sum_exp.transpose(0, 1))
        attended = _drop(_softmax(scores, log_sum_exp), run, dropout_p, seed) @ v
        out_part.copy_(attended.transpose(1, 2))
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
    found, used = _find(cu_seqlens, max_seqlen, qkv.shape[0], qkv.shape[2])
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dqkv[used:] = 0.0
    parts = zip(
        found,
        *(runs.split(x, found) for x in (dqkv, dout, qkv)),
        runs.split(lse, found, dim=1),
        strict=True,
    )
    for run, dqkv_part, dout_part, qkv_part, lse_part in parts:
        q, k, v = _heads_first(qkv_part)
        grad = _heads_first(dout_part)
        scores = (q * scale) @ k.transpose(-1, -2)
        probabilities = _softmax(scores, lse_part.transpose(0, 1))
        dprobabilities = _drop(grad @ v.transpose(-1, -2), run, dropout_p, seed)
        delta = (probabilities * dprobabilities).sum(-1, keepdim=True)
        dscores = dprobabilities.sub_(delta).mul_(probabilities).mul_(scale)
        dv = _drop(probabilities, run, dropout_p, seed).transpose(-1, -2) @ grad
        for index, gradient in enumerate((dscores @ k, dscores.transpose(-1, -2) @ q, dv)):
            dqkv_part[:, :, index].copy_(gradient.transpose(1, 2))
    return dqkv
