"""The public function ``bias_dropout_residual_layer_norm``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.bias_dropout_residual_layer_norm import schema  # noqa: F401  registers the op

_EXTENSION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _cuda_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cuda")
    yield from select.needs_dtype(request, *_EXTENSION_DTYPES)
    yield from select.needs_cuda_extension(request)


def _cpu_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cpu")
    yield from select.needs_dtype(request, *_EXTENSION_DTYPES)
    yield from select.needs_host_extension(request)


_MODULE = "fastbert.ops.bias_dropout_residual_layer_norm"
TABLE = select.Table(
    "bias_dropout_residual_layer_norm",
    (
        select.Implementation("cuda", f"{_MODULE}.cuda", _cuda_reasons),
        select.Implementation("cpu", f"{_MODULE}.cpu", _cpu_reasons),
        select.Implementation("composed", f"{_MODULE}.composed", select.nothing),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def bias_dropout_residual_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``layer_norm(residual + dropout(x + bias))`` over the last dimension, with float32 statistics.

    Args:
        x: ``[..., H]``, any floating dtype and strides.
        bias: ``[H]``, or None.
        residual: the shape of ``x``.
        weight, ln_bias: ``[H]``, any floating dtype; each gets its gradient in its own.
        eps: added to the variance.
        p: probability of dropping an element, quantised to multiples of 2**-16.
        seed: int64 with one element, on the device of ``x``; None draws one from torch's default generator.
        impl: "cuda", "cpu", "composed" (of the ops ``bias_dropout_residual`` and ``layer_norm``), "reference", or None
            for the first of them that can serve the call.

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
    checks.vector("weight", weight, x.shape[-1])
    checks.vector("ln_bias", ln_bias, x.shape[-1])
    checks.probability("p", p)
    checks.same_device(x=x, bias=bias, residual=residual, weight=weight, ln_bias=ln_bias)
    seed = checks.dropout_seed(p, seed, x.device)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    chosen = TABLE.choose(impl, select.Request(x.device.type, dtype, p, index=x.device.index))
    needs_backward = torch.is_grad_enabled() and any(
        argument is not None and argument.requires_grad for argument in (x, bias, residual, weight, ln_bias)
    )
    bias = None if bias is None else bias.to(dtype)
    affine_dtype = torch.promote_types(weight.dtype, ln_bias.dtype)
    output: Tensor = torch.ops.fastbert.bias_dropout_residual_layer_norm(
        x.to(dtype),
        bias,
        residual.to(dtype),
        weight.to(affine_dtype),
        ln_bias.to(affine_dtype),
        eps,
        p,
        seed,
        needs_backward,
        chosen,
    )[0]
    return output
