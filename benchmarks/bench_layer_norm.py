"""LayerNorm: every implementation, PyTorch's and Liger's."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops

from .harness import Contest
from .suite import TORCH, Case, Peer, op_cases, op_contest

_EPS = 1e-12
_LIGER = "liger"


def cases(device: str) -> list[Case]:
    return op_cases("layer_norm", device, peers=(_LIGER,))


def build(case: Case) -> Contest:
    rows, hidden = case.batch.tokens, case.model.hidden
    tensors = {
        "x": torch.randn(rows, hidden, device=case.device),
        "weight": 1.0 + 0.1 * torch.randn(hidden, device=case.device),
        "bias": torch.randn(hidden, device=case.device),
    }

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (hidden,), weight, bias, _EPS)

    theirs, missing = {TORCH: Peer(eager)}, {}
    if case.device != "cuda":
        missing[_LIGER] = "its kernels run on a GPU"
    else:
        try:
            liger = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
            theirs[_LIGER] = Peer(lambda x, weight, bias: liger.apply(x, weight, bias, _EPS))
        except ImportError as error:
            missing[_LIGER] = f"it can't be imported ({error}): pip install liger-kernel"
    element = rows * hidden * case.torch_dtype.itemsize
    return op_contest(
        case,
        tensors,
        lambda x, weight, bias, impl: ops.layer_norm(x, weight, bias, _EPS, impl=impl),
        theirs,
        bytes_forward=2.0 * element,
        bytes_backward=3.0 * element,
        missing=missing,
    )


def bench_layer_norm(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
