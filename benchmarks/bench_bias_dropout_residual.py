"""residual + dropout(x + bias)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.backends import philox

from .harness import Contest
from .suite import TORCH, Case, Peer, op_cases, op_contest

_P = 0.1


def cases(device: str) -> list[Case]:
    return op_cases("bias_dropout_residual", device, dropout_p=_P)


def build(case: Case) -> Contest:
    rows, hidden = case.batch.tokens, case.model.hidden
    tensors = {
        "x": torch.randn(rows, hidden, device=case.device),
        "bias": torch.randn(hidden, device=case.device),
        "residual": torch.randn(rows, hidden, device=case.device),
    }
    seed = torch.tensor([7], device=case.device)

    def ours(x: Tensor, bias: Tensor, residual: Tensor, impl: str) -> Tensor:
        return ops.bias_dropout_residual(x, bias, residual, p=_P, seed=seed, impl=impl)

    def eager(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(x + bias, _P)

    def measure(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + (x + bias) * (philox.hidden_mask(seed, x.shape, _P) * philox.scale(_P)).to(x.dtype)

    element = rows * hidden * case.torch_dtype.itemsize
    return op_contest(
        case,
        tensors,
        ours,
        {TORCH: Peer(eager)},
        bytes_forward=3.0 * element,
        bytes_backward=2.0 * element,
        measure=measure,
    )


def bench_bias_dropout_residual(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
