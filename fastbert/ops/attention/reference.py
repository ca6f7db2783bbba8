"""The oracle of packed attention: plain eager PyTorch.

For each sequence and head, with ``m`` the keep mask of ``backends/philox.py`` (its position is sequence, head, query,
key) and ``s`` its ``attention_scale``, about 1 / (1 - p)::

    S = scale * Q Kᵀ        P = softmax(S) = exp(S - lse)        lse = log(sum over keys of exp(S))
    O = (s * m * P) V

    dV = (s * m * P)ᵀ dO        dP = s * m * (dO Vᵀ)        delta = sum over keys of P * dP
    dS = P * (dP - delta)        dQ = scale * dS K        dK = scale * dSᵀ Q

Attention: Vaswani et al., arXiv:1706.03762, section 3.2. The backward that recomputes P: Dao et al., arXiv:2205.14135,
appendix B.4; Dao, arXiv:2307.08691, section 3.1.2. There P comes from the log-sum-exp, and delta is the sum over D of
dO * O, because a row of P is never at hand as a whole. Here it is, and what is computed from it has smaller rounding
errors: those of exp(S - lse) grow with the scores.

The packed rows are gathered into ``[B, max_seqlen]`` by index arithmetic, so shapes are static and nothing waits for
the device. What the rows of no sequence hold is never read.

===========  ==========================================================================
computes in  float32 for 16-bit inputs, otherwise the dtype of ``qkv``
saves        O ``[T, A, D]``; lse ``[A, T]`` in the dtype of the computation, the tokens of a
             head next to each other; both are 0 in rows of no sequence
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import philox
from fastbert.ops.formulas import compute_dtype


class _Layout:
    """Where each packed row stands in ``[B, S]``, S = max_seqlen: ``index`` (T where there is none) and ``valid``."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, rows: int) -> None:
        self.rows = rows
        index = cu_seqlens[:-1, None].long() + torch.arange(max_seqlen, device=cu_seqlens.device)
        self.valid = index < cu_seqlens[1:, None]
        self.index = torch.where(self.valid, index, rows)

    def pad(self, x: Tensor) -> Tensor:
        """``[T, A, ...]`` -> ``[B, A, S, ...]``, zero where there is no token."""
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.index].transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """``[B, A, S, ...]`` -> ``[T, A, ...]``, zero in rows of no sequence."""
        packed = x.new_zeros(self.rows + 1, x.shape[1], *x.shape[3:])
        packed[self.index] = x.transpose(1, 2)
        return packed[: self.rows]


def _scores(q: Tensor, k: Tensor, valid: Tensor, scale: float) -> Tensor:
    """``[B, A, S, S]``; keys that are no tokens get the least number, not -inf, which alone in a row would be NaN."""
    return (scale * q @ k.transpose(-1, -2)).masked_fill(~valid[:, None, None, :], torch.finfo(q.dtype).min)


def _drop(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        return x
    batch, heads, queries, keys = x.shape
    sequence = torch.arange(batch, device=x.device)
    mask = philox.attention_mask(seed, sequence, heads, queries, keys, dropout_p)
    return torch.where(mask, x * philox.attention_scale(dropout_p), 0.0)


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``); ``seed`` is None when nothing is dropped."""
    layout = _Layout(cu_seqlens, max_seqlen, qkv.shape[0])
    q, k, v = (layout.pad(x) for x in qkv.to(compute_dtype(qkv.dtype)).unbind(1))
    scores = _scores(q, k, layout.valid, scale)
    out = _drop(torch.softmax(scores, -1), dropout_p, seed) @ v
    lse = torch.logsumexp(scores, -1)
    return layout.unpad(out).to(qkv.dtype), layout.unpad(lse).T.contiguous()


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
    layout = _Layout(cu_seqlens, max_seqlen, qkv.shape[0])
    dtype = compute_dtype(qkv.dtype)
    q, k, v = (layout.pad(x) for x in qkv.to(dtype).unbind(1))
    dout = layout.pad(dout.to(dtype))
    probabilities = torch.softmax(_scores(q, k, layout.valid, scale), -1)
    dv = _drop(probabilities, dropout_p, seed).transpose(-1, -2) @ dout
    dprobabilities = _drop(dout @ v.transpose(-1, -2), dropout_p, seed)
    delta = (probabilities * dprobabilities).sum(-1, keepdim=True)
    dscores = probabilities * (dprobabilities - delta)
    dq, dk = scale * dscores @ k, scale * dscores.transpose(-1, -2) @ q
    return torch.stack([layout.unpad(x) for x in (dq, dk, dv)], dim=1).to(qkv.dtype)
