"""The backward of both implementations for GPUs: a Triton kernel makes dh, and two products of cuBLAS take it on."""

from __future__ import annotations

import torch
from torch import Tensor

import fastbert.ops.bias_gelu  # noqa: F401  fills its table
from fastbert.backends import select
from fastbert.backends.triton_utils import rows_of


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx ``[..., H]``, dweight ``[I, H]``, dbias ``[I]``), ``[0]`` where ``output_mask`` leaves one out.

    dbias is summed before dh is rounded to the dtype of ``x``, and in the pass that makes it.
    """
    needs_dx, needs_dweight, needs_dbias = output_mask
    gelu_backward = select.load("bias_gelu", "triton").backward
    dhidden, dbias = gelu_backward(dy, hidden, None, approximate, [needs_dx or needs_dweight, needs_dbias])
    return *_products(dhidden, x, weight, output_mask), dbias


def backward_with_output(
    dy: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, approximate: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """(gelu(h) ``[..., I]``, and what ``backward`` gives), by one pass over h; dy may be overwritten."""
    needs_dx, needs_dweight, needs_dbias = output_mask
    gelu_backward = select.load("bias_gelu", "triton").backward_with_output
    y, dhidden, dbias = gelu_backward(dy, hidden, approximate, [needs_dx or needs_dweight, needs_dbias])
    return y, *_products(dhidden, x, weight, output_mask), dbias


def _products(dhidden: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of dh."""
    needs_dx, needs_dweight, _ = output_mask
    rows = dhidden.view(-1, weight.shape[0])
    return (
        torch.mm(rows, weight).view(x.shape) if needs_dx else x.new_empty(0),
        torch.mm(rows.T, rows_of(x)) if needs_dweight else x.new_empty(0),
    )
