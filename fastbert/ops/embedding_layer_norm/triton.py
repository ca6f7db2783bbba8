"""Embedding-LayerNorm in Triton, forward and backward; the formula is in ``reference.py``.

A program has a few tokens: it gathers their rows of the three tables, adds them up in float32 and keeps the sums in
registers, in two pieces whose sizes are powers of two, 768 as 512 + 256. The gradients of the tables are made without
atomics, so runs on one device agree bit for bit:

1. ids are sorted, stably. A segment is all tokens of one id, next to each other in that order; chunks are every
   ``_CHUNK`` neighbours in it. The part of a segment that lies in one chunk belongs to one program, which adds up its
   rows in order. A segment within one chunk is done then.
2. Of a longer segment (thousands of tokens have one of two token types) the parts are in a float32 buffer. One
   program adds them up.

Both launch a program for each place at which a part or such a segment may begin, and those where none does return at
once: no shape depends on the ids, and nothing waits for the device.

=========  =======================================================================================
forward    reads ids and three rows a token, writes y, mean and rstd
backward   reads the same, dy, mean and rstd, adds up the rows again and writes the gradient of the
           sum, in the dtype of the tables; for each table this is then read once, and written are
           zeros for the whole table and the rows of the ids that occur
weights    the gradients of weight and bias are sums over tokens: as many programs as fill the
           device add up rows in a fixed order into a row each of a float32 buffer, and the buffer's
           rows are added up afterwards
saved      mean and rstd; the sum is looked up, and the mask drawn, again
traffic    4 bytes an element of y forward and 12 backward in 16 bits while the smaller tables stay
           in the cache, and 4 an element of each table
=========  =======================================================================================
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends import launch, philox
from fastbert.backends.launcher import Launcher
from fastbert.backends.partial_sums import add_partials
from fastbert.backends.triton_utils import (
    SEEDS,
    ceil_div,
    hidden_keep,
    hidden_words,
    jit,
    multiprocessors,
    pieces,
    rows_of,
)

# Tokens whose gradients one program adds up, a few of them at once: with 32k tokens of one id and four at once that is
# 16 loads after one another, and then 32 for the parts.
_CHUNK = 64
# Numbers that change from batch to batch: a kernel isn't compiled again for them.
_COUNTS = ("tokens", "chunks", "padding_idx", "eps", "threshold", "scale")


@jit
def _table_rows(ids_ptr, token, valid, table_ptr, stride_table):
    """Pointers to the rows of a table, ``[ROWS, 1]``."""
    return table_ptr + tl.load(ids_ptr + token, mask=valid, other=0).to(tl.int64)[:, None] * stride_table


@jit
def _looked_up(word_row, position_row, token_type_row, column, inside):
    """The sums of three rows: float32 ``[ROWS, columns]``, 0 outside."""
    word = tl.load(word_row + column, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(position_row + column, mask=inside, other=0.0).to(tl.float32)
    token_type = tl.load(token_type_row + column, mask=inside, other=0.0).to(tl.float32)
    return word + position + token_type


@jit
def _keep(seed_ptr, token, threshold, H: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """The keep mask of columns ``START`` to ``START + SIZE - 1`` of y ``[tokens, H]``: ``[ROWS, SIZE]``."""
    seed = tl.load(seed_ptr)
    if H % 8 == 0:
        group = START // 8 + tl.arange(0, SIZE // 8)
        return hidden_keep(seed, token[:, None] * (H // 8) + group[None, :], threshold)
    # Groups of eight elements cross rows: every element asks for its own.
    element = token[:, None] * H + START + tl.arange(0, SIZE)[None, :]
    w0, w1, w2, w3 = hidden_words(seed, element >> 3)
    word = tl.where((element & 4) == 0, tl.where((element & 2) == 0, w0, w1), tl.where((element & 2) == 0, w2, w3))
    draw = tl.where((element & 1) == 0, word & 0xFFFF, word >> 16)
    return draw.to(tl.int32) < threshold


@jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=SEEDS)
def forward_kernel(
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr,
    word_ptr, stride_word, position_ptr, stride_position, token_type_ptr, stride_token_type,
    weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, tokens, eps, seed_ptr, threshold, scale,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of y ``[tokens, H]``."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    word_row = _table_rows(input_ids_ptr, token, valid, word_ptr, stride_word)
    position_row = _table_rows(position_ids_ptr, token, valid, position_ptr, stride_position)
    token_type_row = _table_rows(token_type_ids_ptr, token, valid, token_type_ptr, stride_token_type)
    column = tl.arange(0, BLOCK)[None, :]
    x = _looked_up(word_row, position_row, token_type_row, column, valid[:, None])
    total = tl.sum(x, 1)
    if REST > 0:
        rest = BLOCK + tl.arange(0, REST)[None, :]
        inside = valid[:, None] & (rest < H)
        x_rest = _looked_up(word_row, position_row, token_type_row, rest, inside)
        total += tl.sum(x_rest, 1)
    mean = total / H
    x -= mean[:, None]
    squares = tl.sum(x * x, 1)
    if REST > 0:
        x_rest = tl.where(rest < H, x_rest - mean[:, None], 0.0)
        squares += tl.sum(x_rest * x_rest, 1)
    rstd = 1.0 / tl.sqrt(squares / H + eps)
    tl.store(mean_ptr + token, mean, mask=valid)
    tl.store(rstd_ptr + token, rstd, mask=valid)
    weight = tl.load(weight_ptr + column).to(tl.float32)
    bias = tl.load(bias_ptr + column).to(tl.float32)
    y = x * rstd[:, None] * weight + bias
    if DROPOUT:
        y = tl.where(_keep(seed_ptr, token, threshold, H, 0, BLOCK), y * scale, 0.0)
    tl.store(y_ptr + token[:, None] * H + column, y.to(y_ptr.dtype.element_ty), mask=valid[:, None])
    if REST > 0:
        weight = tl.load(weight_ptr + rest, mask=rest < H, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + rest, mask=rest < H, other=0.0).to(tl.float32)
        y = x_rest * rstd[:, None] * weight + bias
        if DROPOUT:
            y = tl.where(_keep(seed_ptr, token, threshold, H, BLOCK, REST), y * scale, 0.0)
        tl.store(y_ptr + token[:, None] * H + rest, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=SEEDS)
def backward_kernel(
    dy_ptr, stride_dy, input_ids_ptr, position_ids_ptr, token_type_ids_ptr,
    word_ptr, stride_word, position_ptr, stride_position, token_type_ptr, stride_token_type,
    weight_ptr, mean_ptr, rstd_ptr, dhidden_ptr, partial_ptr, tokens, seed_ptr, threshold, scale,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, DROPOUT: tl.constexpr,
    NEEDS_DHIDDEN: tl.constexpr, NEEDS_SUMS: tl.constexpr,
):  # fmt: skip
    """Every ``programs * ROWS``-th group of tokens: dhidden ``[tokens, H]`` and partial sums ``[2, programs, H]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if REST > 0:
        rest = BLOCK + tl.arange(0, REST)[None, :]
        weight_rest = tl.load(weight_ptr + rest, mask=rest < H, other=0.0).to(tl.float32)
        dweight_rest = tl.zeros([ROWS, REST], dtype=tl.float32)
        dbias_rest = tl.zeros([ROWS, REST], dtype=tl.float32)
    for start in range(program * ROWS, tokens, programs * ROWS):
        token = start + tl.arange(0, ROWS).to(tl.int64)
        valid = token < tokens
        word_row = _table_rows(input_ids_ptr, token, valid, word_ptr, stride_word)
        position_row = _table_rows(position_ids_ptr, token, valid, position_ptr, stride_position)
        token_type_row = _table_rows(token_type_ids_ptr, token, valid, token_type_ptr, stride_token_type)
        mean = tl.load(mean_ptr + token, mask=valid, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + token, mask=valid, other=0.0)[:, None]
        dy = tl.load(dy_ptr + token[:, None] * stride_dy + column, mask=valid[:, None], other=0.0).to(tl.float32)
        if DROPOUT:
            dy = tl.where(_keep(seed_ptr, token, threshold, H, 0, BLOCK), dy * scale, 0.0)
        xhat = (_looked_up(word_row, position_row, token_type_row, column, valid[:, None]) - mean) * rstd
        if NEEDS_SUMS:
            dweight += dy * xhat
            dbias += dy
        g = dy * weight
        g_sum = tl.sum(g, 1)
        gx_sum = tl.sum(g * xhat, 1)
        if REST > 0:
            inside = valid[:, None] & (rest < H)
            dy_rest = tl.load(dy_ptr + token[:, None] * stride_dy + rest, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                dy_rest = tl.where(_keep(seed_ptr, token, threshold, H, BLOCK, REST), dy_rest * scale, 0.0)
            xhat_rest = (_looked_up(word_row, position_row, token_type_row, rest, inside) - mean) * rstd
            if NEEDS_SUMS:
                dweight_rest += dy_rest * xhat_rest
                dbias_rest += dy_rest
            g_rest = dy_rest * weight_rest
            g_sum += tl.sum(g_rest, 1)
            gx_sum += tl.sum(g_rest * xhat_rest, 1)
        if NEEDS_DHIDDEN:
            g_mean, gx_mean = (g_sum / H)[:, None], (gx_sum / H)[:, None]
            dhidden_row = dhidden_ptr + token[:, None] * H
            dhidden = rstd * (g - g_mean - xhat * gx_mean)
            tl.store(dhidden_row + column, dhidden.to(dhidden_ptr.dtype.element_ty), mask=valid[:, None])
            if REST > 0:
                dhidden = rstd * (g_rest - g_mean - xhat_rest * gx_mean)
                tl.store(dhidden_row + rest, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside)
    if NEEDS_SUMS:
        weight_row = partial_ptr + program.to(tl.int64) * H
        bias_row = weight_row + programs.to(tl.int64) * H
        tl.store(weight_row + column, tl.sum(dweight, 0)[None, :])
        tl.store(bias_row + column, tl.sum(dbias, 0)[None, :])
        if REST > 0:
            tl.store(weight_row + rest, tl.sum(dweight_rest, 0)[None, :], mask=rest < H)
            tl.store(bias_row + rest, tl.sum(dbias_rest, 0)[None, :], mask=rest < H)


@jit(do_not_specialize=_COUNTS)
def chunk_kernel(
    ids_ptr, order_ptr, dhidden_ptr, dtable_ptr, part_ptr, tokens, padding_idx,
    H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The part of a segment that begins at place ``program_id(0)`` of the sorted ids, if one does.

    It is a row of dtable where it is the whole segment, or else a row of parts ``[chunks, 2, H]``: the first one of
    its chunk where the part begins with the chunk, the second one where it begins later. A chunk has one of each at
    most, since all other parts in it are whole segments.
    """
    first = tl.program_id(0)
    row = tl.load(ids_ptr + first).to(tl.int64)
    begins = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64) != row
    if (begins | (first % CHUNK == 0)) & (row != padding_idx):
        chunk = first // CHUNK
        neighbour = chunk * CHUNK + tl.arange(0, CHUNK)
        later = (neighbour >= first) & (neighbour < tokens)
        same = tl.load(ids_ptr + neighbour, mask=later, other=-1).to(tl.int64) == row
        last = first + tl.sum(same.to(tl.int32), 0)
        ends = tl.load(ids_ptr + last, mask=last < tokens, other=-1).to(tl.int64) != row
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        if REST > 0:
            rest = BLOCK + tl.arange(0, REST)
            total_rest = tl.zeros([REST], dtype=tl.float32)
        for start in range(first, last, ROWS):
            place = start + tl.arange(0, ROWS)
            valid = (place < last)[:, None]
            token = tl.load(order_ptr + place, mask=place < last, other=0)[:, None]
            dhidden = tl.load(dhidden_ptr + token * H + column[None, :], mask=valid, other=0.0)
            total += tl.sum(dhidden.to(tl.float32), 0)
            if REST > 0:
                inside = valid & (rest < H)[None, :]
                dhidden = tl.load(dhidden_ptr + token * H + rest[None, :], mask=inside, other=0.0)
                total_rest += tl.sum(dhidden.to(tl.float32), 0)
        if begins & ends:
            dtable_row = dtable_ptr + row * H
            tl.store(dtable_row + column, total.to(dtable_ptr.dtype.element_ty))
            if REST > 0:
                tl.store(dtable_row + rest, total_rest.to(dtable_ptr.dtype.element_ty), mask=rest < H)
        else:
            part_row = part_ptr + (2 * chunk + (first % CHUNK != 0).to(tl.int32)).to(tl.int64) * H
            tl.store(part_row + column, total)
            if REST > 0:
                tl.store(part_row + rest, total_rest, mask=rest < H)


@jit(do_not_specialize=_COUNTS)
def segment_kernel(
    ids_ptr, part_ptr, dtable_ptr, chunks, padding_idx,
    H: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The row of dtable whose segment begins in chunk ``program_id(0)`` and ends in a later one, if there is one."""
    chunk = tl.program_id(0)
    head_ptr = ids_ptr + chunk * CHUNK
    row = tl.load(head_ptr + CHUNK - 1).to(tl.int64)
    begins = tl.load(head_ptr - 1, mask=chunk > 0, other=-1).to(tl.int64) != row
    continues = tl.load(head_ptr + CHUNK).to(tl.int64) == row
    if begins & continues & (row != padding_idx):
        # The segment has the chunks whose first id is its own, and of its first chunk the first or the second part.
        second = (tl.load(head_ptr).to(tl.int64) != row).to(tl.int32)
        last = chunk + 1
        for start in range(chunk + 1, chunks, HEADS):
            candidate = start + tl.arange(0, HEADS)
            head = tl.load(ids_ptr + candidate * CHUNK, mask=candidate < chunks, other=-1).to(tl.int64)
            last += tl.sum((head == row).to(tl.int32), 0)
        column = tl.arange(0, BLOCK)[None, :]
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        if REST > 0:
            rest = BLOCK + tl.arange(0, REST)[None, :]
            total_rest = tl.zeros([ROWS, REST], dtype=tl.float32)
        for start in range(chunk, last, ROWS):
            member = start + tl.arange(0, ROWS)
            valid = (member < last)[:, None]
            part = 2 * member + tl.where(member == chunk, second, 0)
            part_row = part_ptr + part.to(tl.int64)[:, None] * H
            total += tl.load(part_row + column, mask=valid, other=0.0)
            if REST > 0:
                total_rest += tl.load(part_row + rest, mask=valid & (rest < H), other=0.0)
        dtable_row = dtable_ptr + row * H
        tl.store(dtable_row + column, tl.sum(total, 0)[None, :].to(dtable_ptr.dtype.element_ty))
        if REST > 0:
            sums = tl.sum(total_rest, 0)[None, :]
            tl.store(dtable_row + rest, sums.to(dtable_ptr.dtype.element_ty), mask=rest < H)


_launch_forward = Launcher(forward_kernel)
_launch_backward = Launcher(backward_kernel)
_launch_chunk = Launcher(chunk_kernel)
_launch_segment = Launcher(segment_kernel)


def _table_arguments(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> list[Tensor | int]:
    """The ids, and each table with the stride of its rows."""
    arguments: list[Tensor | int] = [x.contiguous() for x in ids]
    for table in map(rows_of, tables):
        arguments += [table, table.stride(0)]
    return arguments


def _key_dtype(rows: int) -> torch.dtype:
    """The narrowest dtype that holds the ids of a table: a radix sort takes a pass for each byte."""
    return next(x for x in (torch.int8, torch.int16, torch.int32, torch.int64) if rows - 1 <= torch.iinfo(x).max)


def _table_gradient(dhidden: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    """For each row of the table the sum of the rows of dhidden whose id it is: ``[rows, H]``, contiguous."""
    tokens, hidden = dhidden.shape
    dtable = table.new_zeros(table.shape)
    if tokens == 0:
        return dtable
    sorted_ids, order = torch.sort(ids.to(_key_dtype(table.shape[0])), stable=True)
    chunks = ceil_div(tokens, _CHUNK)
    parts = dhidden.new_empty((chunks, 2, hidden), dtype=torch.float32)
    block, rest = pieces(hidden)
    constants = {"H": hidden, "CHUNK": _CHUNK, "BLOCK": block, "REST": rest}
    _launch_chunk(
        (tokens,),
        (sorted_ids, order, dhidden, dtable, parts, tokens, padding_idx),
        {**constants, **launch.options("embedding_chunk", launch.row_class(hidden))},
    )
    if chunks > 1:
        _launch_segment(
            (chunks - 1,),
            (sorted_ids, parts, dtable, chunks, padding_idx),
            {**constants, "HEADS": 1024, **launch.options("embedding_segment", launch.row_class(hidden))},
        )
    return dtable


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
    tokens, hidden = input_ids.shape[0], word.shape[1]
    y = word.new_empty(tokens, hidden)
    mean = word.new_empty((tokens, 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if tokens == 0:
        return y, mean, rstd
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    block, rest = pieces(hidden)
    options = launch.options("embedding_forward", launch.row_class(hidden))
    operands = (*_table_arguments(ids, tables), weight.contiguous(), bias.contiguous(), y, mean, rstd)
    _launch_forward(
        (ceil_div(tokens, options["ROWS"]),),
        (*operands, tokens, eps, seed, philox.threshold(p), philox.scale(p)),
        {"H": hidden, "BLOCK": block, "REST": rest, "DROPOUT": seed is not None, **options},
    )
    return y, mean, rstd


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
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    tokens, hidden = dy.shape
    needs_dhidden, needs_sums = any(output_mask[:3]), any(output_mask[3:])
    options = launch.options("embedding_backward", launch.row_class(hidden))
    programs = min(ceil_div(tokens, options["ROWS"]), options.pop("PROGRAMS") * multiprocessors(dy.device))
    dhidden = dy.new_empty((tokens if needs_dhidden else 0, hidden), dtype=word.dtype)
    partial = dy.new_empty((2, programs if needs_sums else 0, hidden), dtype=torch.float32)
    if tokens > 0 and (needs_dhidden or needs_sums):
        flat_dy = rows_of(dy)
        block, rest = pieces(hidden)
        operands = (flat_dy, flat_dy.stride(0), *_table_arguments(ids, tables), weight.contiguous(), mean, rstd)
        constants = {
            "H": hidden, "BLOCK": block, "REST": rest, "DROPOUT": seed is not None,
            "NEEDS_DHIDDEN": needs_dhidden, "NEEDS_SUMS": needs_sums,
        }  # fmt: skip
        _launch_backward(
            (programs,),
            (*operands, dhidden, partial, tokens, seed, philox.threshold(p), philox.scale(p)),
            {**constants, **options},
        )
    dtables = (
        _table_gradient(dhidden, table_ids, table, skipped) if wanted else table.new_empty(0)
        for table_ids, table, skipped, wanted in zip(ids, tables, (padding_idx, -1, -1), output_mask[:3], strict=True)
    )
    sums = add_partials(partial, weight.dtype) if needs_sums else ()
    dweight, dbias = (sums[i] if output_mask[3 + i] else weight.new_empty(0) for i in range(2))
    return *dtables, dweight, dbias
