"""Launch configurations of the Triton kernels: block sizes, warps and pipeline stages, read from ``launch.toml``.

The table is keyed on (kernel, shape class, compute capability), found by ``python -m benchmarks.tune`` and committed:
nothing is tuned at run time. A device takes the entry of the highest capability that isn't above its own, or the lowest
there is.
"""

from __future__ import annotations

import functools
import tomllib
from importlib import resources

from fastbert.backends import triton_utils


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """kernel -> shape class -> capability -> options."""
    return tomllib.loads(resources.files("fastbert.backends").joinpath("launch.toml").read_text(encoding="utf-8"))


def options(kernel: str, shape_class: str) -> dict[str, int]:
    """The options of ``kernel`` for a class of shapes on the present device, a fresh dict.

    With them goes that multiply-adds are fused: Triton's default for that is not the same in all versions.

    Raises:
        KeyError: the table has no such kernel or class.
    """
    return fused(_options(kernel, shape_class, triton_utils.capability()))


def fused(options: dict[str, int]) -> dict[str, int]:
    """``options`` with multiply-adds fused."""
    return {**options, "enable_fp_fusion": True}


def row_class(hidden: int) -> str:
    """The shape class of kernels that take rows of ``hidden`` elements whole."""
    return next((f"H <= {bound}" for bound in (512, 768, 1024, 2048, 4096) if hidden <= bound), "H > 4096")


@functools.cache
def _options(kernel: str, shape_class: str, capability: int) -> dict[str, int]:
    entries = {int(key): value for key, value in table()[kernel][shape_class].items()}
    served = [key for key in entries if key <= capability]
    return entries[max(served)] if served else entries[min(entries)]
