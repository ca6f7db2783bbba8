"""Registration of an op and of its backward with ``torch.library``.

An op is two registered functions, ``fastbert::<name>`` and ``fastbert::<name>_bwd``, whose last argument ``impl`` is
the name of the implementation that runs. Both return contiguous tensors whatever the strides of their inputs. A
backward that takes an ``output_mask`` returns an empty tensor for every gradient that the mask leaves out. Only the
first result of a forward is differentiable; the others are what the backward needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backends import select

NAMESPACE = "fastbert"


def define(
    op: str,
    *,
    forward: str,
    forward_fake: Callable[..., Any],
    backward: str,
    backward_fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    autograd: Callable[..., Any],
) -> None:
    """Register ``fastbert::<op>`` and ``fastbert::<op>_bwd``.

    Args:
        op: the stem: name of the table of implementations.
        forward, backward: schemas without the name; the last argument is ``str impl``.
        forward_fake, backward_fake: shapes and dtypes of the results, for tracing.
        setup_context: saves what the backward needs.
        autograd: the gradients of the forward's arguments, from the context and the gradient of the first result;
            calls ``torch.ops.fastbert.<op>_bwd``.
    """
    forward_name, backward_name = f"{NAMESPACE}::{op}", f"{NAMESPACE}::{op}_bwd"
    torch.library.define(forward_name, forward)
    torch.library.define(backward_name, backward)

    def run_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or there would be zeros for those, as large as they are
        setup_context(ctx, inputs, output)

    def run_autograd(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        return autograd(ctx, grad) if grad is not None else (None,) * len(ctx.needs_input_grad)

    def no_double_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"fastbert.ops.{op} has no second derivative: its backward can't be differentiated")

    for device in ("cpu", "cuda"):
        torch.library.impl(forward_name, device, _kernel(op, "forward", device))
        torch.library.impl(backward_name, device, _kernel(op, "backward", device))
    torch.library.register_fake(forward_name, forward_fake)
    torch.library.register_fake(backward_name, backward_fake)
    torch.library.register_autograd(forward_name, run_autograd, setup_context=run_setup_context)
    torch.library.register_autograd(backward_name, no_double_backward)


def empty_where_masked(tensors: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """Fakes of gradients: one like each tensor, contiguous, or ``[0]`` where ``output_mask`` leaves it out."""
    return tuple(
        like.new_empty(like.shape if wanted else (0,)) for like, wanted in zip(tensors, output_mask, strict=True)
    )


def none_where_masked(gradients: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What autograd wants: None for the gradients that ``output_mask`` leaves out."""
    return tuple(grad if wanted else None for grad, wanted in zip(gradients, output_mask, strict=True))


def _kernel(op: str, direction: str, device: str) -> Callable[..., Any]:
    """What the dispatcher calls: ``direction`` of the implementation that the last argument names.

    Autocast is off in it: the implementation has chosen its dtypes, and a float32 product must stay one. The CUDA
    device of the first argument, a tensor, is the current one: what is launched goes there, and a launch configuration
    is chosen by its facts.
    """

    def run(*args: Any) -> Any:
        if device == "cuda" and args[0].get_device() != torch.cuda.current_device():
            with torch.cuda.device(args[0].device):
                return run(*args)
        function = getattr(select.load(op, args[-1]), direction)
        if not torch.is_autocast_enabled(device):
            return function(*args[:-1])
        with torch.autocast(device, enabled=False):
            return function(*args[:-1])

    return run
