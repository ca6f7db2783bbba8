"""Query, key and value weights side by side, so that each layer's projection is one product.

Where weights aren't prepacked (``backends/prepacked.py``: on a GPU, for instance) inference joins those of all layers
anew at each forward, by a launch or two for the whole model. Nothing has to be known of when a weight changes, and
there is no wait for the device to find out. The memory is the forward's own: forwards on several streams don't meet.
For BERT-base in 16 bits that is 42 MB read and written, 18 µs at an H200's 4.8 TB/s (data sheet); joining them layer by
layer took two launches a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.backends import prepacked
from fastbert.models import encoder_plan

_REQUIRES_GRAD = attrgetter("requires_grad")


class Projection(NamedTuple):
    """The joined weight ``[3 * H, H]`` and bias ``[3 * H]`` of a layer."""

    weight: Tensor
    bias: Tensor | None


class Plan(NamedTuple):
    """What is joined.

    ``biased`` tells which of the self-attention modules has biases; ``rows`` and ``bias_rows`` are the numbers of rows
    of each joined weight and of each joined bias.
    """

    attentions: list[nn.Module]
    weights: list[Tensor]
    biases: list[Tensor]
    biased: list[bool]
    rows: list[int]
    bias_rows: list[int]


def join(
    encoder: Any, x: Tensor, known: Callable[[], encoder_plan.EncoderPlan] | None = None
) -> dict[nn.Module, Projection]:
    """The projections of the self-attention modules of ``encoder`` that can be joined, for ``x``.

    Empty in training, where the joint weight has to be differentiated, while tracing, and where weights are prepacked.
    ``known`` is the ``encoder_plan.lookup`` of this forward.
    """
    if torch.compiler.is_compiling() or (x.device.type == "cpu" and prepacked.missing(x.dtype) is None):
        return {}
    if torch.is_grad_enabled() and x.requires_grad:
        return {}
    plan = plan_of(encoder, encoder_plan.of(encoder) if known is None else known())
    if not plan.weights or plan.weights[0].device != x.device:
        return {}
    if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, (*plan.weights, *plan.biases))):
        return {}
    return join_all(plan)


def join_all(plan: Plan) -> dict[nn.Module, Projection]:
    """The projections of a plan that has any."""
    with torch.no_grad():
        weights = torch.cat(plan.weights).split(plan.rows)
        biases = iter(torch.cat(plan.biases).split(plan.bias_rows) if plan.biases else ())
    projections = [Projection(w, next(biases) if b else None) for w, b in zip(weights, plan.biased, strict=True)]
    return dict(zip(plan.attentions, projections, strict=True))


def plan_of(encoder: Any, known: encoder_plan.EncoderPlan) -> Plan:
    """What can be joined of an encoder; no weights where nothing can."""
    plan: Plan | None = known.found.get("joined")
    if plan is None:
        plan = _new_plan(encoder)
        # A tensor that is a plain attribute may be replaced without a trace in the snapshot.
        watched = set(map(id, known.tensors))
        if all(id(parameter) in watched for parameter in (*plan.weights, *plan.biases)):
            known.found["joined"] = plan
    return plan


def _new_plan(encoder: Any) -> Plan:
    attentions = [layer.attention.self for layer in encoder.layer]
    chosen = [one for one in attentions if _is_plain(one.query.weight) and one.unfused() is None]
    linears = [linear for attention in chosen for linear in attention.linears()]
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    # Offloaded and flattened weights are here, and in shape, only while their layer runs.
    if len({(p.device, p.dtype) for p in (*weights, *biases)}) != 1 or any(
        linear.weight.shape != (linear.out_features, linears[0].in_features) for linear in linears
    ):
        return Plan([], [], [], [], [], [])
    biased = [linear.bias is not None for linear in linears[::3]]
    rows = [3 * linear.weight.shape[0] for linear in linears[::3]]
    bias_rows = [count for count, has_bias in zip(rows, biased, strict=True) if has_bias]
    return Plan(chosen, weights, biases, biased, rows, bias_rows)


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is whole now: a sharded one is only while its layer runs."""
    return type(weight) in (nn.Parameter, Tensor)
