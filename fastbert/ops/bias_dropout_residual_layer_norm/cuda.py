"""The CUDA build of the compiled fusion: ``csrc/bias_dropout_residual_layer_norm/device.cu``.

Forward: reads x and the residual once, into registers, for the mean, then the variance, then the output: 6 bytes an
element of a 16-bit type, 8 where h is stored for the backward. A warp has a row of up to 1024 columns, a block one of
up to 8192; longer ones are read three times.

Backward: reads dy and h once and writes dresidual and, with dropout, dx: 6 or 8 bytes an element of a 16-bit type. A
block has up to 64 consecutive rows, fewer where there are fewer than 32768, and writes their part of dbias, dweight and
dln_bias: 3 floats a column, 2 to 3% of the traffic at 64 rows; a second kernel adds the parts up. The order of every
sum depends on the shape and the dtype alone. The mask is drawn again, and h is what the forward stored. Rows of more
than 8192 columns, or of more than 2048 where they can't be read 16 bytes at a time, are read twice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastbert.backends import extension
from fastbert.ops.bias_dropout_residual_layer_norm import compiled


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``compiled.forward`` on the current stream."""
    return compiled.forward("device", extension.stream(x), x, *arguments)


def output(x: Tensor, *arguments: Any) -> Tensor:
    """``compiled.output`` on the current stream."""
    return compiled.output("device", extension.stream(x), x, *arguments)


def backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``compiled.backward`` on the current stream."""
    return compiled.backward("device", extension.stream(dy), dy, *arguments)
