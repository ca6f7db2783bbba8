"""LayerNorm(residual + dropout(x + bias)): what follows two of a layer's products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.backends import philox

from .harness import Contest
from .suite import TORCH, Case, Peer, op_cases, op_contest

_EPS = 1e-12


def cases(device: str) -> list[Case]:
    return [
        *op_cases("bias_dropout_residual_layer_norm", device),
        *op_cases("bias_dropout_residual_layer_norm", device, dropout_p=0.1),
    ]


def build(case: Case) -> Contest:
    rows, hidden, p = case.batch.tokens, case.model.hidden, case.dropout_p
    tensors = {
        "x": torch.randn(rows, hidden, device=case.device),
        "bias": torch.randn(hidden, device=case.device),
        "residual": torch.randn(rows, hidden, device=case.device),
        "weight": 1.0 + 0.1 * torch.randn(hidden, device=case.device),
        "ln_bias": torch.randn(hidden, device=case.device),
    }
    seed = torch.tensor([7], device=case.device) if p else None

    def ours(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor, impl: str) -> Tensor:
        return ops.bias_dropout_residual_layer_norm(x, bias, residual, weight, ln_bias, _EPS, p=p, seed=seed, impl=impl)

    def eager(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x + bias, p), (hidden,), weight, ln_bias, _EPS)

    def measure(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
        kept = (philox.hidden_mask(seed, x.shape, p) * philox.scale(p)).to(x.dtype)
        return F.layer_norm(residual + (x + bias) * kept, (hidden,), weight, ln_bias, _EPS)

    element = rows * hidden * case.torch_dtype.itemsize
    # A forward that will have a backward also writes the sum that LayerNorm was taken of.
    forward = 3.0 if case.work.endswith("forward") else 4.0
    return op_contest(
        case,
        tensors,
        ours,
        {TORCH: Peer(eager)},
        bytes_forward=forward * element,
        bytes_backward=4.0 * element,
        measure=measure,
    )


def bench_bias_dropout_residual_layer_norm(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
