"""Dropout masks as a function of (seed, logical position): Philox4x32-10 in plain PyTorch.

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
The 64-bit seed is its key and the logical position its counter, so a mask depends neither on tile sizes nor on
buffers, and the backward pass draws it again instead of storing it.

One Philox call yields 128 bits, which serve eight neighbouring elements with 16 bits each. Element ``j`` of a group
takes word ``j >> 1``: its low half when ``j`` is even, its high half when ``j`` is odd. An element is kept when its
draw is below ``threshold(p)``, so ``p`` is quantised to multiples of 2**-16.

=====================  =========================================================
what                   counter (four 32-bit words)
=====================  =========================================================
hidden states          ``lo(i >> 3), hi(i >> 3), 0, 0``; ``i`` = index of the element
attention              ``key >> 3, query, head, sequence``
=====================  =========================================================

This file is the oracle of the kernels' generators; ``csrc/common/philox.h`` is the same function in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_DRAWS = 1 << 16


def threshold(p: float) -> int:
    """The number of 16-bit draws, out of 65536, that keep an element when the dropout probability is ``p``."""
    return round((1.0 - p) * _DRAWS)


def scale(p: float) -> float:
    """The factor for kept elements: one over the exact probability of being kept; 0 when nothing is kept."""
    kept = threshold(p)
    return _DRAWS / kept if kept else 0.0


def new_seeds(count: int, device: torch.device) -> Tensor:
    """Draw ``count`` seeds (int64 ``[count]``) from torch's default generator of ``device``, without a wait."""
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four 32-bit words from a four-word counter and a two-word key.

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
    """The 16-bit draws of attention probabilities: int64 ``[len(sequence), heads, queries, keys]``.

    ``sequence`` (int64 ``[N]``) holds the index of each sequence in its batch; query and key count from the
    first token of the sequence.
    """
    device = seed.device
    words = philox4x32(
        (
            torch.arange((keys + 7) // 8, device=device),
            torch.arange(queries, device=device)[:, None],
            torch.arange(heads, device=device)[:, None, None],
            sequence[:, None, None, None],
        ),
        _key(seed),
    )
    return _halves(words).flatten(-2)[..., :keys]


def hidden_mask(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """The keep mask (bool, ``shape``) of hidden-state dropout with probability ``p``."""
    return (hidden_draws(seed, shape.numel()) < threshold(p)).view(shape)


def attention_mask(seed: Tensor, sequence: Tensor, heads: int, queries: int, keys: int, p: float) -> Tensor:
    """The keep mask (bool, ``[len(sequence), heads, queries, keys]``) of attention dropout with probability ``p``."""
    return attention_draws(seed, sequence, heads, queries, keys) < threshold(p)


def hidden_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``x`` where it is kept, scaled by ``scale(p)``, and zero elsewhere; ``x`` itself when ``seed`` is None."""
    if seed is None:
        return x
    return torch.where(hidden_mask(seed, x.shape, p), x * scale(p), 0.0)
