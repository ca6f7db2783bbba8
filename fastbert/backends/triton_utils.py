"""What the Triton kernels share: dropout draws, products, the normal distribution and facts about the device.

Only modules with kernels import this file, so that everything else works without Triton. ``backends/philox.py`` is the
oracle of the draws.
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


@jit
def _philox4x32(seed, c0, c1, c2, c3):
    """Seven rounds of Philox4x32: four words from the counter ``c0 .. c3``, uint32 tensors or scalars, and the seed.

    A product of 64 bits is one instruction; ``tl.umulhi`` and a product of 32 bits would be two.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def hidden_words(seed, group):
    """The four words that serve elements ``8 * group`` to ``8 * group + 7`` of a hidden state; ``group`` is int64."""
    zero = tl.zeros(group.shape, dtype=tl.uint32)
    return _philox4x32(seed, (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero)


@jit
def hidden_keep(seed, group, threshold):
    """The keep mask of elements ``8 * group`` to ``8 * group + 7`` of a hidden state: ``[..., N]`` -> ``[..., 8 * N]``.

    ``seed`` is an int64 scalar, ``group`` int64 with one or two dimensions, ``threshold`` that of ``philox.py``.
    """
    w0, w1, w2, w3 = hidden_words(seed, group)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., N, 2, 2], word 2 * i + j at (i, j)
    draws = tl.join(words & 0xFFFF, words >> 16)  # [..., N, 2, 2, 2]
    keep = draws.to(tl.int32) < threshold
    if len(group.shape) == 1:
        return tl.reshape(keep, [group.shape[0] * 8])
    else:
        return tl.reshape(keep, [group.shape[0], group.shape[1] * 8])


# The halves of two words, the low one of each or the high one, by a permutation of bytes: $3 has 0 or 0x22 for each.
_HALVES = tl.constexpr("""{
    .reg .b32 bytes;
    shr.u32 bytes, $3, 8;
    or.b32 bytes, bytes, $3;
    add.u32 bytes, bytes, 0x5410;
    prmt.b32 $0, $1, $2, bytes;
}""")


@jit
def attention_draws(
    seed, sequence, head, first_query, first_key, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The halves of words that serve ``M`` queries and ``N`` keys: uint16 ``[M, N]``, or ``[N, M]`` if ``TRANSPOSED``.

    ``M`` and ``N`` are powers of two from 16 on, ``first_query`` a multiple of ``M`` and ``first_key`` one of ``N``. In
    the layout of the tensor cores' results all draws of a call of Philox are one thread's own; half of them where
    ``TRANSPOSED``. As there is no join, the compiler draws in the layout in which the draws are used.
    """
    # Query = 16 i + 8 j + k and key = 16 i + 8 j + 2 k + l; a call serves both j and l.
    query_i = tl.reshape(tl.arange(0, M // 16), [M // 16, 1, 1, 1, 1, 1, 1])
    query_j = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1, 1, 1])
    query_k = tl.reshape(tl.arange(0, 8), [1, 1, 8, 1, 1, 1, 1])
    key_i = tl.reshape(tl.arange(0, N // 16), [1, 1, 1, N // 16, 1, 1, 1])
    key_j = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2, 1, 1])
    key_k = tl.reshape(tl.arange(0, 4), [1, 1, 1, 1, 1, 4, 1])
    key_l = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 2])
    # These sums have no carries. As exclusive or they become part of Philox's own.
    query_group = (first_query >> 1 ^ query_i * 8 + query_k).to(tl.uint32)
    key_group = (first_key >> 2 ^ key_i * 4 + key_k).to(tl.uint32)
    w0, w1, w2, w3 = _philox4x32(seed, head.to(tl.uint32), key_group, sequence.to(tl.uint32), query_group)
    word = tl.where(query_j == 0, tl.where(key_j == 0, w0, w1), tl.where(key_j == 0, w2, w3))
    if TRANSPOSED:
        args = [word, (key_l * 0x22).to(tl.uint16)]
        draws = tl.inline_asm_elementwise(_HALVES, "=r,r,r,r", args, dtype=tl.uint16, is_pure=True, pack=2)
    else:
        # Half of the words are low halves of products. LLVM would take those apart, and then put words together.
        word = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)
        draws = (word >> (key_l * 16).to(tl.uint32)).to(tl.uint16)
    return tl.trans(tl.reshape(draws, [M, N])) if TRANSPOSED else tl.reshape(draws, [M, N])


_DROP_16 = tl.constexpr("""{
    .reg .b32 draws, keep;
    abs.f16x2 draws, $2;
    set.geu.u32.f16x2 keep, draws, $3;
    xor.b32 keep, keep, $4;
    and.b32 $0, $1, keep;
}""")
_DROP_32 = tl.constexpr("""{
    .reg .b32 draws;
    .reg .pred low, high, few;
    setp.ne.u32 few, $6, 0;
    abs.f16x2 draws, $4;
    setp.geu.xor.f16x2 low|high, draws, $5, few;
    selp.b32 $0, $2, 0, low;
    selp.b32 $1, $3, 0, high;
}""")


@jit
def attention_drop(x, draws, threshold):
    """``x`` where it is kept, zero elsewhere; ``threshold`` is ``philox.attention_threshold``.

    A comparison of halves takes two draws in one instruction. Their 15 bits, as float16, are in the order of integers
    up to infinity, 31744, and beyond it are no numbers, for which "not less" holds; the bound is at most 16384.
    """
    few = threshold < 16384
    bound = tl.where(few, threshold, 32768 - threshold)
    args = [x, draws, bound.to(tl.uint16), tl.where(few, 0xFFFF, 0).to(tl.uint16)]
    if x.dtype == tl.float32:
        return tl.inline_asm_elementwise(_DROP_32, "=r,=r,r,r,r,r,r", args, dtype=tl.float32, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_DROP_16, "=r,r,r,r,r", args, dtype=x.dtype, is_pure=True, pack=2)


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


def capability() -> int:
    """The compute capability of the present CUDA device times ten: 90 for Hopper."""
    of_all = _capability_of_all()
    return _capability_of(torch.cuda.current_device()) if of_all is None else of_all


@functools.cache
def _capability_of_all() -> int | None:
    """That of every device, where they are alike: to ask which is the present one takes two microseconds a launch."""
    found = {_capability_of(device) for device in range(torch.cuda.device_count())}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _capability_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has; where there is none, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; ``acc`` may be None, ``PRECISION`` is that of ``dot_precision``."""
    return tl.dot(a, b, acc, input_precision=PRECISION)


def dot_precision(dtype: torch.dtype) -> str:
    """How ``dot`` multiplies float32: by "tf32" where torch allows it in matrix products, otherwise by "tf32x3".

    The latter splits each number into two of TF32, which differ from it by at most half a unit of its last place, and
    adds up three of their four products on the tensor cores (Ootomo and Yokota, arXiv:2203.03341). Products that aren't
    split would leave the tensor cores, and Triton then holds their operands in registers, where they don't fit. In 16
    bits it makes no difference, and the answer is always the same, so that nothing is compiled twice.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def ceil_div(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count`` elements. Triton's own is for kernels, and slow on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that isn't below ``count``, which is 1 at least."""
    return 1 << (count - 1).bit_length()


@functools.cache
def pieces(size: int) -> tuple[int, int]:
    """Two powers of two that cover ``size`` with few to spare, the larger one first and none beyond: 768 as 512, 256.

    The second is 0 where the first covers all.
    """
    first = next_power_of_2(size + 1) // 2
    return first, next_power_of_2(size - first) if size > first else 0


def rows_of(x: Tensor) -> Tensor:
    """``[..., H]`` -> ``[rows, H]``, each row contiguous; a copy only where the strides ask for one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
