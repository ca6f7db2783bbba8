"""An encoder layer in inference on a CPU as one call of the compiled extension.

In float32 with AVX2 or AVX-512, in bfloat16 with AMX. It computes what the layer's parts compute one after the other
(``csrc/encoder_layer/encoder_layer.cpp`` calls the same kernels), without Python between them, and in memory that the
layers of a forward share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

from fastbert.backends import extension, host_linear, prepacked
from fastbert.models.packing import Packing

# What the layers of one forward share: the scratch memory of the first of them.
Workspace = dict[str, Tensor]


def unserved(x: Tensor) -> str | None:
    """Why no layer can take states like ``x`` in one call, in one sentence; None when one can."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return "one call for all of it is for CPUs, outside of torch.compile"
    if torch.is_grad_enabled() and x.requires_grad:
        return "gradients are needed, and one call for all of it has none"
    return host_linear.missing(x.dtype)


def reason(layer: Any, x: Tensor) -> str | None:
    """Why ``layer``, whose parts are all what they seem, can't take states like ``x`` in one call; None if it can."""
    attention = layer.attention.self
    dropouts = (attention.dropout, layer.attention.output.dropout, layer.output.dropout)
    if any(dropout.p > 0.0 and dropout.training for dropout in dropouts):
        return "one call for all of it has no dropout"
    norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    dtypes = {p.dtype for norm in norms for p in (norm.weight, norm.bias) if p is not None}
    if any(norm.weight is None or norm.bias is None for norm in norms) or dtypes not in ({x.dtype}, {torch.float32}):
        return f"a LayerNorm has no bias, or parameters that aren't all {x.dtype} or all torch.float32"
    hidden, features = x.shape[-1], layer.intermediate.dense.out_features
    if not (host_linear.fits(hidden, hidden) and host_linear.fits(features, hidden)):
        return f"a size is no multiple of {extension.module().LINEAR_MULTIPLE}"
    if unsupported := prepacked.unsupported(x, _linears(layer)):
        return unsupported
    return None


def forward(layer: Any, x: Tensor, packing: Packing, approximate: str, workspace: Workspace) -> Tensor | None:
    """``[T, H]`` -> ``[T, H]``; None where ``packing`` says more of the sequences than is true."""
    attention, module = layer.attention.self, extension.module()
    packed = [prepacked.pack(owner, linears) for owner, linears in _owners(layer)]
    norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    rows, hidden = x.shape
    features, heads = layer.intermediate.dense.out_features, attention.num_attention_heads
    columns = module.encoder_layer_scratch(hidden, features)
    scratch = workspace.get("scratch")
    if scratch is None or scratch.numel() != rows * columns:
        scratch = workspace["scratch"] = x.new_empty(rows * columns)
        workspace["lse"] = x.new_empty(heads * rows, dtype=torch.float32)
    x, y = x.contiguous(), torch.empty_like(x)
    done = module.encoder_layer_forward(
        x.data_ptr(),
        y.data_ptr(),
        packing.cu_seqlens.data_ptr(),
        [address for one in packed for address in (one.weight.data_ptr(), extension.address(one.bias))],
        [address for norm in norms for address in (norm.weight.data_ptr(), norm.bias.data_ptr())],
        norms[0].weight.dtype == torch.float32,
        [norm.eps for norm in norms],
        module.POST_GELU_ERF if approximate == "none" else module.POST_GELU_TANH,
        scratch.data_ptr(),
        workspace["lse"].data_ptr(),
        rows,
        packing.cu_seqlens.shape[0] - 1,
        packing.max_seqlen,
        heads,
        hidden,
        features,
        attention.scaling,
        host_linear.instructions(x.dtype),
        torch.get_num_threads(),
    )
    return y if done else None


def _owners(layer: hf.BertLayer) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """The modules that own the prepacked weights, as where the parts run one by one."""
    attention = layer.attention.self
    return [
        (attention, (attention.query, attention.key, attention.value)),
        (layer.attention.output, (layer.attention.output.dense,)),
        (layer.intermediate, (layer.intermediate.dense,)),
        (layer.output, (layer.output.dense,)),
    ]


def _linears(layer: hf.BertLayer) -> list[nn.Linear]:
    return [linear for _, linears in _owners(layer) for linear in linears]
