"""Linear layers of CPU inference: oneDNN matrix products with prepacked weights and fused post-operations.

torch's CPU builds carry the two operators that Inductor uses when it freezes weights: one reorders a weight into the
layout of oneDNN's kernels, the other multiplies by it and applies bias, GELU or an addition while the result is still
in cache. The reordered copy is private: it is held here, keyed on the module that owns the weight, never saved, and
rebuilt when the weight has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Writes through ``.data`` leave a tensor's version counter alone, so a few of its elements are compared as well.
_SAMPLES = 64
# oneDNN blocks a long sum badly in 16 bits for some numbers of rows: with K = 3072 and N = 768 on two cores with AMX,
# 700 to 1310 rows run at 0.95 TFLOP/s whole and at 1.5 to 1.7 when they come 384 at a time; below and above that range
# the whole product runs at 1.6 to 1.9. At K = 768 it is the faster one at any size.
_SLOW_ROWS = range(512, 1450)
_BLOCK_ROWS = 384
_LONG_SUM = 2048


class PackedLinear(NamedTuple):
    """A reordered weight ``[N, K]`` (opaque) and its bias ``[N]``, or None."""

    weight: Tensor
    bias: Tensor | None


class _Entry(NamedTuple):
    """What a packed weight was made of. ``views`` are strided views of the parameters, ``samples`` what they held.

    The views keep the parameters' memory, so that an address in ``stamp`` can't come to mean another tensor.
    """

    stamp: tuple[object, ...]
    views: tuple[Tensor, ...]
    samples: tuple[Tensor, ...]
    packed: PackedLinear

    def holds(self, stamp: tuple[object, ...]) -> bool:
        return self.stamp == stamp and all(map(torch.equal, self.views, self.samples))


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_lock = threading.Lock()


@cache
def missing(dtype: torch.dtype) -> str | None:
    """Why prepacked linears can't be used in ``dtype``, in one sentence; None when they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN's prepacked linear computes in float32, bfloat16 and float16, not in {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN (torch.backends.mkldnn.is_available() is False)"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 kernels for this processor"
        if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return "oneDNN has no float16 kernels for this processor"
        x = torch.ones(2, 8, dtype=dtype)
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(8, 8, dtype=dtype))
        y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "gelu", [], "none")
        torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this build of torch can't run oneDNN's prepacked linear ({str(error).splitlines()[0]})"
    if not torch.equal(y, torch.full((2, 8), 8.0, dtype=dtype)):
        return "oneDNN's prepacked linear gives a wrong product on this processor"
    return None


def unsupported(x: Tensor, linears: Sequence[nn.Linear]) -> str | None:
    """Why ``x`` can't be multiplied by the prepacked weights of ``linears``, in one sentence; None when it can."""
    if x.device.type != "cpu":
        return f"prepacked linears run on the cpu, and the tensors are on {x.device.type}"
    if torch.compiler.is_compiling():
        return "the model is being traced, and a prepacked weight is no part of a graph"
    parameters = _parameters(linears)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        return "gradients are needed, and a prepacked weight has none (use torch.no_grad() or torch.inference_mode())"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, which casts the weights at every use"
    for parameter in parameters:
        if parameter.dtype != x.dtype:
            return f"the input is {x.dtype} and a weight or bias {parameter.dtype}"
        if parameter.is_inference():
            return "a weight was made in inference mode, where torch doesn't tell whether it has changed"
    if x.numel() == 0:
        return "there is nothing to multiply"
    return missing(x.dtype)


def pack(owner: nn.Module, linears: Sequence[nn.Linear]) -> PackedLinear:
    """The prepacked weight of one linear layer, or of several side by side (their outputs are concatenated).

    The copy belongs to ``owner`` and is rebuilt if a weight or bias has another address, dtype, shape or version
    counter than before, or if one of a few sampled elements differs.
    """
    parameters = _parameters(linears)
    stamp = tuple([(p.data_ptr(), p._version, p.dtype, p.shape) for p in parameters])
    entry = _entries.get(owner)
    if entry is not None and entry.holds(stamp):
        return entry.packed
    with torch.no_grad(), _lock:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        packed = PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight), bias)
        views = tuple(p.detach().reshape(-1)[:: _sample_step(p)] for p in parameters)
        _entries[owner] = _Entry(stamp, views, tuple(view.clone() for view in views), packed)
    return packed


def drop(owner: nn.Module) -> None:
    """Forget the prepacked weight of ``owner``, if there is one.

    Not while tracing: the graph would depend on what is held here, and be compiled again whenever that changes.
    """
    if not torch.compiler.is_compiling():
        _entries.pop(owner, None)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """xWᵀ + b: ``[..., K]`` -> ``[..., N]``."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
    return y


def linear_gelu(x: Tensor, packed: PackedLinear, approximate: str) -> Tensor:
    """gelu(xWᵀ + b), the activation applied inside the product; ``approximate`` is "none" (erf) or "tanh"."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "gelu", [], approximate)
    return y


def linear_add(x: Tensor, packed: PackedLinear, other: Tensor) -> Tensor:
    """xWᵀ + b + other, the addition inside the product; ``x`` is ``[..., K]``, ``other`` ``[..., N]``, contiguous."""
    if x.dim() == 2 and x.itemsize == 2 and x.shape[1] >= _LONG_SUM and x.shape[0] in _SLOW_ROWS:
        blocks = zip(x.split(_BLOCK_ROWS), other.split(_BLOCK_ROWS), strict=True)
        return torch.cat([_linear_add(rows, packed, added) for rows, added in blocks])
    return _linear_add(x, packed, other)


def _linear_add(x: Tensor, packed: PackedLinear, other: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed.weight, packed.bias, "add")
    return y


def _parameters(linears: Sequence[nn.Linear]) -> list[Tensor]:
    return [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]


def _sample_step(parameter: Tensor) -> int:
    """The distance of samples in a flattened parameter: off whole rows by the golden section, to meet all columns."""
    return max(1, parameter.numel() // _SAMPLES - round(0.382 * parameter.shape[-1]))
