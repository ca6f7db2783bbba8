"""The public function ``attention``."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.attention import schema  # noqa: F401  registers the op


def _triton_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_triton(request)
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16)
    if request.head_size is not None and request.head_size > 128:
        yield f"it has kernels for head sizes up to 128, and this one is {request.head_size}"


def _flash_reasons(request: select.Request) -> Iterator[str]:
    """Of the kernels that PyTorch and the package flash-attn have in common."""
    if request.device != "cuda":
        yield from select.needs_device(request, "cuda")
        return  # the rest would matter there only
    yield from select.needs_dtype(request, torch.float16, torch.bfloat16)
    yield from select.needs_no_dropout(request)
    if request.head_size is not None and (request.head_size > 256 or request.head_size % 8 != 0):
        yield f"its head sizes are multiples of 8 up to 256, and this one is {request.head_size}"


def _flash_attn_reasons(request: select.Request) -> Iterator[str]:
    yield from _flash_reasons(request)
    if request.device == "cuda" and (reason := _missing_flash_attn()):
        yield reason


# torch.compile takes the answer as it is: it can't trace an import.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing_flash_attn() -> str | None:
    return _import_flash_attn()


@functools.cache
def _import_flash_attn() -> str | None:
    try:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        return f"the package flash-attn can't be imported ({error}): `pip install flash-attn --no-build-isolation`"
    if not hasattr(interface, "_wrapped_flash_attn_varlen_forward"):
        return "the installed flash-attn is older than 2.7: `pip install --upgrade flash-attn --no-build-isolation`"
    return None


def _amx_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cpu")
    yield from select.needs_dtype(request, torch.bfloat16)
    yield from select.needs_no_dropout(request)
    if request.device == "cpu":
        yield from select.needs_amx(request)


def _simd_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cpu")
    yield from select.needs_dtype(request, torch.float32)
    yield from select.needs_no_dropout(request)
    if request.device == "cpu":
        yield from select.needs_simd(request)


def _sdpa_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cpu")
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    yield from select.needs_no_dropout(request)


def _cpu_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_device(request, "cpu")
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16)
    yield from select.needs_host_extension(request)


_MODULE = "fastbert.ops.attention"
TABLE = select.Table(
    "attention",
    (
        select.Implementation("triton", f"{_MODULE}.triton", _triton_reasons),
        select.Implementation("flash_attn", f"{_MODULE}.flash_attn", _flash_attn_reasons),
        select.Implementation("torch_varlen", f"{_MODULE}.torch_varlen", _flash_reasons),
        select.Implementation("amx", f"{_MODULE}.host", _amx_reasons),
        select.Implementation("simd", f"{_MODULE}.host", _simd_reasons),
        select.Implementation("sdpa", f"{_MODULE}.sdpa", _sdpa_reasons),
        select.Implementation("cpu", f"{_MODULE}.cpu", _cpu_reasons),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``dropout(softmax(scale * Q @ K.T)) @ V`` for each head of each sequence of a packed batch.

    Sequence ``b`` is the rows ``cu_seqlens[b]`` up to ``cu_seqlens[b + 1]``, and may be empty. Rows from
    ``cu_seqlens[-1]`` on belong to no sequence: they come out as zeros, get zero gradients, and whatever they hold
    reaches no other row.

    Args:
        qkv: ``[T, 3, A, D]``, queries, keys and values of A heads of size D, any floating dtype and strides.
        cu_seqlens: int32 ``[B + 1]``, ascending from 0 to at most T, any stride.
        max_seqlen: at least the length of the longest sequence; tokens of a longer one are an error that only a CPU
            can see.
        scale: of the scores; None: ``1 / sqrt(D)``.
        dropout_p: probability of dropping an attention probability, quantised to multiples of 2**-16.
        seed: int64 with one element, on the device of ``qkv``; None draws one from torch's default generator.
        impl: "triton" (CUDA, heads up to 128), "flash_attn" (that package) or "torch_varlen" (PyTorch's; both CUDA,
            16 bits, no dropout, heads of 8, 16 ... 256), "amx" (CPUs that have it, bfloat16, no dropout), "simd" (CPUs
            with AVX2 or AVX-512, float32, no dropout), "sdpa" (CPU, no dropout), "cpu", "reference", or None for the
            first of them that can serve the call.

    Returns:
        ``[T, A, D]``, contiguous, in the dtype of ``qkv``.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value than it must have.
        UnsupportedError: ``impl`` can't serve the call.
    """
    checks.rows("qkv", qkv)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be (T, 3, A, D)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it must be torch.int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (B + 1,)")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}; it may be 0 or more")
    checks.probability("dropout_p", dropout_p)
    checks.same_device(qkv=qkv, cu_seqlens=cu_seqlens)
    seed = checks.dropout_seed(dropout_p, seed, qkv.device)
    size = qkv.shape[3]
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    request = select.Request(qkv.device.type, qkv.dtype, 0.0 if seed is None else dropout_p, size)
    chosen = TABLE.choose(impl, request)
    output: Tensor = torch.ops.fastbert.attention(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, chosen)[0]
    return output
