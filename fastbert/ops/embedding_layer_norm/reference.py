"""The oracle of embedding-LayerNorm: plain eager PyTorch.

With ``m`` the keep mask of ``backends/philox.py`` and ``s`` = 65536 / threshold(p), about 1 / (1 - p)::

    h = word[input_ids] + position[position_ids] + token_type[token_type_ids]
    y = s * m * LayerNorm(h)
    dLayerNorm = s * m * dy        dword[v] = sum of dh over the tokens whose id is v, likewise the other tables

BERT's input representation: Devlin et al., arXiv:1810.04805, section 3, figure 2. ``ops/formulas.py`` has the
LayerNorm, forward and backward.

===========  ==========================================================================
computes in  float32 for 16-bit tables, otherwise the dtype of the tables; the variance
             is a second pass over centred values
saves        mean and rstd ``[T, 1]``, in the dtype of the computation; h is looked up again
supports     every device, floating dtype, size and stride
===========  ==========================================================================
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbert.backends import philox
from fastbert.ops import formulas


def _lookup(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    padding_idx: int,
) -> Tensor:
    dtype = formulas.compute_dtype(word.dtype)
    words = F.embedding(input_ids, word, None if padding_idx < 0 else padding_idx)
    positions, types = F.embedding(position_ids, position), F.embedding(token_type_ids, token_type)
    return words.to(dtype) + positions.to(dtype) + types.to(dtype)


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
    hidden = _lookup(input_ids, position_ids, token_type_ids, word, position, token_type, padding_idx)
    y, mean, rstd = formulas.layer_norm(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype), eps)
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
    hidden = _lookup(input_ids, position_ids, token_type_ids, word, position, token_type, padding_idx)
    dhidden, dweight, dbias = formulas.layer_norm_grad(
        philox.hidden_dropout(dy.to(hidden.dtype), p, seed),
        hidden,
        weight.to(hidden.dtype),
        mean,
        rstd,
    )
    dtables = []
    for table, ids, skipped in (
        (word, input_ids, padding_idx),
        (position, position_ids, -1),
        (token_type, token_type_ids, -1),
    ):
        dtable = dhidden.new_zeros(table.shape).index_put_((ids,), dhidden, accumulate=True)
        if skipped >= 0:
            dtable[skipped] = 0.0
        dtables.append(dtable)
    return tuple(
        gradient.to(like.dtype) if wanted else like.new_empty(0)
        for gradient, like, wanted in zip(
            (*dtables, dweight, dbias), (word, position, token_type, weight, weight), output_mask, strict=True
        )
    )
