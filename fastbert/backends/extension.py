"""The compiled extension ``fastbert._C``: loaded when first asked for, and never a reason for an import to fail."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import struct
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# Before _C: torch's OpenMP runtime is then the one that _C finds, and both share one pool of threads.
import torch
from torch import Tensor

from fastbert._version import __version__

_REINSTALL = "reinstall with `pip install --force-reinstall --no-deps .` in fastbert's source tree"
_DTYPES = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


class _Attempt(NamedTuple):
    module: ModuleType | None
    reason: str | None


def _check_complete() -> None:
    """Raise ImportError if the extension's file is cut off: the loader would map what isn't there and crash.

    The offsets are those of a 64-bit little-endian ELF file; files of other formats are left to their loaders.
    """
    spec = importlib.util.find_spec("fastbert._C")
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin)
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.startswith(b"\x7fELF\x02\x01") or len(head) < 64:
        return
    (table,) = struct.unpack_from("<Q", head, 32)
    entry_size, entries = struct.unpack_from("<HH", head, 54)
    size = path.stat().st_size
    for entry in range(table, min(table + entries * entry_size, len(head)), entry_size):
        offset, length = struct.unpack_from("<Q16xQ", head, entry + 8)
        if offset + length > size:
            raise ImportError(f"{path} is cut off: it has {size} bytes of at least {offset + length}")


@functools.cache
def _attempt() -> _Attempt:
    try:
        _check_complete()
        module = importlib.import_module("fastbert._C")
        version = module.build_info()["version"]
    except Exception as error:  # whatever a damaged or foreign file raises: it becomes the reason
        return _Attempt(None, f"fastbert._C could not be loaded ({type(error).__name__}: {error}): {_REINSTALL}")
    if version != __version__:
        return _Attempt(None, f"fastbert._C was built for fastbert {version}, and this is {__version__}: {_REINSTALL}")
    return _Attempt(module, None)


def load() -> ModuleType | None:
    """``fastbert._C``, or None where it can't be used: ``missing()`` tells why."""
    return _attempt().module


def module() -> ModuleType:
    """``fastbert._C``.

    Raises:
        ImportError: it can't be used; the message is that of ``missing()``.
    """
    module, reason = _attempt()
    if module is None:
        raise ImportError(reason)
    return module


def missing() -> str | None:
    """Why the extension's host kernels can't be used and what to do about it, in one sentence; None if they can."""
    return _attempt().reason


def missing_amx() -> str | None:
    """Why the extension's host kernels for AMX can't be used, in one sentence; None if they can."""
    module, reason = _attempt()
    return reason if module is None else module.amx_missing()


def missing_simd() -> str | None:
    """Why the extension's host kernels for AVX2 and AVX-512 can't be used, in one sentence; None if they can."""
    module, reason = _attempt()
    if module is None:
        return reason
    if not module.simd_level():
        return (
            "this processor lacks AVX2 or what goes with it (x86-64-v3), or the compiler that built fastbert._C can't "
            "make use of it"
        )
    return None


def missing_cuda() -> str | None:
    """Why the extension has no CUDA kernels and what to do about it, in one sentence; None if it has.

    This is about the build only and leaves CUDA alone; ``missing_on_device`` asks the GPU.
    """
    module, reason = _attempt()
    if module is None:
        return reason
    absent = module.build_info()["cuda_absent"]
    if absent is not None:
        return (
            f"fastbert._C was built without CUDA ({absent}): install the CUDA toolkit, then rebuild from the source "
            "tree with `pip install . -C cmake.define.FASTBERT_CUDA=ON`"
        )
    return None


def missing_on_device(index: int) -> str | None:
    """Why the extension's CUDA kernels can't run on CUDA device ``index``, in one sentence; None if they can."""
    return missing_cuda() or _device_error(index)


@functools.cache
def _device_error(index: int) -> str | None:
    with torch.cuda.device(index):
        error = module().device_error()
    if error is None:
        return None
    info = module().build_info()
    return (
        f"fastbert._C, built with CUDA {info['cuda_version']} for {info['cuda_architectures']}, can't run on "
        f"{torch.cuda.get_device_name(index)} ({error}): update the driver, or rebuild from the source tree with "
        "`pip install . -C cmake.define.FASTBERT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native`"
    )


def dtype_code(dtype: torch.dtype) -> int:
    """The extension's code of ``dtype``.

    Raises:
        ImportError: the extension can't be used.
        TypeError: the extension doesn't compute in ``dtype``.
    """
    name = _DTYPES.get(dtype)
    if name is None:
        raise TypeError(f"dtype is {dtype}; fastbert._C computes in {', '.join(map(str, _DTYPES))}")
    code: int = getattr(module(), name)
    return code


def dense(tensor: Tensor) -> Tensor:
    """``tensor`` as the extension takes it, or a copy: contiguous, its elements at multiples of their size.

    Weights of a mapped file may lie anywhere.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def memory(tensor: Tensor | None) -> tuple[int, int] | None:
    """The address of the first element of ``tensor`` and the bytes from there on; None for None.

    They mean nothing once ``tensor`` is gone: the caller keeps it until the call has returned.

    Raises:
        ValueError: ``tensor`` is not contiguous.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}; it must be contiguous"
        )
    return tensor.data_ptr(), tensor.nbytes


def stream(tensor: Tensor) -> int:
    """The current stream of the CUDA device of ``tensor``, as the extension takes it.

    As in the code that torch's own compiler generates: ``torch.cuda.current_stream`` takes longer than a launch.
    """
    found: int = torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return found
