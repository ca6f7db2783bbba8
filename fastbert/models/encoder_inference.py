"""Inference through an encoder on a GPU: the modules are looked at once, then only kernels are launched.

A forward of few tokens is bound by the host: what ``BertLayer`` and the ops check and choose at every call takes longer
than the kernels. Here the layers' parameters are collected when their modules have been found to be plain, and used for
as long as nothing about these modules has changed, which is asked before every forward in a tenth of a millisecond.
Implementations are chosen once a forward, by ``backends.select``, and called without PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops  # noqa: F401  registers the ops
from fastbert.backends import select
from fastbert.models import encoder_plan, layers
from fastbert.models.joined import Projection
from fastbert.models.packing import Packing

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Layer(NamedTuple):
    """The modules whose numbers are read at every forward, and the parameters."""

    attend: Any
    out_weight: Tensor
    out_bias: Tensor | None
    norm1: nn.LayerNorm
    up_weight: Tensor
    up_bias: Tensor | None
    approximate: str
    down_weight: Tensor
    down_bias: Tensor | None
    norm2: nn.LayerNorm


def unserved(x: Tensor) -> str | None:
    """Why no encoder can take states like ``x`` this way, in one sentence; None when one can."""
    if torch.is_grad_enabled():
        return "gradients may be needed"
    if torch.compiler.is_compiling():
        return "the model is being traced"
    if reason := layers.unserved(x):
        return reason
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses a dtype for each op"
    return None


def forward(
    encoder: Any,
    x: Tensor,
    packing: Packing,
    projections: dict[nn.Module, Projection],
    known: Callable[[], encoder_plan.EncoderPlan] | None,
) -> Tensor | None:
    """``[T, H]`` -> ``[T, H]``; None where the layers have to be called one by one.

    ``known`` is the ``encoder_plan.lookup`` of this forward.
    """
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return forward(encoder, x, packing, projections, known)
    if known is None or not projections or unserved(x) is not None:
        return None
    plan = plan_of(encoder, x.dtype, known())
    if not plan or attention_choice(plan, x.device, x.dtype) != "triton":
        return None
    return run(plan, x, packing, projections)


def attention_choice(plan: list[Layer], device: torch.device, dtype: torch.dtype) -> str:
    """The implementation of attention for the layers; ``run`` takes "triton" only."""
    size = max(layer.attend.attention_head_size for layer in plan)
    return select.table("attention").choose(None, select.Request(device.type, dtype, 0.0, size))


def run(plan: list[Layer], x: Tensor, packing: Packing, projections: dict[nn.Module, Projection]) -> Tensor:
    """``[T, H]`` -> ``[T, H]`` by the layers of ``plan``, on the current device."""
    device, index, dtype = x.device.type, x.device.index, x.dtype
    attention = select.load("attention", "triton").forward
    linear_gelu = select.best("linear_gelu", select.Request(device, dtype)).forward
    fused = select.best("bias_dropout_residual_layer_norm", select.Request(device, dtype, index=index)).output
    cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
    for layer in plan:
        attend = layer.attend
        projection = projections[attend]
        qkv = F.linear(x, projection.weight, projection.bias)
        size = attend.attention_head_size
        qkv = qkv.view(qkv.shape[0], 3, qkv.shape[1] // (3 * size), size)
        context, _ = attention(qkv, cu_seqlens, max_seqlen, attend.scaling, 0.0, None)
        projected = F.linear(context.flatten(1), layer.out_weight)
        norm = layer.norm1
        x = fused(projected, layer.out_bias, x, norm.weight, norm.bias, norm.eps, 0.0, None)
        act, _ = linear_gelu(x, layer.up_weight, layer.up_bias, layer.approximate, False)
        projected = F.linear(act, layer.down_weight)
        norm = layer.norm2
        x = fused(projected, layer.down_bias, x, norm.weight, norm.bias, norm.eps, 0.0, None)
    return x


def plan_of(encoder: Any, dtype: torch.dtype, known: encoder_plan.EncoderPlan) -> list[Layer]:
    """The layers, for states of ``dtype``; none where a part is not what it seems or computes something else."""
    plan: list[Layer] | None = known.found.get("inference")
    if plan is None:
        one_dtype = len({tensor.dtype for tensor in known.tensors}) == 1
        plan = known.found["inference"] = _new_plan(encoder) if one_dtype else []
    return plan if plan and plan[0].out_weight.dtype == dtype else []


def _new_plan(encoder: Any) -> list[Layer]:
    if layers.unusual(encoder, layers.BertEncoder) or any(map(is_called, encoder.modules())):
        return []
    found = []
    for layer in encoder.layer:
        if layers.unusual(layer, layers.BertLayer) or layer.unfused() is not None:
            return []
        attend: Any = layer.attention.self
        if layers.unusual(attend, layers.BertSelfAttention) or attend.unfused() is not None:
            return []
        (out,), (up,), (down,) = (part.linears() for part in (layer.attention.output, layer.intermediate, layer.output))
        approximate = layers.gelu_approximation(layer.intermediate.intermediate_act_fn)
        assert approximate is not None
        made = Layer(
            *(attend, out.weight, out.bias, layer.attention.output.LayerNorm),
            *(up.weight, up.bias, approximate),
            *(down.weight, down.bias, layer.output.LayerNorm),
        )
        if not _fits(made, *attend.query.weight.shape):
            return []
        found.append(made)
    return found


def is_called(module: nn.Module) -> bool:
    """Whether something wants to see the module's inputs or outputs, or trains it."""
    return module.training or any(getattr(module, name) for name in _HOOKS) or "forward" in module.__dict__


def _fits(layer: Layer, heads: int, hidden: int) -> bool:
    """Whether the parameters are those of a layer of ``hidden`` features, ``heads`` of them for all heads together."""
    features = layer.up_weight.shape[0]
    shapes = ((hidden, heads), (features, hidden), (hidden, features))
    weights = (layer.out_weight, layer.up_weight, layer.down_weight)
    return all(weight.shape == shape for weight, shape in zip(weights, shapes, strict=True)) and all(
        norm.weight.shape == (hidden,) for norm in (layer.norm1, layer.norm2)
    )
