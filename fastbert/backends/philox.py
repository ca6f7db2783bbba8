"""Dropout masks as a function of (seed, logical position): Philox4x32-7 in plain PyTorch.

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11); with
seven rounds it passes BigCrush (their table 2). The 64-bit seed is its key and the logical position its counter, so a
mask depends neither on tile sizes nor on buffers, and the backward pass draws it again instead of storing it.

One Philox call yields four words, whose eight halves serve eight elements.

=============  ================================================  =================================================
what           counter (four 32-bit words)                       its place in the four words
=============  ================================================  =================================================
hidden states  ``lo(i >> 3), hi(i >> 3), 0, 0``                  word ``i >> 1 & 3``, half ``i & 1`` (0: the low one)
attention      ``head, 4 (k >> 4) + (k >> 1 & 3), sequence,      word ``2 (q >> 3 & 1) + (k >> 3 & 1)``, half
               8 (q >> 4) + (q & 7)``                            ``k & 1``
=============  ================================================  =================================================

``i`` is the index of an element, ``q`` a query and ``k`` a key. Where tensor cores leave the product of queries and
keys, a thread has all eight elements of a call of attention: it draws for itself alone.

An element of a hidden state is kept when its half is below ``threshold(p)``: ``p`` is quantised to multiples of 2**-16.
A probability of attention has a draw of 15 bits, the low ones of its half, and of these ``attention_threshold(p)`` keep
it: the largest where at least half of them do, otherwise the lowest. So the comparison is with 16384 at most, in which
range the draws, read as float16, have the order of integers, and GPUs compare two at once.

This file is the oracle of the kernels' generators; ``csrc/common/philox.h`` is the same function in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_DRAWS = 1 << 16
_ATTENTION_DRAWS = 1 << 15


def threshold(p: float) -> int:
    """The number of 16-bit draws, out of 65536, that keep an element when the dropout probability is ``p``."""
    return round((1.0 - p) * _DRAWS)


def scale(p: float) -> float:
    """The factor for kept elements: one over the exact probability of being kept; 0 when nothing is kept."""
    kept = threshold(p)
    return _DRAWS / kept if kept else 0.0


def attention_threshold(p: float) -> int:
    """The number of 15-bit draws, out of 32768, that keep a probability of attention dropped with probability ``p``."""
    return round((1.0 - p) * _ATTENTION_DRAWS)


def attention_scale(p: float) -> float:
    """``scale`` for probabilities of attention."""
    kept = attention_threshold(p)
    return _ATTENTION_DRAWS / kept if kept else 0.0


def new_seeds(count: int, device: torch.device) -> Tensor:
    """Draw ``count`` seeds (int64 ``[count]``) from torch's default generator of ``device``, without a wait."""
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Seven rounds of Philox4x32: four 32-bit words from a four-word counter and a two-word key.

    All tensors are int64 holding values in [0, 2**32) and broadcast against each other. Products wrap modulo
    2**64 in int64 arithmetic, which leaves both of their 32-bit halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = k0 + _WEYL[0] & _MASK32
        k1 = k1 + _WEYL[1] & _MASK32
    return c0, c1, c2, c3


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    seed = seed.reshape(())
    return seed & _MASK32, seed >> 32 & _MASK32


def _halves(words: tuple[Tensor, ...]) -> Tensor:
    """Split four words into eight 16-bit draws along a new last dimension: ``[...]`` x 4 -> ``[..., 8]``."""
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)


def hidden_draws(seed: Tensor, count: int, start: int = 0) -> Tensor:
    """The 16-bit draws of elements ``start .. start + count - 1`` of a contiguous tensor: int64 ``[count]``."""
    group = torch.arange(start // 8, (start + count + 7) // 8, device=seed.device)
    zero = torch.zeros_like(group)
    words = philox4x32((group & _MASK32, group >> 32, zero, zero), _key(seed))
    return _halves(words).flatten()[start % 8 : start % 8 + count]


def attention_draws(seed: Tensor, sequence: Tensor, heads: int, queries: int, keys: int) -> Tensor:
    """The 15-bit draws of attention probabilities: int64 ``[len(sequence), heads, queries, keys]``.

    ``sequence`` (int64 ``[N]``) holds the index of each sequence in its batch; query and key count from the
    first token of the sequence.
    """
    device = seed.device
    blocks_q, blocks_k = (queries + 15) // 16, (keys + 15) // 16
    words = philox4x32(
        (
            torch.arange(heads, device=device)[:, None, None],
            torch.arange(4 * blocks_k, device=device),
            sequence[:, None, None, None],
            torch.arange(8 * blocks_q, device=device)[:, None],
        ),
        _key(seed),
    )
    draws = _halves(words).unflatten(-1, (2, 2, 2)).unflatten(3, (blocks_k, 4)).unflatten(2, (blocks_q, 8))
    # [N, A, i, j, k, l, a, b, h] -> [N, A, i, a, j, k, b, l, h]
    draws = draws.permute(0, 1, 2, 6, 3, 4, 7, 5, 8).flatten(5).flatten(2, 4)
    inside: Tensor = draws[:, :, :queries, :keys]
    return inside & 0x7FFF


def hidden_mask(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """The keep mask (bool, ``shape``) of hidden-state dropout with probability ``p``."""
    return (hidden_draws(seed, shape.numel()) < threshold(p)).view(shape)


def attention_mask(seed: Tensor, sequence: Tensor, heads: int, queries: int, keys: int, p: float) -> Tensor:
    """The keep mask (bool, ``[len(sequence), heads, queries, keys]``) of attention dropout with probability ``p``."""
    draws = attention_draws(seed, sequence, heads, queries, keys)
    kept = attention_threshold(p)
    return draws < kept if 2 * kept < _ATTENTION_DRAWS else draws >= _ATTENTION_DRAWS - kept


def hidden_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``x`` where it is kept, scaled by ``scale(p)``, and zero elsewhere; ``x`` itself when ``seed`` is None."""
    if seed is None:
        return x
    return torch.where(hidden_mask(seed, x.shape, p), x * scale(p), 0.0)
