"""Linear-GELU by "persistent", "triton" or "cublas_triton", whichever was measured to be the fastest for the shape.

``by_shape.toml`` holds what was measured. A shape that isn't in it goes to "cublas_triton": its product is the best
there is, and nobody has shown that the fused one beats it there. The choice is made inside the op, where sizes are
plain numbers, so that a program traced with sizes unknown still makes it for each call.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import torch
from torch import Tensor

from fastbert.backends import select
from fastbert.backends.triton_utils import capability
from fastbert.ops.linear_gelu.gradients import backward, backward_with_output

__all__ = ["backward", "backward_with_output", "faster", "forward", "rows_class"]

MEASURED = Path(__file__).with_suffix(".toml")
ROUTES = ("persistent", "triton", "cublas_triton")
UNMEASURED = "cublas_triton"
_FEWEST_ROWS = 64
_MOST_ROWS = 65_536


def rows_class(rows: int) -> int:
    """The class of M: ``rows`` rounded up to a power of two from 64 to 65536, where more rows change little."""
    return min(max(_FEWEST_ROWS, 1 << (rows - 1).bit_length()), _MOST_ROWS)


# (compute capability times ten, dtype, N, K, whether h is kept, class of M)
Key = tuple[int, str, int, int, bool, int]


def read(path: Path) -> dict[Key, str]:
    """What a table of measurements says: the implementation for each key.

    Raises:
        ValueError: an entry names another implementation than ``ROUTES``, or a number of rows that is no class.
    """
    found = {}
    for entry in tomllib.loads(path.read_text())["measured"]:
        for rows, route in entry["faster"].items():
            if route not in ROUTES or rows_class(int(rows)) != int(rows):
                raise ValueError(f"{path}: {rows} = {route!r} is not a class of M and one of {', '.join(ROUTES)}")
            shape = entry["capability"], entry["dtype"], entry["N"], entry["K"]
            found[*shape, entry["training"], int(rows)] = route
    return found


@functools.cache
def _measured() -> dict[Key, str]:
    return read(MEASURED)


def faster(dtype: torch.dtype, M: int, N: int, K: int, training: bool) -> str:
    """The implementation for ``[M, K]`` times ``[N, K]`` transposed on the present device; ``training`` keeps h."""
    key = (capability(), str(dtype).removeprefix("torch."), N, K, training, rows_class(M))
    return _measured().get(key, UNMEASURED)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, needs_hidden: bool
) -> tuple[Tensor, Tensor]:
    """(gelu(h) ``[..., I]``, h ``[..., I]``, or ``[0]`` where it isn't needed)."""
    (N, K), rows = weight.shape, x.numel() // x.shape[-1]
    implementation = select.load("linear_gelu", faster(x.dtype, rows, N, K, needs_hidden))
    output: tuple[Tensor, Tensor] = implementation.forward(x, weight, bias, approximate, needs_hidden)
    return output
