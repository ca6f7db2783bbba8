"""The one comparison behind every parity test."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Record:
    """One comparison: the largest error of ``what`` in ``test``, and the largest that was allowed."""

    test: str
    what: str
    dtype: str
    device: str
    error: float
    allowed: float


RECORDS: list[Record] = []


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")


def results(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor], dy: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of ``function(**tensors)``, and for each tensor the gradient that ``dy`` gives it."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient_like(output) if dy is None else dy)
    return output.detach(), {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def gradient_like(output: Tensor) -> Tensor:
    """Random numbers, the same ones each time, to be the incoming gradient of ``output``."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(output)


def check(
    actual: Mapping[str, Callable[..., Tensor]],
    oracle: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    dy: Tensor | None = None,
    roundings: int | Mapping[str, int] = 1,
) -> None:
    """Assert that each of ``actual`` is about as near to the truth as eager PyTorch, in output and every gradient.

    The truth is ``oracle`` in float64, differentiated by autograd. The largest error may be twice that of ``eager``,
    which computes in the dtype of ``tensors``, plus one rounding step of that dtype at the truth's largest magnitude.

    Args:
        actual: what to check, by a name for the message.
        oracle, eager: like those, called with ``tensors`` as keywords.
        tensors: floating-point; with these strides and offsets for all but the oracle.
        dy: the incoming gradient, in the dtype of the output; None: random numbers.
        roundings: the number of rounding steps, for all or by the names in ``actual``; more than one for a few numbers,
            where eager may be exact by luck, and for arithmetic that is known to be that much coarser.
    """
    eager_output, eager_gradients = results(eager, tensors, dy)
    if dy is None:
        dy = gradient_like(eager_output)
    exact_output, exact_gradients = results(oracle, {name: x.double() for name, x in tensors.items()}, dy.double())
    for name, function in actual.items():
        output, gradients = results(function, tensors, dy)
        steps = roundings if isinstance(roundings, int) else roundings[name]
        compare(f"{name}: output", output, exact_output, eager_output, steps)
        for argument, gradient in gradients.items():
            compare(f"{name}: {argument}", gradient, exact_gradients[argument], eager_gradients[argument], steps)


def compare(name: str, result: Tensor, exact: Tensor, baseline: Tensor, roundings: int = 1) -> None:
    """Assert that ``result`` is at most twice as far from ``exact`` as ``baseline``, plus some rounding steps."""
    assert exact.dtype == torch.float64
    assert exact.isfinite().all(), f"{name}: the oracle is not finite"
    assert result.shape == exact.shape, f"{name} has shape {result.shape}, and the oracle's is {exact.shape}"
    if exact.numel() > 0:
        step = torch.finfo(result.dtype).eps * exact.abs().max().item()
        allowed = 2.0 * distance(baseline, exact) + roundings * step
        error = distance(result, exact)
        RECORDS.append(Record(_test(), name, str(result.dtype), result.device.type, error, allowed))
        assert error <= allowed, f"{name} is off by {error:.3g}; {allowed:.3g} is allowed"


def distance(x: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, infinite where there is a NaN."""
    return (x.double() - exact).abs().nan_to_num(nan=float("inf")).max().item()
