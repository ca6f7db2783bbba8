"""Matrix products in bfloat16 on processors with AMX, by the compiled extension: csrc/linear/amx.cpp.

It has the functions of ``backends/onednn.py``. Weights are streamed from memory ahead of their use, and bias, GELU and
addition are computed while the matrix unit is at work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import extension

_ALIGNMENT = 64


def missing(dtype: torch.dtype) -> str | None:
    """Why the products can't be used in ``dtype``, in one sentence; None when they can."""
    if dtype != torch.bfloat16:
        return f"the kernels for AMX compute in bfloat16, not in {dtype}"
    return extension.missing_amx()


def fits(features: int, depth: int) -> bool:
    """Whether a weight ``[features, depth]`` comes in whole tiles."""
    multiple: int = extension.module().LINEAR_MULTIPLE
    return features % multiple == 0 and depth % multiple == 0


def pack(weight: Tensor) -> Tensor:
    """The weight ``[N, K]`` in the order in which the kernel reads it, ``[N, K]`` (opaque)."""
    weight = weight.contiguous()
    memory = weight.new_empty(weight.numel() + _ALIGNMENT // weight.itemsize)
    start = -memory.data_ptr() % _ALIGNMENT // weight.itemsize
    packed = memory[start : start + weight.numel()].view(weight.shape)
    extension.module().linear_amx_pack(weight.data_ptr(), packed.data_ptr(), *weight.shape)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """xWᵀ + b: ``[..., K]`` -> ``[..., N]``."""
    return _run(x, weight, bias, None, extension.module().POST_NONE)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(xWᵀ + b); ``approximate`` is "none" (erf) or "tanh"."""
    module = extension.module()
    return _run(x, weight, bias, None, module.POST_GELU_ERF if approximate == "none" else module.POST_GELU_TANH)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """xWᵀ + b + other; ``x`` is ``[..., K]``, ``other`` ``[..., N]``."""
    return _run(x, weight, bias, other.contiguous(), extension.module().POST_ADD)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, post: int) -> Tensor:
    x = x.contiguous()
    features, depth = weight.shape
    y = x.new_empty(*x.shape[:-1], features)
    extension.module().linear_amx_forward(
        x.data_ptr(),
        weight.data_ptr(),
        extension.address(bias),
        extension.address(other),
        y.data_ptr(),
        y.numel() // features,
        depth,
        features,
        post,
        torch.get_num_threads(),
    )
    return y
