"""A product, its bias and GELU: the intermediate layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops

from .harness import Contest
from .suite import TORCH, Case, Peer, op_cases, op_contest


def cases(device: str) -> list[Case]:
    return op_cases("linear_gelu", device)


def build(case: Case) -> Contest:
    rows, hidden, features = case.batch.tokens, case.model.hidden, case.model.intermediate
    tensors = {
        "x": torch.randn(rows, hidden, device=case.device),
        "weight": torch.randn(features, hidden, device=case.device) * hidden**-0.5,
        "bias": torch.randn(features, device=case.device),
    }

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    numbers = rows * (hidden + features) + hidden * features
    return op_contest(
        case,
        tensors,
        ops.linear_gelu,
        {TORCH: Peer(eager)},
        flops=2.0 * rows * hidden * features,
        bytes_forward=1.0 * numbers * case.torch_dtype.itemsize,
    )


def bench_linear_gelu(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
