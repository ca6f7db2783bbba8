"""The choice of an implementation: who can serve a call, who can't and why.

Every op lists its implementations in a ``Table``, best first. Each of them gives reasons against serving a request;
no reason means that it can. ``impl=None`` takes the first that can; an explicit ``impl`` never falls back.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from fastbert.backends import extension


@dataclass(frozen=True)
class Request:
    """The facts about a call that decide who can serve it.

    ``device`` is a ``torch.device.type``; ``dtype`` that of the computation; ``dropout_p`` the probability of the
    dropout inside the op; ``head_size`` is set by attention only; ``index`` is that of a CUDA device, where it matters
    which one it is.
    """

    device: str
    dtype: torch.dtype
    dropout_p: float = 0.0
    head_size: int | None = None
    index: int | None = None


class UnsupportedError(RuntimeError):
    """An explicitly requested implementation can't serve the call; the message holds its reasons."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``module`` is imported at first use; it has ``forward`` and ``backward`` with the arguments of the op's schema
    less ``impl``. ``reasons`` yields one sentence for each fact of a request that it can't serve.
    """

    name: str
    module: str
    reasons: Callable[[Request], Iterator[str]]


class Choice(NamedTuple):
    """One row of an explanation: an implementation, whether it is the one that runs, and why it can't."""

    op: str
    implementation: str
    chosen: bool
    reasons: tuple[str, ...]


class Table:
    """The implementations of one op, best first."""

    def __init__(self, op: str, implementations: tuple[Implementation, ...]) -> None:
        self.op = op
        self._implementations = {implementation.name: implementation for implementation in implementations}
        self._modules: dict[str, ModuleType] = {}
        _TABLES[op] = self

    @property
    def names(self) -> tuple[str, ...]:
        """The names that ``impl`` may take."""
        return tuple(self._implementations)

    def choose(self, impl: str | None, request: Request) -> str:
        """The implementation that serves ``request``.

        Raises:
            ValueError: ``impl`` is no implementation of this op.
            UnsupportedError: ``impl`` can't serve the request, or (with None) nothing can.
        """
        if impl is None:
            for name, implementation in self._implementations.items():
                if next(implementation.reasons(request), None) is None:
                    return name
            raise UnsupportedError(f"{self.op}: no implementation can serve {request}; {self._all_reasons(request)}")
        if impl not in self._implementations:
            raise ValueError(f"{self.op}: impl is {impl!r}; it may be None or one of {', '.join(self.names)}")
        reasons = list(self._implementations[impl].reasons(request))
        if reasons:
            raise UnsupportedError(f"{self.op}: impl={impl!r} can't serve this call: {'; '.join(reasons)}")
        return impl

    def load(self, name: str) -> ModuleType:
        """The module of an implementation, imported at its first use."""
        module = self._modules.get(name)
        if module is None:
            module = self._modules[name] = importlib.import_module(self._implementations[name].module)
        return module

    def explain(self, request: Request) -> list[Choice]:
        """Every implementation with its reasons against ``request``, the chosen one marked."""
        rows = []
        found = False
        for name, implementation in self._implementations.items():
            reasons = tuple(implementation.reasons(request))
            rows.append(Choice(self.op, name, not reasons and not found, reasons))
            found = found or not reasons
        return rows

    def _all_reasons(self, request: Request) -> str:
        return "; ".join(f"{row.implementation}: {', '.join(row.reasons)}" for row in self.explain(request))


_TABLES: dict[str, Table] = {}


def table(op: str) -> Table:
    """The table of an op that has been imported."""
    return _TABLES[op]


def load(op: str, name: str) -> ModuleType:
    """The module of implementation ``name`` of ``op``."""
    return _TABLES[op].load(name)


def best(op: str, request: Request) -> ModuleType:
    """The module of the implementation of ``op`` that ``impl=None`` chooses for ``request``."""
    return load(op, _TABLES[op].choose(None, request))


def explain(request: Request) -> list[Choice]:
    """Every implementation of every op with its reasons against ``request``."""
    return [row for op in _TABLES.values() for row in op.explain(request)]


def nothing(request: Request) -> Iterator[str]:
    """No reason against anything: the support of a reference."""
    yield from ()


def needs_device(request: Request, *devices: str) -> Iterator[str]:
    """A reason unless the request's tensors are on one of ``devices``."""
    if request.device not in devices:
        yield f"it runs on {' and '.join(devices)}, and the tensors are on {request.device}"


def needs_dtype(request: Request, *dtypes: torch.dtype) -> Iterator[str]:
    """A reason unless the request's dtype is one of ``dtypes``."""
    if request.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield f"it computes in {names}, and the dtype is {str(request.dtype).removeprefix('torch.')}"


def needs_no_dropout(request: Request) -> Iterator[str]:
    """A reason if the request has dropout."""
    if request.dropout_p > 0.0:
        yield "it can't draw the exact dropout mask, and the dropout probability is not 0"


def needs_host_extension(request: Request) -> Iterator[str]:
    """A reason if the host kernels of the extension can't be used."""
    if reason := _missing_extension():
        yield reason


def needs_amx(request: Request) -> Iterator[str]:
    """A reason if the host kernels for the matrix unit of AMX can't be used."""
    if reason := _missing_amx():
        yield reason


def needs_simd(request: Request) -> Iterator[str]:
    """A reason if the host kernels for AVX2 and AVX-512 can't be used."""
    if reason := _missing_simd():
        yield reason


def needs_cuda_extension(request: Request) -> Iterator[str]:
    """A reason if the CUDA kernels of the extension can't be used, or not on the request's device."""
    if reason := _missing_cuda_extension(request.index):
        yield reason


def needs_triton(request: Request) -> Iterator[str]:
    """Reasons if Triton kernels can't run on the request's device."""
    yield from needs_device(request, _TRITON_DEVICE)
    if _INTERPRETING:
        yield "TRITON_INTERPRET=1 is set, and Triton's interpreter doesn't know the assembly in these kernels"
    if reason := _missing_triton():
        yield reason


def needs_capability(request: Request, least: int) -> Iterator[str]:
    """A reason if the compute capability of the request's GPU, times ten, is below ``least``."""
    capability = _capability(request.index) if request.device == "cuda" else None
    if capability is not None and capability < least:
        yield f"it needs compute capability {least / 10}, and the device has {capability / 10}"


def _is_on(value: str) -> bool:
    """Whether Triton takes the value of one of its environment variables for true."""
    return value.lower() in ("1", "true", "on", "yes", "y")


# Tests have another one: they run what the compiler makes for a GPU on the CPU.
_TRITON_DEVICE = "cuda"
# As Triton does, at import: its kernels are made for the interpreter or for a GPU once and for all.
_INTERPRETING = _is_on(os.environ.get("TRITON_INTERPRET", ""))


# torch.compile takes these answers as they are: it can't trace an import.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing_extension() -> str | None:
    return extension.missing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing_amx() -> str | None:
    return extension.missing_amx()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing_simd() -> str | None:
    return extension.missing_simd()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing_cuda_extension(index: int | None) -> str | None:
    return extension.missing_cuda() if index is None else extension.missing_on_device(index)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _missing_triton() -> str | None:
    return _import_triton()


# Of a GPU; None without one.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int | None) -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _import_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton can't be imported ({error}): `pip install triton`"
    return None
