"""The public function ``bias_dropout_residual``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.bias_dropout_residual import schema  # noqa: F401  registers the op

_EXTENSION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _cpu_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cpu")
    yield from select.needs_dtype(request, *_EXTENSION_DTYPES)
    yield from select.needs_host_extension(request)


def _cuda_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cuda")
    yield from select.needs_dtype(request, *_EXTENSION_DTYPES)
    yield from select.needs_cuda_extension(request)


_MODULE = "fastbert.ops.bias_dropout_residual"
TABLE = select.Table(
    "bias_dropout_residual",
    (
        select.Implementation("cuda", f"{_MODULE}.cuda", _cuda_reasons),
        select.Implementation("cpu", f"{_MODULE}.cpu", _cpu_reasons),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``residual + dropout(x + bias)``, with the dropout mask drawn inside and never stored.

    Args:
        x: ``[..., H]``, any floating dtype and strides.
        bias: ``[H]``, or None.
        residual: the shape of ``x``.
        p: probability of dropping an element, quantised to multiples of 2**-16.
        seed: int64 with one element, on the device of ``x``; None draws one from torch's default generator.
        impl: "cuda", "cpu", "reference", or None for the first of them that can serve the call.

    Returns:
        ``[..., H]``, contiguous, in the dtype that ``x`` and ``residual`` promote to.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than it must have.
        UnsupportedError: ``impl`` can't serve the call.
    """
    checks.rows("x", x)
    checks.floating("residual", residual)
    checks.shape("residual", residual, *x.shape)
    if bias is not None:
        checks.vector("bias", bias, x.shape[-1])
    checks.probability("p", p)
    checks.same_device(x=x, bias=bias, residual=residual)
    seed = checks.dropout_seed(p, seed, x.device)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    name = TABLE.choose(impl, select.Request(x.device.type, dtype, p, index=x.device.index))
    bias = None if bias is None else bias.to(dtype)
    output: Tensor = torch.ops.fastbert.bias_dropout_residual(x.to(dtype), bias, residual.to(dtype), p, seed, name)
    return output
