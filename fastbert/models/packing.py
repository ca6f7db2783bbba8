"""Packing: a padded batch ``[B, S]`` becomes T tokens once, at the embeddings, and is padded again once, at the end.

The tokens of all sequences stand one after the other; ``cu_seqlens`` holds where each begins. There are two sizes of
T. Eagerly it is the number of valid tokens, so nothing is computed for padding, and knowing it costs one wait for the
device. Under ``torch.compile``, ``torch.export`` and CUDA-graph capture nothing may depend on the data: T is B * S, the
valid tokens come first in the same order, and attention skips the rest, which belong to no sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.ops.unpad import unpad


class Packing(NamedTuple):
    """Where the tokens of a batch are.

    ``cu_seqlens`` is int32 ``[B + 1]``, contiguous; ``max_seqlen`` is at least the length of the longest sequence.
    ``indices`` (int64 ``[T]``) holds for each packed token its place in the flattened ``[B * S]`` batch; None stands
    for all of them in order. ``valid`` (bool ``[B, S]``) is set when T counts padding too (the static size). ``shape``
    is (B, S).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor | None
    valid: Tensor | None
    shape: tuple[int, int]

    def places(self) -> Tensor:
        """For each packed token its place in its row of the batch: int64 ``[T]``."""
        batch, seqlen = self.shape
        if self.indices is not None:
            return self.indices % seqlen
        return torch.arange(seqlen, device=self.cu_seqlens.device).repeat(batch)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[T, ...]``; padding that stays (static size) is set to zero in floating tensors."""
        if self.valid is not None and x.is_floating_point():
            x = torch.where(self.valid.unsqueeze(-1), x, 0.0)
        x = x.flatten(0, 1)
        return x if self.indices is None else x.index_select(0, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """``[T, H]`` -> ``[B, S, H]``, zeros at padded positions."""
        batch, seqlen = self.shape
        if self.indices is not None:
            x = x.new_zeros(batch * seqlen, x.shape[-1]).index_copy_(0, self.indices, x)
        x = x.view(batch, seqlen, -1)
        return x if self.valid is None else torch.where(self.valid.unsqueeze(-1), x, 0.0)


def full(batch: int, seqlen: int, device: torch.device) -> Packing:
    """The packing of a batch without padding."""
    cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device)
    return Packing(cu_seqlens, seqlen, None, None, (batch, seqlen))


def from_sequences(cu_seqlens: Tensor, max_seqlen: int | None, tokens: int) -> Packing:
    """The packing of a batch of one row that holds ``tokens`` tokens of several sequences, one after the other.

    Raises:
        TypeError: ``cu_seqlens`` holds no integers.
        ValueError: it has no dimension or several, or no element.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seq_lens_q has dtype {cu_seqlens.dtype}; it must be torch.int32 or torch.int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seqlens.shape)}; it must be [sequences + 1]")
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    return Packing(cu_seqlens.to(torch.int32).contiguous(), max_seqlen, None, None, (1, tokens))


def from_mask_static(mask: Tensor, tokens: int | None = None) -> Packing:
    """The packing of a mask ``[B, S]`` without a look at its values: valid tokens first, then padding.

    T is ``tokens``, which must be enough for the valid ones; by default B * S.
    """
    batch, seqlen = mask.shape
    cu_seqlens, indices, _ = unpad(mask)
    longest = seqlen if tokens is None else min(seqlen, tokens)
    return Packing(cu_seqlens, longest, indices[:tokens], mask.to(torch.bool), (batch, seqlen))


def from_mask(mask: Tensor, read: Tensor | None, read_first: bool = False) -> Packing | None:
    """The packing of a mask ``[B, S]``: T valid tokens. Waits for the device once.

    ``read`` (bool ``[B, S]``) marks positions whose hidden state the caller will use, and ``read_first`` says that it
    will use the first of each sequence. If one of them is padding in a sequence that isn't all padding, there is no
    packing that keeps it, and None is returned.
    """
    return from_unpadded(mask.shape, *unpad(mask, read, read_first))


def from_unpadded(shape: tuple[int, ...], cu_seqlens: Tensor, indices: Tensor, facts: Tensor) -> Packing | None:
    """The packing of a mask of ``shape``, from what ``unpad`` gives; see ``from_mask``."""
    batch, seqlen = shape
    tokens, longest, *reads_padding = facts.tolist()
    if any(reads_padding):
        return None
    if tokens == batch * seqlen:
        return Packing(cu_seqlens, seqlen, None, None, (batch, seqlen))
    return Packing(cu_seqlens, longest, indices[:tokens], None, (batch, seqlen))
