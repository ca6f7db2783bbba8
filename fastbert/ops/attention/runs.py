"""Runs of neighbouring sequences of one length: what the CPU's implementations compute in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """``sequences`` neighbouring sequences of ``length`` tokens: the first row and the index of the first of them."""

    first_row: int
    first_sequence: int
    sequences: int
    length: int


def find(cu_seqlens: Tensor, max_seqlen: int, rows: int) -> tuple[list[Run], int]:
    """The runs of a packed batch, without empty sequences, and the number of rows that they cover.

    Raises:
        ValueError: ``cu_seqlens`` doesn't ascend from 0 to at most ``rows`` in steps of at most ``max_seqlen``.
    """
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] > rows or any(not 0 <= length <= max_seqlen for length in lengths):
        raise ValueError(
            f"cu_seqlens is {offsets}; it must ascend from 0 to at most {rows}, the rows of qkv, "
            f"in steps of at most {max_seqlen}, which is max_seqlen"
        )
    runs = []
    row = sequence = 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        if length > 0:
            runs.append(Run(row, sequence, count, length))
        row += count * length
        sequence += count
    return runs, row


def split(x: Tensor, runs: Sequence[Run], dim: int = 0) -> Iterator[Tensor]:
    """The part of each run of a packed tensor, with its dimension T replaced by (sequences, length): views."""
    for run in runs:
        rows = x.narrow(dim, run.first_row, run.sequences * run.length)
        yield torch.unflatten(rows, dim, (run.sequences, run.length))
