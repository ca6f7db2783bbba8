"""An encoder layer in inference on a CPU as one call of the compiled extension.

In float32 with AVX2 or AVX-512, in bfloat16 with AMX. It computes what the layer's parts compute one after the other
(``csrc/encoder_layer/encoder_layer.cpp`` calls the same kernels), without Python between them, and in memory that the
layers of a forward share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.backends import extension, host_linear, prepacked
from fastbert.models import upstream
from fastbert.models.packing import Packing

# The memory that the layers of one forward share.
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


class Call(NamedTuple):
    """A layer's call, without the states, the sequences and the memory to compute in.

    ``columns`` of that memory and ``heads`` are for each row of the states. The call has the addresses of ``kept``.
    """

    run: Callable[..., bool]
    columns: int
    heads: int
    kept: list[Tensor | None]


def prepare(layer: Any, hidden: int) -> Call:
    """The call of a layer whose states have ``hidden`` features."""
    attention, module, memory = layer.attention.self, extension.module(), extension.memory
    packed = [prepacked.pack(owner, linears) for owner, linears in owners(layer)]
    weights = [tensor for one in packed for tensor in (one.weight, one.bias)]
    norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    parameters = [extension.dense(p) for norm in norms for p in (norm.weight, norm.bias)]
    approximate = upstream.GELU[type(layer.intermediate.intermediate_act_fn)]
    features, heads = _features(layer), hidden // attention.attention_head_size
    run = functools.partial(
        module.encoder_layer_forward,
        weights=list(map(memory, weights)),
        norms=list(map(memory, parameters)),
        float_norms=norms[0].weight.dtype == torch.float32,
        eps=[norm.eps for norm in norms],
        gelu=module.POST_GELU_ERF if approximate == "none" else module.POST_GELU_TANH,
        heads=heads,
        head_size=attention.attention_head_size,
        hidden=hidden,
        features=features,
        scale=attention.scaling,
    )
    return Call(run, module.encoder_layer_scratch(hidden, features), heads, [*weights, *parameters])


def forward(calls: Sequence[Call], x: Tensor, packing: Packing, workspace: Workspace) -> Tensor | None:
    """``[T, H]`` -> ``[T, H]`` by one layer after the other; None where ``packing`` says more than is true."""
    memory, rows = extension.memory, x.shape[0]
    scratch = _at_least(workspace, "scratch", rows * max(call.columns for call in calls), x, x.dtype)
    # Layers may differ in their number of heads.
    lse = _at_least(workspace, "lse", rows * max(call.heads for call in calls), x, torch.float32)
    given = {
        "cu_seqlens": memory(packing.cu_seqlens),
        "scratch": memory(scratch),
        "lse": memory(lse),
        "rows": rows,
        "sequences": packing.cu_seqlens.shape[0] - 1,
        "max_seqlen": packing.max_seqlen,
        "instructions": host_linear.instructions(x.dtype),
        "num_threads": torch.get_num_threads(),
    }
    x = extension.dense(x)
    # The caller's states stay as they are; a layer's may be written over by the next, which reads them no more by then.
    y = torch.empty_like(x)
    for call in calls:
        if not call.run(x=memory(x), y=memory(y), **given):
            return None
        x = y
    return x


def _at_least(workspace: Workspace, name: str, size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    kept = workspace.get(name)
    if kept is None or kept.numel() < size:
        kept = workspace[name] = like.new_empty(size, dtype=dtype)
    return kept


def _features(layer: Any) -> int:
    """How many there are between the products after attention."""
    (up,) = layer.intermediate.linears()
    return int(up.weight.shape[0])


def owners(layer: Any) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """The modules that own the prepacked weights, as where the parts run one by one."""
    owners = (layer.attention.self, layer.attention.output, layer.intermediate, layer.output)
    return [(owner, owner.linears()) for owner in owners]


def _linears(layer: Any) -> list[nn.Linear]:
    return [linear for _, linears in owners(layer) for linear in linears]
