"""An encoder layer in inference on a CPU as one call of the compiled extension.

In float32 with AVX2 or AVX-512, in bfloat16 with AMX. It computes what the layer's parts compute one after the other
(``csrc/encoder_layer/encoder_layer.cpp`` calls the same kernels), without Python between them, and in memory that the
layers of a forward share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
    if layer.drops():
        return "one call for all of it has no dropout"
    norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    dtypes = {p.dtype for norm in norms for p in (norm.weight, norm.bias)}
    if dtypes not in ({x.dtype}, {torch.float32}):
        return f"the parameters of the LayerNorms aren't all {x.dtype} or all torch.float32"
    hidden, features = x.shape[-1], _features(layer)
    if not (host_linear.fits(hidden, hidden) and host_linear.fits(features, hidden)):
        return f"a size is no multiple of {extension.module().LINEAR_MULTIPLE}"
    # What the call reads and writes follows from these sizes, so every tensor must have them.
    square, up, down = (hidden, hidden), (features, hidden), (hidden, features)
    expected = (square, square, square, square, up, down)
    if hidden % attention.attention_head_size != 0 or any(norm.weight.shape != (hidden,) for norm in norms):
        return f"the heads or the LayerNorms aren't those of {hidden} features"
    if any(linear.weight.shape != shape for linear, shape in zip(_linears(layer), expected, strict=True)):
        return f"a weight hasn't the shape that {hidden} features and {features} in between give it"
    if unsupported := prepacked.unsupported(x, _linears(layer)):
        return unsupported
    return None


def forward(layer: Any, x: Tensor, packing: Packing, approximate: str, workspace: Workspace) -> Tensor | None:
    """``[T, H]`` -> ``[T, H]``; None where ``packing`` says more of the sequences than is true."""
    attention, module = layer.attention.self, extension.module()
    packed = [prepacked.pack(owner, linears) for owner, linears in _owners(layer)]
    norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    rows, hidden = x.shape
    features, heads = _features(layer), hidden // attention.attention_head_size
    columns = module.encoder_layer_scratch(hidden, features)
    scratch = workspace.get("scratch")
    if scratch is None or scratch.numel() != rows * columns:
        scratch = workspace["scratch"] = x.new_empty(rows * columns)
    # Layers may differ in their number of heads.
    lse = workspace.get("lse")
    if lse is None or lse.numel() < heads * rows:
        lse = workspace["lse"] = x.new_empty(heads * rows, dtype=torch.float32)
    parameters = [extension.dense(p) for norm in norms for p in (norm.weight, norm.bias)]
    x, y = extension.dense(x), torch.empty(x.shape, dtype=x.dtype)
    memory = extension.memory
    done = module.encoder_layer_forward(
        x=memory(x),
        y=memory(y),
        cu_seqlens=memory(packing.cu_seqlens),
        weights=[memory(tensor) for one in packed for tensor in (one.weight, one.bias)],
        norms=[memory(parameter) for parameter in parameters],
        float_norms=norms[0].weight.dtype == torch.float32,
        eps=[norm.eps for norm in norms],
        gelu=module.POST_GELU_ERF if approximate == "none" else module.POST_GELU_TANH,
        scratch=memory(scratch),
        lse=memory(lse),
        rows=rows,
        sequences=packing.cu_seqlens.shape[0] - 1,
        max_seqlen=packing.max_seqlen,
        heads=heads,
        head_size=attention.attention_head_size,
        hidden=hidden,
        features=features,
        scale=attention.scaling,
        instructions=host_linear.instructions(x.dtype),
        num_threads=torch.get_num_threads(),
    )
    return y if done else None


def _features(layer: Any) -> int:
    """How many there are between the products after attention."""
    (up,) = layer.intermediate.linears()
    return int(up.weight.shape[0])


def _owners(layer: Any) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """The modules that own the prepacked weights, as where the parts run one by one."""
    owners = (layer.attention.self, layer.attention.output, layer.intermediate, layer.output)
    return [(owner, owner.linears()) for owner in owners]


def _linears(layer: Any) -> list[nn.Linear]:
    return [linear for _, linears in _owners(layer) for linear in linears]
