"""PyTorch's flash attention for the CPU, once for each run of neighbouring sequences of one length.

Queries, keys and values are strided views of ``qkv``; no padding is computed, but for a few keys in the forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.attention import runs
from fastbert.ops.formulas import compute_dtype

_aten = torch.ops.aten

# The kernel takes the exponentials of the keys beyond the last multiple of _VECTOR one by one: with AVX-512 and
# bfloat16, 127 keys take 0.47 ms and 128 take 0.21 ms. In 16 bits, from _SHORT keys and _TAIL such on, it is faster to
# add keys that a mask hides. (In float32 the copies cost as much as they save.)
_VECTOR = 16
_SHORT = 32
_TAIL = 4


def _whole_vectors(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values ``[N, A, S, D]`` with hidden ones behind them, and the mask that hides these (None: none)."""
    length = k.shape[2]
    if k.itemsize > 2 or length < _SHORT or length % _VECTOR < _TAIL:
        return k, v, None
    hidden = -length % _VECTOR
    mask = k.new_zeros(length + hidden)
    mask[length:] = float("-inf")
    return F.pad(k, (0, 0, 0, hidden)), F.pad(v, (0, 0, 0, hidden)), mask.expand(*k.shape[:3], -1)


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    rows, _, heads, size = qkv.shape
    found, used = runs.find(cu_seqlens, max_seqlen, rows)
    outs, lses = [], []
    for part in runs.split(qkv.contiguous(), found):
        # [count, length, 3, A, D] -> 3 x [count, A, length, D]
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
        k, v, mask = _whole_vectors(k, v)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1))
    outs.append(qkv.new_zeros(rows - used, heads, size))
    lses.append(qkv.new_zeros(heads, rows - used, dtype=compute_dtype(qkv.dtype)))
    return torch.cat(outs), torch.cat(lses, dim=1)


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
    """dqkv ``[T, 3, A, D]``, computed in float32: the kernel's backward in 16 bits takes twice as long."""
    found, used = runs.find(cu_seqlens, max_seqlen, qkv.shape[0])
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dqkv[used:] = 0.0
    parts = zip(
        runs.split(dqkv, found),
        *(runs.split(x.to(lse.dtype).contiguous(), found) for x in (dout, qkv, out)),
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
