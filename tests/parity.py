"""The one comparison behind every parity test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def results(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor], dy: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of ``function(**tensors)``, and for each tensor the gradient that ``dy`` gives it."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = function(**leaves)
    if dy is None:
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), dy.to(output.dtype))
    return output.detach(), {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def check(
    actual: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    dy: Tensor | None = None,
) -> None:
    """Assert that ``actual`` is about as near to the truth as eager PyTorch, in its output and in every gradient.

    The truth is ``oracle`` in float64, differentiated by autograd. The largest error may be twice that of ``eager``,
    which computes in the dtype of ``tensors``, plus one rounding step of that dtype at the truth's largest magnitude.

    Args:
        actual, oracle, eager: called with ``tensors`` as keywords; the output has one shape.
        tensors: floating-point; with these strides and offsets for ``actual`` and ``eager``.
        dy: the incoming gradient, in the dtype of the output; None: random numbers.
    """
    output, gradients = results(actual, tensors, dy)
    if dy is None:
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    exact_output, exact_gradients = results(oracle, {name: x.double() for name, x in tensors.items()}, dy.double())
    eager_output, eager_gradients = results(eager, tensors, dy)

    for name, exact in {"output": exact_output, **exact_gradients}.items():
        assert exact.dtype == torch.float64
        assert exact.isfinite().all(), f"the oracle's {name} is not finite"
        result = output if name == "output" else gradients[name]
        baseline = eager_output if name == "output" else eager_gradients[name]
        assert result.shape == exact.shape, f"{name} has shape {result.shape}, and the oracle's is {exact.shape}"
        if exact.numel() == 0:
            continue
        allowed = 2.0 * distance(baseline, exact) + torch.finfo(result.dtype).eps * exact.abs().max().item()
        error = distance(result, exact)
        assert error <= allowed, (
            f"{name} is off by {error:.3g}; twice the error of eager and a rounding is {allowed:.3g}"
        )


def distance(x: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, infinite where there is a NaN."""
    return (x.double() - exact).abs().nan_to_num(nan=float("inf")).max().item()
