"""Calls of the Triton implementations, forward or backward, for what compiles and what times their kernels.

Each function takes sizes and a device, makes the tensors there (without memory on "meta") and returns the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

TOKENS = 16_384
VOCABULARY = 30_522

Call = Callable[[torch.device], Callable[[], object]]


def attention(
    heads: int, size: int, dtype: torch.dtype, max_seqlen: int, dropout_p: float, backward: bool, device: torch.device
) -> Callable[[], object]:
    module = importlib.import_module("fastbert.ops.attention.triton")
    qkv = torch.empty(TOKENS, 3, heads, size, dtype=dtype, device=device).normal_()
    cu_seqlens = torch.arange(0, TOKENS + 1, max_seqlen, dtype=torch.int32, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout_p > 0.0 else None
    arguments = (cu_seqlens, max_seqlen, size**-0.5, dropout_p, seed)
    if not backward:
        return lambda: module.forward(qkv, *arguments)
    out, lse = module.forward(qkv, *arguments)
    return lambda: module.backward(out, qkv, out, lse, *arguments)


def layer_norm(hidden: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Callable[[], object]:
    module = importlib.import_module("fastbert.ops.layer_norm.triton")
    x = torch.empty(TOKENS, hidden, dtype=dtype, device=device).normal_()
    mean = torch.zeros(TOKENS, 1, device=device)
    if not backward:
        return lambda: module.forward(x, x[0], x[0], 1e-12)
    return lambda: module.backward(x, x, x[0], mean, mean, [True, True, True])


def embedding(
    hidden: int, dtype: torch.dtype, dropout_p: float, backward: bool, device: torch.device
) -> Callable[[], object]:
    module = importlib.import_module("fastbert.ops.embedding_layer_norm.triton")
    sizes = (VOCABULARY, 512, 2)
    ids = [torch.zeros(TOKENS, dtype=torch.int64, device=device).random_(rows) for rows in sizes]
    tables = [torch.empty(rows, hidden, dtype=dtype, device=device).normal_() for rows in sizes]
    y = torch.empty(TOKENS, hidden, dtype=dtype, device=device).normal_()
    mean = torch.zeros(TOKENS, 1, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout_p > 0.0 else None
    if not backward:
        return lambda: module.forward(*ids, *tables, y[0], y[0], 1e-12, dropout_p, seed, 0)
    return lambda: module.backward(y, *ids, *tables, y[0], mean, mean, dropout_p, seed, 0, [True] * 5)


def bias_gelu(
    columns: int,
    dtype: torch.dtype,
    approximate: str,
    backward: bool,
    device: torch.device,
    with_output: bool = False,
) -> Callable[[], object]:
    module = importlib.import_module("fastbert.ops.bias_gelu.triton")
    x = torch.empty(TOKENS, columns, dtype=dtype, device=device).normal_()
    if with_output:
        dy = torch.empty_like(x).normal_()
        return lambda: module.backward_with_output(dy, x, approximate, [True, True])
    if not backward:
        return lambda: module.forward(x, x[0], approximate)
    return lambda: module.backward(x, x, x[0], approximate, [True, True])


def linear_gelu(
    features: int,
    hidden: int,
    dtype: torch.dtype,
    tokens: int,
    needs_hidden: bool,
    device: torch.device,
    route: str = "triton",
) -> Callable[[], object]:
    module = importlib.import_module(f"fastbert.ops.linear_gelu.{route}")
    x = torch.empty(tokens, hidden, dtype=dtype, device=device).normal_()
    weight = torch.empty(features, hidden, dtype=dtype, device=device).normal_()
    bias = weight[:, 0].contiguous()
    return lambda: module.forward(x, weight, bias, "none", needs_hidden)


def unpad(dtype: torch.dtype, seqlen: int, with_ids: bool, device: torch.device) -> Callable[[], object]:
    module = importlib.import_module("fastbert.ops.unpad.triton")
    mask = torch.ones(TOKENS // seqlen, seqlen, dtype=torch.int64, device=device).to(dtype)
    ids = torch.zeros(TOKENS // seqlen, seqlen, dtype=torch.int64, device=device)
    if with_ids:
        return lambda: module.unpad_ids(mask, True, ids, ids)
    return lambda: module.unpad(mask, mask > 0, False)
