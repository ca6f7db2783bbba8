"""Launches of Triton kernels that find their compiled kernel at once.

Triton's own way from ``kernel[grid](...)`` to a launch looks at every argument anew, for what a kernel is specialised
on. That took 58 µs of a slow host where the kernel itself takes five. Here the compiled kernel that a launch has found
is kept under what it depends on, which is a handful of facts, and launched as Triton's tutorials launch one that they
compiled beforehand: ``compiled[grid](...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import attrgetter, itemgetter, methodcaller, or_
from typing import Any

_DTYPE = attrgetter("dtype")
_ADDRESS = methodcaller("data_ptr")
# Triton compiles a kernel for pointers at multiples of this, and another for others.
_ALIGNMENT = 16
# Far more than the models of a process need. Sizes that change at every call must not fill the memory.
_MOST = 256


def _getter(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The elements of a tuple at ``positions``, as a tuple whatever their number."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple(args[position] for position in positions)


class Launcher:
    """Launches of one kernel, a function under ``triton_utils.jit``.

    The kernel's parameters are the runtime arguments and then the constants. Names of pointers end in ``_ptr``. A
    pointer that Triton tells apart by its alignment is a tensor at every launch, and the first argument is one. Names
    of TMA's descriptors end in ``_desc``: their dtype matters, and their block, which is among the constants.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        # Of the parameters that a kernel is specialised on; looked up at the first launch.
        self._pointers: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
        self._numbers: Callable[[tuple[Any, ...]], tuple[Any, ...]]
        self._descriptors: Callable[[tuple[Any, ...]], tuple[Any, ...]]
        self._names: list[str]

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Launch ``grid`` programs on the current device, which is that of the tensors.

        ``constants`` are the kernel's and Triton's options, by name.
        """
        key = self.key(args, constants) if args[0].is_cuda else None
        found = self._compiled.get(key)
        if found is not None:
            compiled, values = found
            compiled[(*grid, 1, 1)](*args, *values)
            return
        compiled = self.kernel[grid](*args, **constants)
        if key is not None and compiled is not None:
            if len(self._compiled) >= _MOST:
                self._compiled.clear()
            self._compiled[key] = compiled, tuple(constants[name] for name in self._names)

    def key(self, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...] | None:
        """What the compiled kernel depends on; None where a pointer isn't aligned, which Triton has to look at."""
        if self._pointers is None:
            parameters = self.kernel.params
            runtime = [one for one in parameters if not one.is_constexpr]
            self._names = [one.name for one in parameters if one.is_constexpr]
            told = [not (one.do_not_specialize or one.do_not_specialize_on_alignment) for one in runtime]
            pointer = [one.name.endswith("_ptr") for one in runtime]
            descriptor = [one.name.endswith("_desc") for one in runtime]
            number = [told[i] and not (pointer[i] or descriptor[i]) for i in range(len(runtime))]
            self._numbers = _getter([i for i in range(len(runtime)) if number[i]])
            self._descriptors = _getter([i for i in range(len(runtime)) if descriptor[i]])
            self._pointers = _getter([i for i in range(len(runtime)) if told[i] and pointer[i]])
        tensors = self._pointers(args)
        if reduce(or_, map(_ADDRESS, tensors)) % _ALIGNMENT:
            return None
        described = map(_described, self._descriptors(args))
        return args[0].get_device(), *map(_DTYPE, tensors), *described, *self._numbers(args), *constants.items()


def _described(descriptor: Any) -> Any:
    """The dtype of what a descriptor is of; None for none."""
    return None if descriptor is None else descriptor.base.dtype
