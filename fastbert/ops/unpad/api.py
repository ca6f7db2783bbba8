"""The function ``unpad``: lengths, offsets and places of the tokens that a mask holds."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastbert.backends import select
from fastbert.ops.unpad import reference


def unpad(mask: Tensor, read: Tensor | None = None, read_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Find the valid tokens of a padded batch; nothing waits for the device.

    On a GPU these are two launches by Triton, otherwise PyTorch's operators (``reference.py``).

    Args:
        mask: ``[B, S]`` of any dtype and strides, nonzero where a token is; B and S at least 1.
        read: bool ``[B, S]``, positions whose hidden state the caller will use; or None.
        read_first: whether the caller will use the first position of each row.

    Returns:
        (``cu_seqlens`` int32 ``[B + 1]``, ``indices`` int64 ``[B * S]``, ``facts`` int32 ``[2 to 4]``). ``indices``
        holds the places of all valid tokens in the flattened batch, in order, then those of the padding. ``facts`` are
        the number of valid tokens and the length of the longest row; one of the others isn't 0 if ``read`` or
        ``read_first`` mean padding in a row that isn't all padding.
    """
    if not torch.compiler.is_compiling() and _triton_serves(mask.device.type):
        from fastbert.ops.unpad import triton

        return triton.unpad(mask, read, read_first)
    return reference.unpad(mask, read, read_first)


@functools.cache
def _triton_serves(device: str) -> bool:
    return next(select.needs_triton(select.Request(device, torch.int32)), None) is None
