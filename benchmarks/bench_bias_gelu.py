"""GELU of x + bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops

from .harness import Contest
from .suite import TORCH, Case, Peer, op_cases, op_contest


def cases(device: str) -> list[Case]:
    return op_cases("bias_gelu", device)


def build(case: Case) -> Contest:
    rows, columns = case.batch.tokens, case.model.intermediate
    tensors = {
        "x": torch.randn(rows, columns, device=case.device),
        "bias": torch.randn(columns, device=case.device),
    }

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    element = rows * columns * case.torch_dtype.itemsize
    return op_contest(
        case,
        tensors,
        ops.bias_gelu,
        {TORCH: Peer(eager)},
        bytes_forward=2.0 * element,
        bytes_backward=3.0 * element,
    )


def bench_bias_gelu(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
