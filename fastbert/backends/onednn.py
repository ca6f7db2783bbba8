"""Matrix products of oneDNN with a reordered weight and fused post-operations.

torch's CPU builds carry the two operators that Inductor uses when it freezes weights: one reorders a weight into the
layout of oneDNN's kernels, the other multiplies by it and applies bias, GELU or an addition while the result is still
in cache. ``backends/prepacked.py`` keeps the reordered weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# oneDNN blocks a long sum badly in 16 bits for some numbers of rows: with K = 3072 and N = 768 on two cores with AMX,
# 700 to 1310 rows run at 0.95 TFLOP/s whole and at 1.5 to 1.7 when they come 384 at a time; below and above that range
# the whole product runs at 1.6 to 1.9. At K = 768 it is the faster one at any size.
_SLOW_ROWS = range(512, 1450)
_BLOCK_ROWS = 384
_LONG_SUM = 2048


@cache
def missing(dtype: torch.dtype) -> str | None:
    """Why prepacked linears can't be used in ``dtype``, in one sentence; None when they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN's prepacked linear computes in float32, bfloat16 and float16, not in {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN (torch.backends.mkldnn.is_available() is False)"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 kernels for this processor"
        if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return "oneDNN has no float16 kernels for this processor"
        x = torch.ones(2, 8, dtype=dtype)
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(8, 8, dtype=dtype))
        y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "gelu", [], "none")
        torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this build of torch can't run oneDNN's prepacked linear ({str(error).splitlines()[0]})"
    if not torch.equal(y, torch.full((2, 8), 8.0, dtype=dtype)):
        return "oneDNN's prepacked linear gives a wrong product on this processor"
    return None


def pack(weight: Tensor) -> Tensor:
    """The weight ``[N, K]`` as oneDNN's kernels want it (opaque)."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """xWᵀ + b: ``[..., K]`` -> ``[..., N]``."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(xWᵀ + b); ``approximate`` is "none" (erf) or "tanh"."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    return y


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """xWᵀ + b + other; ``x`` is ``[..., K]``, ``other`` ``[..., N]``, contiguous."""
    if x.dim() == 2 and x.itemsize == 2 and x.shape[1] >= _LONG_SUM and x.shape[0] in _SLOW_ROWS:
        blocks = zip(x.split(_BLOCK_ROWS), other.split(_BLOCK_ROWS), strict=True)
        return torch.cat([_linear_add(rows, weight, bias, added) for rows, added in blocks])
    return _linear_add(x, weight, bias, other)


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return y
