"""The second stage of a sum over rows in Triton: what programs have added up in float32, added up in a fixed order."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastbert.backends.launch import fused
from fastbert.backends.launcher import Launcher
from fastbert.backends.triton_utils import ceil_div, jit

_COLUMNS = 32
_OPTIONS = fused({"ROWS": 256, "COLUMNS": _COLUMNS, "num_warps": 8})


@jit(do_not_specialize=["rows"])
def add_partials_kernel(
    partial_ptr, first_ptr, second_ptr, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of partial ``[1 or 2, rows, columns]``, a block of columns of one sum."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    partial_ptr += tl.program_id(1).to(tl.int64) * rows * columns
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        total += tl.load(partial_ptr + row * columns + column[None, :], mask=(row < rows) & inside[None, :], other=0.0)
    # In steps of few additions each, so that few roundings add up where a sum takes one number after the other.
    sums = tl.sum(tl.sum(tl.reshape(total, [ROWS // 8, 8, COLUMNS]), 1), 0).to(first_ptr.dtype.element_ty)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + column, sums, mask=inside)
    else:
        tl.store(second_ptr + column, sums, mask=inside)


_launch = Launcher(add_partials_kernel)


def add_partials(partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The sums over the middle dimension of float32 ``[1 or 2, rows, columns]``: ``[columns]`` each, in ``dtype``.

    They are tensors of their own, not views of one, since an op may not return those.
    """
    sums = [partial.new_empty(partial.shape[2], dtype=dtype) for _ in range(partial.shape[0])]
    if partial.shape[2] > 0:
        _launch(
            (ceil_div(partial.shape[2], _COLUMNS), partial.shape[0]),
            (partial, sums[0], sums[-1], partial.shape[1], partial.shape[2]),
            _OPTIONS,
        )
    return tuple(sums)
