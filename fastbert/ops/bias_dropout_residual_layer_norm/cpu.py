"""The host build of the compiled fusion: ``csrc/bias_dropout_residual_layer_norm/host.cpp``.

Forward and backward each go over the rows once, a row at a time in the first-level cache, with the mask drawn on the
way. The parameters' gradients are sums of 8 rows, then of up to 64, then of those: the same on any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops.bias_dropout_residual_layer_norm import compiled


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``compiled.forward`` on torch's number of threads."""
    return compiled.forward("host", torch.get_num_threads(), *arguments)


def output(*arguments: Any) -> Tensor:
    """``compiled.output`` on torch's number of threads."""
    return compiled.output("host", torch.get_num_threads(), *arguments)


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """``compiled.backward`` on torch's number of threads."""
    return compiled.backward("host", torch.get_num_threads(), *arguments)
