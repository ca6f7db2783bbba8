"""Launches of Triton kernels on tensors of the CPU: compiled for a GPU, and executed as compiled."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any
from unittest import mock

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import kernels
from fastbert.backends import select, triton_utils

from .execute import Launch
from .parse import Function, parse
from .shared_memory import Asynchronous

CAPABILITY = 90


@functools.cache
def compiled(kernel: JITFunction, launch: kernels.Launch, stage: str) -> Function:
    """The kernel of a launch after a stage of Triton's compiler.

    "ttir" has whole tensors. "ttgir" has layouts, shared memory, and asynchronous copies and products.
    """
    source = kernels.source_of(kernel, launch)
    target = GPUTarget("cuda", CAPABILITY, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generation = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, generation, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **options.__dict__}
    for name, run in stages.items():
        module = run(module, metadata)
        if name == stage:
            break
    return parse(module.str_nodebug())


@dataclasses.dataclass
class Settings:
    """How launches are run: "ttir" is run for many programs at once, "ttgir" for one after the other.

    ``late_copies`` says whether copies end late and products early, or the other way round; ``ran`` has the names of
    the kernels that were launched.
    """

    stage: str = "ttir"
    late_copies: bool = False
    ran: set[tuple[str, str]] = dataclasses.field(default_factory=set)


settings = Settings()


def _run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for ``JITFunction.run``."""
    launch = kernels.launch_of("", kernel, args, kwargs)
    settings.ran.add((launch.module, launch.kernel))
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    grid = grid(values) if callable(grid) else grid
    arguments = [pair for name, kind in launch.signature if kind != "constexpr" for pair in _named(name, values[name])]
    beside = None if settings.stage == "ttir" else lambda: Asynchronous(settings.late_copies)
    Launch(compiled(kernel, launch, settings.stage), arguments, grid).run(beside)


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    """The parameters that a compiled kernel has for one of the function's, with the function's name for it."""
    if isinstance(value, TensorDescriptor):
        values = [(value.base, value.shape, value.strides), *value.shape, *value.strides]
        return [(name, value) for value in values]
    return [(name, value)]


def _keep_memory() -> None:
    """Values are large and short-lived: the C library keeps their memory, where it can be told to."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def install() -> None:
    """From now on, tensors of the CPU are served by Triton's kernels, as those of a GPU of ``CAPABILITY`` would be."""
    _keep_memory()
    assert not select._INTERPRETING, "TRITON_INTERPRET=1 is set: kernels can't be compiled"
    select._TRITON_DEVICE = "cpu"
    mock.patch.object(JITFunction, "run", _run).start()
    mock.patch.object(triton_utils, "capability", return_value=CAPABILITY).start()
