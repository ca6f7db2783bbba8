"""Argument checks shared by the ops: each error names the argument, its value and what it may be."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import philox


def floating(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` holds floating-point numbers."""
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it may be any floating dtype")


def rows(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` holds floating-point numbers, ValueError unless its rows have elements."""
    floating(name, x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; its last dimension must have at least one element")


def integers(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` holds int32 or int64 numbers."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be torch.int32 or torch.int64")


def shape(name: str, x: Tensor, *expected: int) -> None:
    """Raise ValueError unless ``x`` has exactly the shape ``expected``."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(expected)}")


def vector(name: str, x: Tensor, size: int) -> None:
    """Raise TypeError unless ``x`` holds floating-point numbers, ValueError unless its shape is ``[size]``."""
    floating(name, x)
    shape(name, x, size)


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors (None is skipped) are on the device of the first one."""
    present = [(name, x) for name, x in tensors.items() if x is not None]
    first, reference = present[0]
    for name, x in present[1:]:
        if x.device != reference.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {reference.device}, where {first} is")


def one_of(name: str, value: object, *allowed: object) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it may be {' or '.join(map(repr, allowed))}")


def probability(name: str, p: float) -> None:
    """Raise ValueError unless ``0 <= p <= 1``."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} is {p}; it must be between 0 and 1")


def dropout_seed(p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed to pass to an op: None when ``p`` is too small to drop anything; drawn when the caller gave none.

    Raises:
        TypeError: ``seed`` is no int64 tensor.
        ValueError: ``seed`` has more than one element, or is on another device.
    """
    if philox.threshold(p) == 1 << 16:
        return None
    if seed is None:
        return philox.new_seeds(1, device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed has dtype {seed.dtype}; it must be torch.int64")
    if seed.numel() != 1:
        raise ValueError(f"seed has shape {tuple(seed.shape)}; it must hold one element")
    if seed.device != device:
        raise ValueError(f"seed is on {seed.device}; it must be on {device}, where the other arguments are")
    return seed
