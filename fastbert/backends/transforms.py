"""Whether torch transforms or exports what runs, for which the fused ops have no rules."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether ``torch.func`` (``grad``, ``vmap`` ...) or forward-mode differentiation is at work.

    The fused ops would raise there, or lose tangents.
    """
    if torch.compiler.is_compiling():
        return False
    # torch has no public question for either.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def exporting() -> bool:
    """Whether ``torch.export`` traces, by itself or for an exporter to another format: all but its strict mode.

    In strict mode Dynamo traces, where torch before 2.14 says that it exports when it compiles.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
