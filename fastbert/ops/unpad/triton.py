"""``unpad`` in Triton, in two launches with a program for each row; ``reference.py`` says what of.

=========  ==================================================================================
lengths    reads a row of the mask, and of ``read``; writes its length and whether padding is
           read of it
indices    adds up the lengths of the rows before its own, reads its row again and writes the
           places of its tokens and of its padding; the last row's program writes the facts.
           Where the ids of the tokens are wanted, it brings them to their places too
traffic    two reads of the mask and 8 bytes written a position, most of it in the cache; with
           ids two more reads of 8 bytes and 24 written
=========  ==================================================================================

Adding up the rows before anew in each program takes B^2 reads of the cache, which for 65,536 rows is 16 GB. One launch
would need programs that wait for each other.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends import launch
from fastbert.backends.launcher import Launcher
from fastbert.backends.triton_utils import jit, next_power_of_2

# Numbers that change from batch to batch: a kernel isn't compiled again for them.
_SIZES = ("stride_row", "stride_position", "read_first", "batch", "seqlen", "pitch")


@jit
def _valid(mask_ptr, stride_row, stride_position, row, position, inside):
    """Where a row has tokens: int1 ``[BLOCK]``."""
    return tl.load(mask_ptr + row * stride_row + position * stride_position, mask=inside, other=0) != 0


@jit(do_not_specialize=_SIZES)
def lengths_kernel(
    mask_ptr, stride_row, stride_position, read_ptr, read_first, lengths_ptr, lost_ptr, seqlen,
    READ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The length of a row, and whether padding is read of it: 0 or 1. ``read_first`` is 1 or 0."""
    row = tl.program_id(0).to(tl.int64)
    counts = tl.zeros([BLOCK], tl.int32)
    lost = tl.zeros([BLOCK], tl.int32)
    for start in range(0, seqlen, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < seqlen
        valid = _valid(mask_ptr, stride_row, stride_position, row, position.to(tl.int64), inside)
        counts += valid.to(tl.int32)
        if READ:
            read = tl.load(read_ptr + row * seqlen + position, mask=inside, other=0) != 0
            lost = tl.where(read & (valid == 0), 1, lost)
        lost = tl.where((position < read_first) & (valid == 0), 1, lost)
    length = tl.sum(counts)
    tl.store(lengths_ptr + row, length)
    tl.store(lost_ptr + row, tl.where(length > 0, tl.max(lost), 0))


@jit(do_not_specialize=_SIZES)
def indices_kernel(
    mask_ptr, stride_row, stride_position, lengths_ptr, lost_ptr, cu_seqlens_ptr, indices_ptr, facts_ptr,
    input_ids_ptr, token_type_ids_ptr, packed_ptr, batch, seqlen, pitch,
    IDS: tl.constexpr, TYPES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The offset of a row, the places of its positions, and of the last row the facts.

    With IDS also input ids, positions and token types in the order of the places: three rows ``pitch`` apart.
    """
    row = tl.program_id(0).to(tl.int64)
    all_lengths = tl.zeros([ROWS], tl.int32)
    lengths_before = tl.zeros([ROWS], tl.int32)
    longest = tl.zeros([ROWS], tl.int32)
    lost = tl.zeros([ROWS], tl.int32)
    for start in range(0, batch, ROWS):
        other = start + tl.arange(0, ROWS)
        length = tl.load(lengths_ptr + other, mask=other < batch, other=0)
        all_lengths += length
        lengths_before += tl.where(other < row, length, 0)
        longest = tl.maximum(longest, length)
        lost = tl.maximum(lost, tl.load(lost_ptr + other, mask=other < batch, other=0))
    tokens = tl.sum(all_lengths)
    before = tl.sum(lengths_before)
    tl.store(cu_seqlens_ptr + row, before)
    if row == batch - 1:
        tl.store(cu_seqlens_ptr + batch, tokens)
        tl.store(facts_ptr, tokens)
        tl.store(facts_ptr + 1, tl.max(longest))
        tl.store(facts_ptr + 2, tl.max(lost))
    # The next free place for a token of this row and for its padding, which stands after all tokens.
    token = before.to(tl.int64)
    padding = tokens + row * seqlen - before
    for start in range(0, seqlen, BLOCK):
        position = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = position < seqlen
        valid = _valid(mask_ptr, stride_row, stride_position, row, position, inside).to(tl.int32)
        rank = tl.cumsum(valid)
        place = tl.where(valid != 0, token + rank - 1, padding + (position - start) - rank)
        source = row * seqlen + position
        tl.store(indices_ptr + place, source, mask=inside)
        if IDS:
            input_id = tl.load(input_ids_ptr + source, mask=inside, other=0).to(tl.int64)
            tl.store(packed_ptr + place, input_id, mask=inside)
            tl.store(packed_ptr + pitch + place, position, mask=inside)
            token_type = tl.zeros([BLOCK], tl.int64)
            if TYPES:
                token_type = tl.load(token_type_ids_ptr + source, mask=inside, other=0).to(tl.int64)
            tl.store(packed_ptr + 2 * pitch.to(tl.int64) + place, token_type, mask=inside)
        count = tl.sum(valid)
        token += count
        padding += BLOCK - count


_LENGTHS, _INDICES = map(Launcher, (lengths_kernel, indices_kernel))


def unpad(mask: Tensor, read: Tensor | None, read_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(``cu_seqlens``, ``indices``, ``facts``); see ``api.py``."""
    return _unpad(mask, read, read_first, None, None)[:3]


def unpad_ids(
    mask: Tensor, read_first: bool, input_ids: Tensor, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``unpad`` and, int64 ``[3, B * S]``, the input ids, positions and token types in the order of ``indices``.

    ``input_ids`` and ``token_type_ids`` are of integers, ``[B, S]``; the rows of the result begin at multiples of 16
    bytes. Without ``token_type_ids`` these are zeros.
    """
    cu_seqlens, indices, facts, packed = _unpad(mask, None, read_first, input_ids, token_type_ids)
    assert packed is not None
    return cu_seqlens, indices, facts, packed[:, : mask.numel()]


def _unpad(
    mask: Tensor, read: Tensor | None, read_first: bool, input_ids: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, seqlen = mask.shape
    # Lengths, flags, offsets and facts, each from a multiple of 16 bytes on.
    rows = (batch + 4) // 4 * 4
    numbers = torch.empty(3 * rows + 3, dtype=torch.int32, device=mask.device)
    lengths, lost, cu_seqlens = numbers[:batch], numbers[rows : rows + batch], numbers[2 * rows : 2 * rows + batch + 1]
    facts = numbers[3 * rows :]
    indices = torch.empty(batch * seqlen, dtype=torch.int64, device=mask.device)
    pitch = batch * seqlen + batch * seqlen % 2
    packed = None if input_ids is None else indices.new_empty(3, pitch)
    strides = mask.stride()
    block = min(1024, max(32, next_power_of_2(seqlen)))
    options = launch.fused({"BLOCK": block, "num_warps": 4})
    where_read = mask if read is None else read.contiguous()
    arguments = (mask, *strides, where_read, int(read_first), lengths, lost, seqlen)
    _LENGTHS((batch,), arguments, {"READ": read is not None, **options})
    ids = (
        indices if input_ids is None else input_ids.contiguous(),
        indices if token_type_ids is None else token_type_ids.contiguous(),
        indices if packed is None else packed,
    )
    constants = {
        "IDS": input_ids is not None, "TYPES": token_type_ids is not None,
        "ROWS": min(1024, max(32, next_power_of_2(batch))), **options,
    }  # fmt: skip
    arguments = (mask, *strides, lengths, lost, cu_seqlens, indices, facts, *ids, batch, seqlen, pitch)
    _INDICES((batch,), arguments, constants)
    return cu_seqlens, indices, facts, packed
