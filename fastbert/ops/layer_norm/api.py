"""The public function ``layer_norm``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.layer_norm import schema  # noqa: F401  registers the op


def _triton_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_triton(request)
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16)


_MODULE = "fastbert.ops.layer_norm"
TABLE = select.Table(
    "layer_norm",
    (
        select.Implementation("triton", f"{_MODULE}.triton", _triton_reasons),
        select.Implementation("torch", f"{_MODULE}.torch", select.nothing),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, with float32 statistics.

    Args:
        x: ``[..., H]``, any floating dtype and strides.
        weight, bias: ``[H]``, any floating dtype; each gets its gradient in its own.
        eps: added to the variance.
        impl: "triton" (CUDA), "torch", "reference", or None for the first of them that can serve the call.

    Returns:
        ``[..., H]``, contiguous, in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than it must have.
        UnsupportedError: ``impl`` can't serve the call.
    """
    checks.rows("x", x)
    checks.vector("weight", weight, x.shape[-1])
    checks.vector("bias", bias, x.shape[-1])
    checks.same_device(x=x, weight=weight, bias=bias)
    chosen = TABLE.choose(impl, select.Request(x.device.type, x.dtype))
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    output: Tensor = torch.ops.fastbert.layer_norm(x, weight.to(dtype), bias.to(dtype), eps, chosen)[0]
    return output
