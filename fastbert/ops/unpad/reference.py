"""The oracle of ``unpad``: PyTorch's operators, some ten launches on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad(mask: Tensor, read: Tensor | None, read_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(``cu_seqlens``, ``indices``, ``facts``); see ``api.py``."""
    valid = mask.to(torch.bool)
    lengths = valid.sum(1, dtype=torch.int32)
    cu_seqlens = lengths.new_zeros(lengths.shape[0] + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    indices = torch.argsort(valid.flatten().to(torch.int8), descending=True, stable=True)
    facts = [cu_seqlens[-1], lengths.max()]
    # Of rows that are all padding the lengths are zero, and nothing that is read of them counts.
    if read_first:
        facts.append((lengths * ~valid[:, 0]).max())
    if read is not None:
        facts.append((lengths * (read > valid).any(1)).max())
    return cu_seqlens, indices, torch.stack(facts)
