"""Two passes: the best ``bias_dropout_residual`` there is, then the best ``layer_norm``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

import fastbert.ops.bias_dropout_residual
import fastbert.ops.layer_norm  # noqa: F401  both fill their tables
from fastbert.backends import select


def _best(op: str, x: Tensor, p: float = 0.0) -> ModuleType:
    return select.best(op, select.Request(x.device.type, x.dtype, p, index=x.device.index))


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    needs_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, each ``[..., H]``, mean, rstd, each ``[..., 1]``), the last three ``[0]`` without a backward."""
    hidden = _best("bias_dropout_residual", x, p).forward(x, bias, residual, p, seed)
    y, mean, rstd = _best("layer_norm", hidden).forward(hidden, weight, ln_bias, eps)
    if not needs_backward:
        return y, hidden.new_empty(0), mean.new_empty(0), rstd.new_empty(0)
    return y, hidden, mean, rstd


def output(*arguments: Any) -> Tensor:
    """y ``[..., H]`` alone, from the arguments of ``forward`` less the last."""
    given: Any = (*arguments, True)  # needs_backward
    return forward(*given)[0]


def backward(
    dy: Tensor,
    dy2: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    seed: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """(dresidual ``[..., H]``, dx ``[..., H]``, dbias, dweight, dln_bias ``[H]``).

    ``dy2`` is a second gradient of the output. The last three are ``[0]`` where ``output_mask`` leaves them out; dx is
    ``[0]`` without dropout, where it equals dresidual.
    """
    needs_dbias, needs_dweight, needs_dln_bias = output_mask
    dy = dy if dy2 is None else dy + dy2
    dhidden, dweight, dln_bias = _best("layer_norm", hidden).backward(
        dy, hidden, weight, mean, rstd, [True, needs_dweight, needs_dln_bias]
    )
    if seed is None:
        dx = hidden.new_empty(0)
        rows = dhidden.reshape(-1, dhidden.shape[-1])
        dbias = rows.sum(0) if needs_dbias else hidden.new_empty(0)
    else:
        dx, dbias = _best("bias_dropout_residual", hidden, p).backward(dhidden, p, seed, needs_dbias)
    return dhidden, dx, dbias, dweight, dln_bias
