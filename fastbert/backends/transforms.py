"""Whether torch transforms what runs: ``torch.func`` (``grad``, ``vmap`` ...) or forward-mode differentiation."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether one of them is at work. The fused ops have no rules for them: they would raise, or lose tangents."""
    if torch.compiler.is_compiling():
        return False
    # torch has no public question for either.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
