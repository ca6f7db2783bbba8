"""Inference of a model on a GPU by what its last forward found out, which is looked at again while the device works.

A forward begins by making sure that modules are what they seem. That takes the host a millisecond or more, in which the
device has nothing to do. Here a forward begins with what is known, launches all of its kernels, and only then makes
sure that nothing had changed. If something had, the result is dropped, and the model is run as usual.

Nothing of a module is called before that, so no hook can run twice, and nothing is written but this forward's own
memory. What would lead a kernel out of its memory, a tensor's shape, dtype or device, is looked at first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.backends import select
from fastbert.models import encoder_inference, encoder_plan, joined, layers, packing


class Plan(encoder_plan.EncoderPlan):
    """A model as it was, and what its forward takes.

    Attributes:
        layers, projections: of the encoder.
        norm: the LayerNorm of the embeddings.
        tables: of words, positions and token types.
        device: of all parameters.
    """

    layers: list[encoder_inference.Layer]
    projections: joined.Plan
    norm: nn.LayerNorm
    tables: tuple[Tensor, Tensor, Tensor]
    device: torch.device


class _Unserved(NamedTuple):
    """The snapshots with which there was no plan; by their identities."""

    looked_through: object
    encoder: object


def has_plan(model: Any) -> bool:
    """Whether something is known of ``model`` that ``forward`` may begin with."""
    return type(model.__dict__.get("_inference")) is Plan


def forward(
    model: Any, input_ids: Tensor | None, mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, packing.Packing] | None:
    """The last states ``[T, H]`` with their packing; None where the model must be run as usual.

    All ids and the mask are ``[B, S]``; the arguments have been checked.
    """
    # Another thread may drop it at any time.
    plan: Plan | None = model.__dict__.get("_inference")
    if type(plan) is not Plan or input_ids is None or not _serves(plan, input_ids, mask, token_type_ids):
        return None
    if not plan.same_facts():
        model.__dict__.pop("_inference", None)
        return None
    with torch.cuda.device_of(input_ids):
        found = _run(plan, model.pooler is not None, input_ids, mask, token_type_ids)
    if found is not None and not plan.holds(model):
        model.__dict__.pop("_inference", None)
        return None
    return found


def _serves(plan: Plan, input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None) -> bool:
    given = [x for x in (input_ids, mask, token_type_ids) if x is not None]
    if any(x.device != plan.device or x.shape != input_ids.shape for x in given):
        return False
    if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return encoder_inference.unserved(plan.tables[0]) is None


def _run(
    plan: Plan, read_first: bool, input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Tensor, packing.Packing] | None:
    packed: packing.Packing | None
    if mask is None:
        batch, seqlen = input_ids.shape
        packed = packing.full(batch, seqlen, input_ids.device)
        projections = joined.join_all(plan.projections)
        positions = packed.places()
        types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids.flatten()
        ids = (input_ids.flatten(), positions, types)
    else:
        from fastbert.ops.unpad import triton

        *unpadded, all_ids = triton.unpad_ids(mask, read_first, input_ids, token_type_ids)
        # Before the wait for the device, so that it has something to do meanwhile.
        projections = joined.join_all(plan.projections)
        packed = packing.from_unpadded(mask.shape, *unpadded)
        if packed is None:
            return None
        tokens = mask.numel() if packed.indices is None else packed.indices.shape[0]
        ids = tuple(row[:tokens] for row in all_ids)
    norm = plan.norm
    embed = select.load("embedding_layer_norm", "triton").forward
    x = embed(*ids, *plan.tables, norm.weight, norm.bias, norm.eps, 0.0, None, -1)[0]
    return encoder_inference.run(plan.layers, x, packed, projections), packed


def remember(model: Any, states: Tensor) -> None:
    """Make a plan after a packed forward that gave ``states``, unless it is known that there is none.

    That there is none stands for as long as neither the model's snapshot nor the encoder's has changed.
    """
    if torch.is_grad_enabled() or has_plan(model) or not _may_serve(states.dtype, states.device.type):
        return
    dtype, kept = states.dtype, model.__dict__.get("_inference")
    looked_through = model.__dict__.get("_looked_through")
    known = encoder_plan.of(model.encoder)
    if kept == _Unserved(looked_through, known):
        return
    made = _new_plan(model, known, dtype)
    model.__dict__["_inference"] = _Unserved(looked_through, known) if made is None else made


def _may_serve(dtype: torch.dtype, device: str) -> bool:
    return select.table("embedding_layer_norm").choose(None, select.Request(device, dtype)) == "triton"


def _new_plan(model: Any, known: encoder_plan.EncoderPlan, dtype: torch.dtype) -> Plan | None:
    # Before the look: what another thread changes meanwhile is then seen next time.
    plan = Plan(model)
    embeddings = model.embeddings
    encoder_layers = encoder_inference.plan_of(model.encoder, dtype, known)
    if not encoder_layers or layers.unusual(embeddings, layers.BertEmbeddings) or embeddings.unfused() is not None:
        return None
    if any(map(encoder_inference.is_called, embeddings.modules())):
        return None
    projections = joined.plan_of(model.encoder, known)
    if set(projections.attentions) != {layer.attend for layer in encoder_layers}:
        return None
    tables = tuple(
        table.weight
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    )
    device = encoder_layers[0].out_weight.device
    parameters = [*embeddings.parameters(), *model.encoder.parameters()]
    if any(one.dtype != dtype or one.device != device for one in parameters):
        return None
    if encoder_inference.attention_choice(encoder_layers, device, dtype) != "triton":
        return None
    plan.layers, plan.projections, plan.norm = encoder_layers, projections, embeddings.LayerNorm
    plan.tables, plan.device = tables, device
    return plan
