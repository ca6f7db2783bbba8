"""The public function ``bias_gelu``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.bias_gelu import schema  # noqa: F401  registers the op


def _triton_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_triton(request)
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16)


_MODULE = "fastbert.ops.bias_gelu"
TABLE = select.Table(
    "bias_gelu",
    (
        select.Implementation("triton", f"{_MODULE}.triton", _triton_reasons),
        select.Implementation("torch", f"{_MODULE}.torch", select.nothing),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none", impl: str | None = None) -> Tensor:
    """``gelu(x + bias)``, GELU as in Hendrycks & Gimpel, arXiv:1606.08415.

    Args:
        x: ``[..., I]``, any floating dtype and strides.
        bias: ``[I]``.
        approximate: "none" (by the error function) or "tanh".
        impl: "triton" (CUDA), "torch", "reference", or None for the first of them that can serve the call.

    Returns:
        ``[..., I]``, contiguous, in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value than it must have.
        UnsupportedError: ``impl`` can't serve the call.
    """
    checks.rows("x", x)
    checks.vector("bias", bias, x.shape[-1])
    checks.one_of("approximate", approximate, "none", "tanh")
    checks.same_device(x=x, bias=bias)
    chosen = TABLE.choose(impl, select.Request(x.device.type, x.dtype))
    output: Tensor = torch.ops.fastbert.bias_gelu(x, bias.to(x.dtype), approximate, chosen)
    return output
