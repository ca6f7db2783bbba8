"""Matrix products on the host by the compiled extension: float32 with AVX2 or AVX-512, bfloat16 with AMX.

In csrc/linear/simd.cpp and amx.cpp. It has the functions of ``backends/onednn.py``. Weights are read from memory once,
ahead of their use, and bias, GELU and addition are computed where the sums are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.backends import checks, extension

_ALIGNMENT = 64


def missing(dtype: torch.dtype) -> str | None:
    """Why the products can't be used in ``dtype``, in one sentence; None when they can."""
    if dtype == torch.float32:
        return extension.missing_simd()
    if dtype == torch.bfloat16:
        return extension.missing_amx()
    return f"the extension multiplies in float32 and bfloat16, not in {dtype}"


def instructions(dtype: torch.dtype) -> int:
    """The extension's code of the instructions that it multiplies with in ``dtype``, which must not be missing."""
    module = extension.module()
    code: int = module.AMX if dtype == torch.bfloat16 else module.simd_level()
    return code


def fits(features: int, depth: int) -> bool:
    """Whether a weight ``[features, depth]`` has sizes that the products can have."""
    multiple: int = extension.module().LINEAR_MULTIPLE
    return features % multiple == 0 and depth % multiple == 0


def pack(weight: Tensor) -> Tensor:
    """The weight ``[N, K]`` in the order in which the kernel reads it, ``[N, K]`` (opaque)."""
    weight = extension.dense(weight)
    memory = weight.new_empty(weight.numel() + _ALIGNMENT // weight.itemsize)
    start = -memory.data_ptr() % _ALIGNMENT // weight.itemsize
    packed = memory[start : start + weight.numel()].view(weight.shape)
    features, depth = weight.shape
    extension.module().linear_pack(
        extension.memory(weight), extension.memory(packed), features, depth, instructions(weight.dtype)
    )
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
    return _run(x, weight, bias, extension.dense(other), extension.module().POST_ADD)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, post: int) -> Tensor:
    x = extension.dense(x)
    features, depth = weight.shape
    if x.shape[-1] != depth:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be {depth}, the weight's")
    y = x.new_empty(*x.shape[:-1], features)
    if bias is not None:
        checks.shape("bias", bias, features)
    if other is not None:
        checks.shape("other", other, *y.shape)
    extension.module().linear_forward(
        extension.memory(x),
        extension.memory(weight),
        extension.memory(bias),
        extension.memory(other),
        extension.memory(y),
        y.numel() // features,
        depth,
        features,
        post,
        instructions(x.dtype),
        torch.get_num_threads(),
    )
    return y
