"""Packed attention in Triton, forward and backward; the maths is in ``reference.py``.

Up to a number of keys, ``KEYS`` of the launch table, one program has a whole sequence of one head in one block: each of
its tokens is read once and each result written once, and the softmax needs no second look. Longer sequences are cut
into blocks of queries, which loop over blocks of keys with the online softmax of Dao et al., arXiv:2205.14135,
algorithm 1; only the block with the last key is masked.

Nobody but the device knows the lengths, so the list of blocks is arithmetic: sequence ``b`` has the programs from
``cu_seqlens[b] // BLOCK + b`` on, which are at least as many as its blocks and at most one more, and a program finds
its sequence by bisection. ``T // BLOCK + B`` programs for each head serve any mixture of lengths, and at most B of them
have nothing to do.

=========  =======================================================================================
forward    reads Q, K, V, writes O and the log-sum-exp; 8 bytes an element of O in 16 bits where a
           sequence is one block, and K and V once more for every further block of queries
backward   short: reads Q, K, V, dO and computes the softmax again, its row sums too, so that
           neither O nor the log-sum-exp is read; 14 bytes an element of O.
           long: two kernels. The first has a block of queries: delta from dO and O, then dQ, with P
           from the log-sum-exp. The second has a block of keys: dK and dV. No atomics: every row of
           dQKV has one writer
dropout    the mask is drawn from (seed, sequence, head, query, key) wherever P is computed
=========  =======================================================================================

Products take the operands in the dtype of ``qkv`` and accumulate in float32; the softmax is float32, to base two.
Offsets of rows are int64.
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends import launch, philox
from fastbert.backends.launcher import Launcher
from fastbert.backends.triton_utils import (
    SEEDS,
    attention_draws,
    attention_drop,
    dot,
    dot_precision,
    jit,
    next_power_of_2,
)

# Numbers that change from batch to batch: a kernel isn't compiled again for them.
_COUNTS = (
    *("rows", "heads", "sequences", "steps", "slots", "query_slots"),
    *("scale", "threshold", "kept_scale"),
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# As ``_pair`` makes it of infinity and zero.
_INFINITE = tl.constexpr(0x7F800000)


@jit
def _offset(cu_seqlens_ptr, index, rows):
    """The offset at ``index``. One outside of the tensors is the caller's error, and must not lead there."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + index), 0), rows)


@jit
def _sequence_of(slot, cu_seqlens_ptr, rows, sequences, steps, BLOCK: tl.constexpr):
    """The last sequence whose first program is ``slot`` or before it, found in ``steps`` halvings."""
    low = slot * 0
    high = low + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        before = _offset(cu_seqlens_ptr, middle, rows) // BLOCK + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@jit
def _place(pid, cu_seqlens_ptr, rows, heads, sequences, steps, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """(head, slot, sequence, its first row, its length, the first of the program's tokens in it)."""
    head = pid % heads
    slot = pid // heads
    if WHOLE:
        sequence = tl.minimum(slot, tl.maximum(sequences - 1, 0))
    else:
        sequence = _sequence_of(slot, cu_seqlens_ptr, rows, sequences, steps, BLOCK)
    first = _offset(cu_seqlens_ptr, sequence, rows)
    length = _offset(cu_seqlens_ptr, tl.minimum(sequence + 1, sequences), rows) - first
    start = 0 if WHOLE else (slot - first // BLOCK - sequence) * BLOCK
    return head, slot, sequence, first.to(tl.int64), length, start


@jit
def _tile(ptr, row, stride_row, column, row_valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``row`` (int64) of one head ``[rows, BLOCK_D]``, zero where a row is not valid and beyond D."""
    valid = row_valid[:, None] if D == BLOCK_D else row_valid[:, None] & (column < D)[None, :]
    return tl.load(ptr + (row[:, None] * stride_row + column[None, :]), mask=valid, other=0.0)


@jit
def _put(ptr, row, stride_row, column, row_valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what ``_tile`` would read."""
    valid = row_valid[:, None] if D == BLOCK_D else row_valid[:, None] & (column < D)[None, :]
    tl.store(ptr + row[:, None] * stride_row + column[None, :], x.to(ptr.dtype.element_ty), mask=valid)


@jit
def _clear(
    ptr, stride_row, cu_seqlens_ptr, rows, sequences, slot, slots, column,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Zeros in this program's share of the rows of no sequence, for one head."""
    used = _offset(cu_seqlens_ptr, sequences, rows)
    for start in range(used + slot * BLOCK, rows, slots * BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        _put(ptr, row, stride_row, column, row < rows, tl.zeros([BLOCK, BLOCK_D], tl.float32), D, BLOCK_D)


@jit
def _attend(
    q, acc, m, total, k_ptr, v_ptr, stride_row, first, start_n, length, column, scale2,
    seed_ptr, sequence, head, start, threshold,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax: ``acc`` ``[M, D]``, the maximum ``m`` and the ``total`` ``[M]``.

    ``scale2`` is not negative, so that ``m`` comes from the largest score, and a multiply-add makes each exponent.
    Where keys are masked, the scores are scaled first: minus infinity times a ``scale2`` of zero would be no number.
    """
    key = tl.arange(0, BLOCK_N)
    row = key.to(tl.int64)
    valid = key < length - start_n if MASKED else key >= 0
    above = (first + start_n) * stride_row
    k = _tile(k_ptr + above, row, stride_row, column, valid, D, BLOCK_D)
    s = dot(q, tl.trans(k), None, PRECISION)
    if MASKED:
        s = tl.where(valid[None, :], s * scale2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    total = total * alpha + tl.sum(p, 1)
    v = _tile(v_ptr + above, row, stride_row, column, valid, D, BLOCK_D)
    p = p.to(v.dtype)
    if DROPOUT:
        draws = attention_draws(tl.load(seed_ptr), sequence, head, start, start_n, q.shape[0], BLOCK_N, False)
        p = attention_drop(p, draws, threshold)
    acc = dot(p, v, acc * alpha[:, None], PRECISION)
    return acc, m_new, total


@jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=SEEDS)
def forward_kernel(
    qkv_ptr, stride_row, stride_part, stride_head, cu_seqlens_ptr, out_ptr, lse_ptr, seed_ptr,
    rows, heads, sequences, steps, slots, scale, threshold, kept_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NEGATIVE: tl.constexpr, WHOLE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one sequence and head: out ``[T, A, D]`` and lse ``[A, T]``.

    ``scale`` comes without its sign, which ``NEGATIVE`` gives to the queries.
    """
    head, slot, sequence, first, length, start = _place(
        tl.program_id(0), cu_seqlens_ptr, rows, heads, sequences, steps, BLOCK_M, WHOLE
    )
    column = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    head_out_ptr = out_ptr + head * D
    head_lse_ptr = lse_ptr + head.to(tl.int64) * rows
    if start < length:
        token = tl.arange(0, BLOCK_M)
        query = start + token
        row, valid = token.to(tl.int64), token < length - start
        scale2 = scale * _LOG2_E
        q = _tile(q_ptr + (first + start) * stride_row, row, stride_row, column, valid, D, BLOCK_D)
        if NEGATIVE:
            q = -q
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        full = 0 if WHOLE else (length - 1) // BLOCK_N * BLOCK_N
        # The compiler waits for each step of a product where it can't see that the loop has a turn.
        if full > 0:
            for start_n in range(0, full, BLOCK_N):
                acc, m, total = _attend(
                    q, acc, m, total, k_ptr, v_ptr, stride_row, first, start_n, length, column, scale2,
                    seed_ptr, sequence, head, start, threshold,
                    D, BLOCK_N, BLOCK_D, False, DROPOUT, PRECISION,
                )  # fmt: skip
        acc, m, total = _attend(
            q, acc, m, total, k_ptr, v_ptr, stride_row, first, full, length, column, scale2,
            seed_ptr, sequence, head, start, threshold,
            D, BLOCK_N, BLOCK_D, True, DROPOUT, PRECISION,
        )  # fmt: skip
        out = acc * (kept_scale / total)[:, None]
        _put(head_out_ptr + (first + start) * heads * D, row, heads * D, column, valid, out, D, BLOCK_D)
        tl.store(head_lse_ptr + first + query, (m + tl.log2(total)) * _LN_2, mask=valid)
    _clear(head_out_ptr, heads * D, cu_seqlens_ptr, rows, sequences, slot, slots, column, BLOCK_M, D, BLOCK_D)
    for spare in range(_offset(cu_seqlens_ptr, sequences, rows) + slot * BLOCK_M, rows, slots * BLOCK_M):
        spare_row = spare + tl.arange(0, BLOCK_M)
        tl.store(head_lse_ptr + spare_row, tl.zeros([BLOCK_M], tl.float32), mask=spare_row < rows)


@jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=SEEDS)
def backward_short_kernel(
    dout_ptr, stride_dout, stride_dout_head, qkv_ptr, stride_row, stride_part, stride_head, cu_seqlens_ptr, dqkv_ptr,
    seed_ptr, rows, heads, sequences, steps, slots, scale, threshold, kept_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence of one head whole: dqkv ``[T, 3, A, D]``."""
    head, slot, sequence, first, length, start = _place(
        tl.program_id(0), cu_seqlens_ptr, rows, heads, sequences, steps, BLOCK, True
    )
    column = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    dq_ptr = dqkv_ptr + head * D
    part = heads * D
    if start < length:
        token = tl.arange(0, BLOCK)
        row, valid = first + token, token < length
        q = _tile(q_ptr, row, stride_row, column, valid, D, BLOCK_D)
        k = _tile(q_ptr + stride_part, row, stride_row, column, valid, D, BLOCK_D)
        s = dot(q, tl.trans(k), None, PRECISION) * (scale * _LOG2_E)
        s = tl.where(valid[None, :], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        # Rows beyond the last query are no tokens: without these zeros they would reach dK and dV.
        p = tl.where(valid[:, None], p / tl.sum(p, 1)[:, None], 0.0)
        do = _tile(
            dout_ptr + head.to(tl.int64) * stride_dout_head, row, stride_dout, column, valid, D, BLOCK_D
        ).to(q.dtype)  # fmt: skip
        v = _tile(q_ptr + 2 * stride_part, row, stride_row, column, valid, D, BLOCK_D)
        dp = dot(do, tl.trans(v), None, PRECISION)
        dropped = p
        if DROPOUT:
            draws = attention_draws(tl.load(seed_ptr), sequence, head, start, start, BLOCK, BLOCK, False)
            dropped = attention_drop(p, draws, threshold)
            dp = attention_drop(dp, draws, threshold)
        dv = dot(tl.trans(dropped.to(do.dtype)), do, None, PRECISION) * kept_scale
        _put(dq_ptr + 2 * part, row, 3 * part, column, valid, dv, D, BLOCK_D)
        delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = dot(ds, k, None, PRECISION) * (scale * kept_scale)
        _put(dq_ptr, row, 3 * part, column, valid, dq, D, BLOCK_D)
        dk = dot(tl.trans(ds), q, None, PRECISION) * (scale * kept_scale)
        _put(dq_ptr + part, row, 3 * part, column, valid, dk, D, BLOCK_D)
    for index in tl.static_range(3):
        _clear(
            dq_ptr + index * part, 3 * part, cu_seqlens_ptr, rows, sequences, slot, slots, column, BLOCK, D, BLOCK_D
        )  # fmt: skip


@jit
def _pair(low, high):
    """Two float32 as one int64."""
    bits = high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return bits | (low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@jit
def _parted(pair):
    """The two float32 of ``_pair``."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _dq_block(
    q, do, dq, delta, lse2, k_ptr, v_ptr, stride_row, first, start_n, length, column, scale2,
    seed_ptr, sequence, head, start, threshold,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq`` ``[M, D]`` and what one block of keys adds to it."""
    key = tl.arange(0, BLOCK_N)
    row = key.to(tl.int64)
    valid = key < length - start_n if MASKED else key >= 0
    above = (first + start_n) * stride_row
    k = _tile(k_ptr + above, row, stride_row, column, valid, D, BLOCK_D)
    s = dot(q, tl.trans(k), None, PRECISION) * scale2
    if MASKED:
        s = tl.where(valid[None, :], s, float("-inf"))
    p = tl.exp2(s - lse2[:, None])
    v = _tile(v_ptr + above, row, stride_row, column, valid, D, BLOCK_D)
    dp = dot(do, tl.trans(v), None, PRECISION)
    if DROPOUT:
        draws = attention_draws(tl.load(seed_ptr), sequence, head, start, start_n, q.shape[0], BLOCK_N, False)
        dp = attention_drop(dp, draws, threshold)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq, PRECISION)


@jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=SEEDS)
def backward_dq_kernel(
    dout_ptr, stride_dout, stride_dout_head, qkv_ptr, stride_row, stride_part, stride_head, out_ptr, lse_ptr,
    cu_seqlens_ptr, dqkv_ptr, statistics_ptr, seed_ptr,
    rows, heads, sequences, steps, slots, scale, threshold, kept_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one sequence and head: dQ, and what ``backward_dkv_kernel`` needs of the queries.

    ``statistics`` ``[A, slots, BLOCK_M]`` holds the log-sum-exp, to base two, and delta over ``kept_scale`` of each
    query. It has a place for each query of a block, so that it is read without a mask: beyond the last query, the
    log-sum-exp is infinite. dP, dS and delta are without ``kept_scale``, which dQ and dK are multiplied with.
    """
    head, slot, sequence, first, length, start = _place(
        tl.program_id(0), cu_seqlens_ptr, rows, heads, sequences, steps, BLOCK_M, False
    )
    column = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    dq_ptr = dqkv_ptr + head * D
    if start < length:
        token = tl.arange(0, BLOCK_M)
        above = first + start
        row, valid = token.to(tl.int64), token < length - start
        q = _tile(q_ptr + above * stride_row, row, stride_row, column, valid, D, BLOCK_D)
        out = _tile(out_ptr + above * heads * D + head * D, row, heads * D, column, valid, D, BLOCK_D)
        do = _tile(
            dout_ptr + above * stride_dout + head.to(tl.int64) * stride_dout_head,
            row, stride_dout, column, valid, D, BLOCK_D,
        ).to(q.dtype)  # fmt: skip
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        if DROPOUT:
            delta *= threshold * (1.0 / 32768)  # over kept_scale, which may be zero
        lse = tl.load(lse_ptr + head.to(tl.int64) * rows + above + token, mask=valid, other=float("inf"))
        lse2 = lse * _LOG2_E
        place = (head.to(tl.int64) * slots + slot) * BLOCK_M + token
        tl.store(statistics_ptr + place, _pair(lse2, delta))
        scale2 = scale * _LOG2_E
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        full = (length - 1) // BLOCK_N * BLOCK_N
        if full > 0:  # as in forward_kernel
            for start_n in range(0, full, BLOCK_N):
                dq = _dq_block(
                    q, do, dq, delta, lse2, k_ptr, v_ptr, stride_row, first, start_n, length, column, scale2,
                    seed_ptr, sequence, head, start, threshold,
                    D, BLOCK_N, BLOCK_D, False, DROPOUT, PRECISION,
                )  # fmt: skip
        dq = _dq_block(
            q, do, dq, delta, lse2, k_ptr, v_ptr, stride_row, first, full, length, column, scale2,
            seed_ptr, sequence, head, start, threshold,
            D, BLOCK_N, BLOCK_D, True, DROPOUT, PRECISION,
        )  # fmt: skip
        _put(dq_ptr + above * (3 * heads * D), row, 3 * heads * D, column, valid, dq * (scale * kept_scale), D, BLOCK_D)
    _clear(dq_ptr, 3 * heads * D, cu_seqlens_ptr, rows, sequences, slot, slots, column, BLOCK_M, D, BLOCK_D)


@jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=SEEDS)
def backward_dkv_kernel(
    dout_ptr, stride_dout, stride_dout_head, qkv_ptr, stride_row, stride_part, stride_head, statistics_ptr,
    cu_seqlens_ptr, dqkv_ptr, seed_ptr,
    rows, heads, sequences, steps, slots, query_slots, scale, threshold, kept_scale, QUERIES: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys of one sequence and head: dK and dV. The products are those of ``Pᵀ``, ``[N, M]``.

    ``statistics`` has ``query_slots`` blocks of ``QUERIES`` queries for each head.
    """
    head, slot, sequence, first, length, start = _place(
        tl.program_id(0), cu_seqlens_ptr, rows, heads, sequences, steps, BLOCK_N, False
    )
    column = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    head_dout_ptr = dout_ptr + head.to(tl.int64) * stride_dout_head
    part = heads * D
    head_dk_ptr = dqkv_ptr + head * D + part
    if start < length:
        key = tl.arange(0, BLOCK_N)
        key_row, key_valid = key.to(tl.int64), key < length - start
        above = first + start
        k = _tile(q_ptr + above * stride_row + stride_part, key_row, stride_row, column, key_valid, D, BLOCK_D)
        v = _tile(q_ptr + above * stride_row + 2 * stride_part, key_row, stride_row, column, key_valid, D, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        scale2 = scale * _LOG2_E
        # The place of the sequence's first query.
        statistics_ptr += (head.to(tl.int64) * query_slots + first // QUERIES + sequence) * QUERIES
        if length > 0:  # as in forward_kernel
            for start_m in range(0, length, BLOCK_M):
                query = tl.arange(0, BLOCK_M)
                row, valid = query.to(tl.int64), query < length - start_m
                at = first + start_m
                q = _tile(q_ptr + at * stride_row, row, stride_row, column, valid, D, BLOCK_D)
                do = _tile(head_dout_ptr + at * stride_dout, row, stride_dout, column, valid, D, BLOCK_D).to(q.dtype)
                if BLOCK_M <= QUERIES:
                    pair = tl.load(statistics_ptr + start_m + query)
                else:
                    pair = tl.load(statistics_ptr + start_m + query, mask=valid, other=_INFINITE)
                lse2, delta = _parted(pair)
                st = dot(k, tl.trans(q), None, PRECISION)
                dpt = dot(v, tl.trans(do), None, PRECISION)
                pt = tl.exp2(st * scale2 - lse2[None, :])
                dropped = pt
                if DROPOUT:
                    draws = attention_draws(tl.load(seed_ptr), sequence, head, start_m, start, BLOCK_M, BLOCK_N, True)
                    dropped = attention_drop(pt, draws, threshold)
                dv = dot(dropped.to(do.dtype), do, dv, PRECISION)
                dst = dropped * dpt - pt * delta[None, :]
                dk = dot(dst.to(q.dtype), q, dk, PRECISION)
        dk_ptr = head_dk_ptr + above * (3 * part)
        _put(dk_ptr, key_row, 3 * part, column, key_valid, dk * (scale * kept_scale), D, BLOCK_D)
        _put(dk_ptr + part, key_row, 3 * part, column, key_valid, dv * kept_scale, D, BLOCK_D)
    for index in tl.static_range(2):
        _clear(
            head_dk_ptr + index * part, 3 * part, cu_seqlens_ptr, rows, sequences, slot, slots, column,
            BLOCK_N, D, BLOCK_D,
        )  # fmt: skip


@functools.cache
def _shapes(dtype: torch.dtype, size: int) -> str:
    return f"{8 * dtype.itemsize} bits, D <= {max(32, _block_d(size))}"


def _whole(kernel: str, max_seqlen: int, dtype: torch.dtype, size: int) -> int | None:
    """The block that holds each sequence whole; None when registers don't hold it."""
    block = max(16, next_power_of_2(max_seqlen))
    return block if block <= launch.options(kernel, f"{_shapes(dtype, size)}, whole")["KEYS"] else None


def _programs(cu_seqlens: Tensor, rows: int, block: int, whole: bool) -> tuple[int, int, int]:
    """(sequences, halvings that find a program's sequence, programs for each head)."""
    sequences = cu_seqlens.shape[0] - 1
    slots = sequences if whole else rows // block + sequences
    return sequences, sequences.bit_length(), max(1, slots)


def _rows_of_heads(x: Tensor) -> Tensor:
    """``x`` with the elements of a head next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block_d(size: int) -> int:
    """Tensor cores take 16 elements of a head at least."""
    return max(16, next_power_of_2(size))


def _options(kernel: str, dtype: torch.dtype, size: int, whole: int | None, dropout: bool) -> dict[str, int]:
    """Block sizes, warps, stages and the most registers of a thread, from the launch table."""
    long = "long, dropout" if dropout else "long"
    regime = long if whole is None else f"S <= {max(32, whole)}"
    return launch.options(kernel, f"{_shapes(dtype, size)}, {regime}")


_launch_forward = Launcher(forward_kernel)
_launch_backward_short = Launcher(backward_short_kernel)
_launch_backward_dq = Launcher(backward_dq_kernel)
_launch_backward_dkv = Launcher(backward_dkv_kernel)


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(O ``[T, A, D]``, lse ``[A, T]``)."""
    rows, _, heads, size = qkv.shape
    out = qkv.new_empty(rows, heads, size)
    lse = qkv.new_empty(heads, rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.zero_()
    qkv, cu_seqlens = _rows_of_heads(qkv), cu_seqlens.contiguous()
    whole = _whole("attention_forward", max_seqlen, qkv.dtype, size)
    options = _options("attention_forward", qkv.dtype, size, whole, seed is not None)
    if whole is not None:
        options |= {"BLOCK_M": whole, "BLOCK_N": whole}
    sequences, steps, slots = _programs(cu_seqlens, rows, options["BLOCK_M"], whole is not None)
    operands = (qkv, *qkv.stride()[:3], cu_seqlens, out, lse, cu_seqlens if seed is None else seed)
    numbers = (abs(scale), philox.attention_threshold(dropout_p), philox.attention_scale(dropout_p))
    constants = {
        "D": size, "BLOCK_D": _block_d(size), "NEGATIVE": scale < 0.0, "WHOLE": whole is not None,
        "DROPOUT": seed is not None, "PRECISION": dot_precision(qkv.dtype),
    }  # fmt: skip
    _launch_forward(
        (slots * heads,), (*operands, rows, heads, sequences, steps, slots, *numbers), {**constants, **options}
    )
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
    rows, _, heads, size = qkv.shape
    dqkv = qkv.new_empty(qkv.shape)
    if dqkv.numel() == 0:
        return dqkv
    dout, qkv, cu_seqlens = _rows_of_heads(dout), _rows_of_heads(qkv), cu_seqlens.contiguous()
    whole = _whole("attention_backward", max_seqlen, qkv.dtype, size)
    operands = (dout, *dout.stride()[:2], qkv, *qkv.stride()[:3])
    seed_or_any = cu_seqlens if seed is None else seed
    numbers = (scale, philox.attention_threshold(dropout_p), philox.attention_scale(dropout_p))
    constants = {
        "D": size,
        "BLOCK_D": _block_d(size),
        "DROPOUT": seed is not None,
        "PRECISION": dot_precision(qkv.dtype),
    }
    if whole is not None:
        sequences, steps, slots = _programs(cu_seqlens, rows, whole, True)
        options = _options("attention_backward", qkv.dtype, size, whole, seed is not None)
        _launch_backward_short(
            (slots * heads,),
            (*operands, cu_seqlens, dqkv, seed_or_any, rows, heads, sequences, steps, slots, *numbers),
            {"BLOCK": whole, **constants, **options},
        )
        return dqkv
    options = _options("attention_backward_dq", qkv.dtype, size, None, seed is not None)
    queries = options["BLOCK_M"]
    sequences, steps, query_slots = _programs(cu_seqlens, rows, queries, False)
    statistics = lse.new_empty(heads, query_slots, queries, dtype=torch.int64)
    places = (rows, heads, sequences, steps, query_slots)
    _launch_backward_dq(
        (query_slots * heads,),
        (*operands, out, lse, cu_seqlens, dqkv, statistics, seed_or_any, *places, *numbers),
        {**constants, **options},
    )
    options = _options("attention_backward_dkv", qkv.dtype, size, None, seed is not None)
    sequences, steps, slots = _programs(cu_seqlens, rows, options["BLOCK_N"], False)
    places = (rows, heads, sequences, steps, slots)
    _launch_backward_dkv(
        (slots * heads,),
        (*operands, statistics, cu_seqlens, dqkv, seed_or_any, *places, query_slots, *numbers),
        {"QUERIES": queries, **constants, **options},
    )
    return dqkv
