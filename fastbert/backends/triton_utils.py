"""What the Triton kernels share: dropout draws, products, the normal distribution and facts about the device.

Only modules with kernels import this file, so that everything else works without Triton. ``backends/philox.py`` is the
oracle of the draws.

With ``TRITON_INTERPRET=1`` in the environment before the first import, Triton runs every kernel in its interpreter, on
the CPU: slow, and exact enough to test them without a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton gives the decorated functions no types.
jit: Any = triton.jit

# The models' seeds are elements of one tensor, every other of them at a multiple of 16 bytes. A kernel isn't compiled
# twice for that.
SEEDS = ("seed_ptr",)

DRAWS_PER_CALL = tl.constexpr(8)


@jit
def _halves(w0, w1, w2, w3):
    """Split four words of a Philox call into eight 16-bit draws: ``[..., N]`` x 4 -> ``[..., 8 * N]``."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., N, 2, 2], word 2 * i + j at (i, j)
    draws = tl.join(words & 0xFFFF, words >> 16)  # [..., N, 2, 2, 2]
    if len(w0.shape) == 1:
        return tl.reshape(draws, [w0.shape[0] * 8])
    return tl.reshape(draws, [w0.shape[0], w0.shape[1] * 8])


@jit
def hidden_keep(seed, group, threshold):
    """The keep mask of elements ``8 * group`` to ``8 * group + 7`` of a hidden state: ``[..., N]`` -> ``[..., 8 * N]``.

    ``seed`` is an int64 scalar, ``group`` int64 with one or two dimensions, ``threshold`` that of ``philox.py``.
    """
    zero = tl.zeros(group.shape, dtype=tl.uint32)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    return _halves(w0, w1, w2, w3).to(tl.int32) < threshold


@jit
def attention_keep(seed, sequence, head, query, key_group, threshold):
    """The keep mask of ``query`` (``[M]``) and keys ``8 * key_group ..`` (``[N]``): bool ``[M, 8 * N]``.

    ``sequence`` and ``head`` are scalars; query and key count from the first token of the sequence.
    """
    zero = tl.zeros([query.shape[0], key_group.shape[0]], dtype=tl.uint32)
    c0 = zero + key_group.to(tl.uint32)[None, :]
    c1 = zero + query.to(tl.uint32)[:, None]
    c2 = zero + head.to(tl.uint32)
    c3 = zero + sequence.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    return _halves(w0, w1, w2, w3).to(tl.int32) < threshold


@jit
def normal(x, TANH: tl.constexpr):
    """(Phi(x), Phi'(x)) of the normal distribution, or of its approximation (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)).

    GELU is ``x * Phi(x)``. The approximation comes from the exponential of -2 |u|, which never overflows; no digits
    cancel in 1 - Phi.
    """
    if TANH:
        u2 = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        e = tl.exp(-tl.abs(u2))
        share = 1.0 / (1.0 + e)
        phi = tl.where(u2 > 0, share, e * share)
        return phi, e * share * share * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)), 0.3989422804014327 * tl.exp(-0.5 * x * x)


# As Triton does, at import: its kernels are made for the interpreter or for a GPU once and for all.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@jit
def _tail(x, TANH: tl.constexpr):
    """(a, e, share, density): ``1 - Phi(a) = e * share`` and ``Phi'(a) = e * density``, to about 2e-5 of each.

    ``a`` is ``|x|``, but at most 14, from where on nothing is left of either. Each step is one instruction; rsqrt is
    there because a division is eight. ``share`` is a polynomial of ``1 / (1 + 0.36 * a)``, the form of Abramowitz and
    Stegun 7.1.26. Its coefficients keep its relative error below 1.3e-5 for all of ``a``. Theirs bound the absolute
    error of Phi, and leave few digits of a tail.
    """
    a = tl.minimum(tl.abs(x), 14.0, propagate_nan=tl.PropagateNan.ALL)
    if TANH:
        square = a * a
        e = tl.exp2(a * (-2.302208198 - 0.1029432397 * square))
        root = tl.rsqrt(1.0 + e)
        share = root * root
        return a, e, share, share * share * (1.5957691216 + 0.2140644488 * square)
    e = tl.exp2(a * (-0.7213475204 * a))
    root = tl.rsqrt(1.0 + 0.36 * a)
    t = root * root
    share = 0.2543874643 - 0.09851565534 * t
    share = 0.03511640278 + share * t
    share = 0.1686957674 + share * t
    share = 0.1401240744 + share * t
    share = 0.0001912894593 + share * t
    return a, e, share, tl.full(a.shape, 0.3989422804, tl.float32)


@jit
def gelu(x, TANH: tl.constexpr, SHORT: tl.constexpr):
    """``x * Phi(x)`` of float32 ``x``. SHORT: to about 2e-5 of it, which is little for a result of 16 bits."""
    if SHORT:
        a, e, share, _ = _tail(x, TANH)
        return tl.maximum(x, 0.0) - (a * e) * share
    phi, _ = normal(x, TANH)
    return x * phi


@jit
def gelu_grad(x, TANH: tl.constexpr, SHORT: tl.constexpr):
    """The derivative of ``gelu``. SHORT: to about 2e-5 of each of its two terms."""
    if SHORT:
        a, e, share, density = _tail(x, TANH)
        lower = e * (share - a * density)
        return tl.where(x > 0, 1.0 - lower, lower)
    phi, density = normal(x, TANH)
    return phi + x * density


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return _INTERPRETED


def capability() -> int:
    """The compute capability of the present CUDA device times ten: 90 for Hopper; 0 in the interpreter."""
    return 0 if interpreted() else _capability_of(torch.cuda.current_device())


@functools.cache
def _capability_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has; where there is none, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@jit
def _tf32(x):
    """``x`` rounded to TF32, ties away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; ``acc`` may be None, ``PRECISION`` is that of ``dot_precision``."""
    if PRECISION == "interpreted":
        if a.dtype == tl.float32:  # what the compiler makes of tf32x3
            a_high, b_high = _tf32(a), _tf32(b)
            acc = tl.dot(_tf32(a - a_high), b_high, acc)
            acc = tl.dot(a_high, _tf32(b - b_high), acc)
            return tl.dot(a_high, b_high, acc)
        else:  # the interpreter's product takes bfloat16 for integers
            return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


def dot_precision() -> str:
    """How ``dot`` multiplies float32: by "tf32" where torch allows it in matrix products, otherwise by "tf32x3".

    The latter splits each number into two of TF32, which differ from it by at most half a unit of its last place, and
    adds up three of their four products on the tensor cores (Ootomo and Yokota, arXiv:2203.03341). Products that aren't
    split would leave the tensor cores, and Triton then holds their operands in registers, where they don't fit.
    """
    if interpreted():
        return "interpreted"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def pieces(size: int) -> tuple[int, int]:
    """Two powers of two that cover ``size`` with few to spare, the larger one first and none beyond: 768 as 512, 256.

    The second is 0 where the first covers all.
    """
    first = triton.next_power_of_2(size + 1) // 2
    return first, triton.next_power_of_2(size - first) if size > first else 0


def rows_of(x: Tensor) -> Tensor:
    """``[..., H]`` -> ``[rows, H]``, each row contiguous; a copy only where the strides ask for one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
