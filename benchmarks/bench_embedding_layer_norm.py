"""LayerNorm of the sum of three lookups, and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops

from .harness import Contest
from .suite import TORCH, Case, Peer, op_cases, op_contest

_EPS = 1e-12


def cases(device: str) -> list[Case]:
    return op_cases("embedding_layer_norm", device)


def build(case: Case) -> Contest:
    rows, hidden, device = case.batch.tokens, case.model.hidden, case.device
    sizes = {"word": case.model.vocabulary, "position": 512, "token_type": 2}
    tensors = {name: torch.randn(count, hidden, device=device) for name, count in sizes.items()}
    tensors |= {
        "weight": 1.0 + 0.1 * torch.randn(hidden, device=device),
        "bias": torch.randn(hidden, device=device),
    }
    ids = [torch.randint(count, (rows,), device=device) for count in sizes.values()]

    def ours(impl: str, **tensors: Tensor) -> Tensor:
        return ops.embedding_layer_norm(*ids, **tensors, eps=_EPS, impl=impl)

    def eager(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        looked_up = F.embedding(ids[0], word) + F.embedding(ids[1], position) + F.embedding(ids[2], token_type)
        return F.layer_norm(looked_up, (hidden,), weight, bias, _EPS)

    size = case.torch_dtype.itemsize
    # One row of the largest table and one of the output a token; the small tables stay in cache. The backward reads
    # the gradient and the row again, and writes a gradient of the size of each table.
    return op_contest(
        case,
        tensors,
        ours,
        {TORCH: Peer(eager)},
        bytes_forward=2.0 * rows * hidden * size,
        bytes_backward=(2.0 * rows + sum(sizes.values())) * hidden * size,
    )


def bench_embedding_layer_norm(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
