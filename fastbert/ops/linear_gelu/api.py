"""The public function ``linear_gelu``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.linear_gelu import schema  # noqa: F401  registers the op


def _triton_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_triton(request)
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16)


def _persistent_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_triton(request)
    yield from select.needs_dtype(request, torch.float16, torch.bfloat16)
    yield from select.needs_capability(request, 90)


_MODULE = "fastbert.ops.linear_gelu"
TABLE = select.Table(
    "linear_gelu",
    (
        select.Implementation("by_shape", f"{_MODULE}.by_shape", _triton_reasons),
        select.Implementation("persistent", f"{_MODULE}.persistent", _persistent_reasons),
        select.Implementation("triton", f"{_MODULE}.triton", _triton_reasons),
        select.Implementation("cublas_triton", f"{_MODULE}.cublas_triton", _triton_reasons),
        select.Implementation("torch", f"{_MODULE}.torch", select.nothing),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str = "none", impl: str | None = None
) -> Tensor:
    """``gelu(x @ weight.T + bias)``, GELU as in Hendrycks & Gimpel, arXiv:1606.08415.

    Keeps the input of the GELU for the backward pass, if there will be one, and not its output. Under autocast ``x``,
    ``weight`` and ``bias`` are cast to the autocast dtype first, as ``torch.nn.functional.linear`` does.

    Args:
        x: ``[..., H]``, any floating dtype and strides.
        weight: ``[I, H]``.
        bias: ``[I]``, or None.
        approximate: "none" (by the error function) or "tanh".
        impl: "by_shape" (CUDA; the next three by what was measured), "persistent" (one kernel, in 16 bits from compute
            capability 9.0 on), "triton" (CUDA, one kernel), "cublas_triton" (CUDA, two), "torch", "reference", or None
            for the first of them that can serve the call.

    Returns:
        ``[..., I]``, contiguous, in the dtype that ``x`` and ``weight`` promote to, or under autocast in its dtype.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value than it must have.
        UnsupportedError: ``impl`` can't serve the call.
    """
    checks.rows("x", x)
    checks.floating("weight", weight)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (I, {x.shape[-1]})")
    if bias is not None:
        checks.vector("bias", bias, weight.shape[0])
    checks.one_of("approximate", approximate, "none", "tanh")
    checks.same_device(x=x, weight=weight, bias=bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(x.dtype, weight.dtype)
    chosen = TABLE.choose(impl, select.Request(device, dtype, index=x.device.index))
    bias = None if bias is None else bias.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    needs_hidden = torch.is_grad_enabled() and any(
        argument is not None and argument.requires_grad for argument in (x, weight, bias)
    )
    output: Tensor = torch.ops.fastbert.linear_gelu(x, weight, bias, approximate, needs_hidden, chosen)[0]
    return output
