"""The CUDA kernels of csrc, built for the host, in the place of the extension's: they then serve tensors on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from fastbert import ops  # noqa: F401  fills the tables
from fastbert.backends import extension, select

_OPS = ("bias_dropout_residual", "bias_dropout_residual_layer_norm")
Memory = tuple[int, int] | None


def _address(memory: Memory) -> int:
    # Of nothing, the extension makes no address.
    return 0 if memory is None or memory[1] == 0 else memory[0]


class Module(ModuleType):
    """``fastbert._C`` with the device's functions by ``library``, the program of kernels.cpp."""

    def __init__(self, original: ModuleType, library: Path) -> None:
        super().__init__("fastbert._C")
        self.original, self.library = original, ctypes.CDLL(str(library))
        self.launches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def run_in_descending_order(self, descending: bool) -> None:
        self.library.fastbert_descending(int(descending))

    def _call(
        self, function: int, dtype: int, fields: list[Any], eps: float, seed: Memory, threshold: int, scale: float
    ) -> None:
        numbers = [_address(one) if one is None or isinstance(one, tuple) else int(one) for one in fields]
        seed_address = ctypes.c_void_p(_address(seed) if threshold != 65536 else 0)
        self.launches += 1
        self.library.fastbert_call(
            *(function, dtype, (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_float(eps), seed_address),
            *(ctypes.c_uint32(threshold), ctypes.c_float(scale)),
        )

    def bias_dropout_residual_forward_device(
        self, x, bias, residual, out, rows, cols, dtype, seed, threshold, scale, stream
    ):
        self._call(0, dtype, [x, bias, residual, out, rows, cols], 0.0, seed, threshold, scale)

    def bias_dropout_residual_backward_device(
        self, dy, dx, dbias, scratch, rows, cols, dtype, seed, threshold, scale, stream
    ):
        self._call(1, dtype, [dy, dx, dbias, scratch, rows, cols], 0.0, seed, threshold, scale)

    def bias_dropout_residual_layer_norm_forward_device(
        self, x, bias, residual, weight, ln_bias, parameter_dtype, eps, out, hidden, mean, rstd, rows, cols, dtype,
        seed, threshold, scale, stream,
    ):  # fmt: skip
        wide = parameter_dtype == self.FLOAT32
        fields = [x, bias, residual, weight, ln_bias, wide, out, hidden, mean, rstd, rows, cols]
        self._call(2, dtype, fields, eps, seed, threshold, scale)

    def bias_dropout_residual_layer_norm_backward_device(
        self, dy, dy2, hidden, weight, parameter_dtype, mean, rstd, dresidual, dx, dbias, dweight, dln_bias, scratch,
        rows, cols, dtype, seed, threshold, scale, stream,
    ):  # fmt: skip
        wide = parameter_dtype == self.FLOAT32
        fields = [
            dy,
            dy2,
            hidden,
            weight,
            wide,
            mean,
            rstd,
            dresidual,
            dx,
            dbias,
            dweight,
            dln_bias,
            scratch,
            rows,
            cols,
        ]
        self._call(3, dtype, fields, 0.0, seed, threshold, scale)


@contextlib.contextmanager
def served(library: Path) -> Iterator[Module]:
    """While this lasts, impl="cuda" serves tensors on the CPU, and is what is chosen for them."""
    module = Module(extension.module(), library)
    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(extension, "module", return_value=module))
        changes.enter_context(mock.patch.object(extension, "stream", return_value=0))
        for op in _OPS:
            implementations = select.table(op)._implementations
            everywhere = dataclasses.replace(implementations["cuda"], reasons=select.nothing)
            changes.enter_context(mock.patch.dict(implementations, {"cuda": everywhere}))
        yield module
