"""Inference through an encoder on a CPU: the modules are looked at once, then each layer is a call of the extension.

What ``BertLayer`` checks and chooses at every call takes a tenth of a millisecond a layer, and to look whether its
weights have changed wakes all threads four times. For one short text that is a tenth of its time. Here the calls are
made ready when the modules have been found to be plain, and serve for as long as nothing about these modules has
changed. All weights are looked at in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from fastbert.backends import extension, host_linear, prepacked
from fastbert.models import encoder_plan, layers, whole_layer
from fastbert.models.packing import Packing

# What may change of a tensor besides what an ``EncoderPlan`` looks at.
_FACTS = (Tensor.data_ptr, Tensor.stride, attrgetter("_version"))
_REQUIRES_GRAD = attrgetter("requires_grad")
# And of a layer's numbers.
_NUMBERS = attrgetter("chunk_size_feed_forward", "attention.self.attention_head_size")
# Whether torch has a hook that sees every module. Should its name change, the layers are called.
_has_hook_for_all = getattr(torch_module, "_has_any_global_hook", lambda: True)


class Plan:
    """The layers of an encoder, each of them one call."""

    def __init__(self, encoder: Any, hidden: int) -> None:
        owners = [one for layer in encoder.layer for one in whole_layer.owners(layer)]
        self._layers = list(encoder.layer)
        self._configs = list({id(owner.config): owner.config for owner, _ in owners}.values())
        self._tensors = _tensors(encoder)
        # Before a weight is read: a change in between must be seen next time.
        self._seen = self._look()
        self.calls = [whole_layer.prepare(layer, hidden) for layer in self._layers]
        self._weights = prepacked.PackedModules([owner for owner, _ in owners])

    def _look(self) -> list[Any]:
        return [*(list(map(fact, self._tensors)) for fact in _FACTS), list(map(_NUMBERS, self._layers))]

    def serves(self) -> bool:
        """Whether it may be used now, if it holds."""
        if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, self._tensors)):
            return False
        return not any(map(layers.stock_asked_for, self._configs))

    def holds(self) -> bool:
        """Whether the tensors and numbers of the layers are what they were."""
        return self._look() == self._seen and self._weights.unchanged()


def forward(
    encoder: Any, x: Tensor, packing: Packing, known: Callable[[], encoder_plan.EncoderPlan] | None
) -> Tensor | None:
    """``[T, H]`` -> ``[T, H]``; None where the layers have to be called one by one.

    ``known`` is the ``encoder_plan.lookup`` of this forward.
    """
    if known is None or encoder.training or whole_layer.unserved(x) or torch.is_autocast_enabled("cpu"):
        return None
    if _has_hook_for_all():
        return None
    looked_at, conditions = known(), _conditions(x)
    made_for, plan = looked_at.found.get("host_inference", (None, None))
    known_plan = made_for == conditions
    if known_plan and (plan is None or not plan.serves()):
        return None
    if not known_plan or not plan.holds():
        plan = _new_plan(encoder, x, looked_at)
        looked_at.found["host_inference"] = (conditions, plan)
    return None if plan is None else whole_layer.forward(plan.calls, x, packing, {})


def _conditions(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.shape[1], torch.is_grad_enabled(), x.shape[0] == 0, host_linear.instructions(x.dtype)


def _new_plan(encoder: Any, x: Tensor, looked_at: encoder_plan.EncoderPlan) -> Plan | None:
    """None where a part is not what it seems, or a layer isn't one call."""
    if layers.unusual(encoder, layers.BertEncoder):
        return None
    for layer in encoder.layer:
        if layers.unusual(layer, layers.BertLayer) or layer.divided(x) is not None:
            return None
    parameters = [p for norm in _norms(encoder) for p in (norm.weight, norm.bias)]
    # A copy would not follow its changes, and of these torch doesn't count them.
    if not parameters or any(extension.dense(p) is not p or p.is_inference() for p in parameters):
        return None
    # A tensor that is a plain attribute may be replaced without a trace in the snapshot.
    if not set(map(id, _tensors(encoder))) <= set(map(id, looked_at.tensors)):
        return None
    return Plan(encoder, x.shape[1])


def _tensors(encoder: Any) -> list[Tensor]:
    """The parameters of all layers."""
    linears = [linear for layer in encoder.layer for _, some in whole_layer.owners(layer) for linear in some]
    return [x for module in (*_norms(encoder), *linears) for x in (module.weight, module.bias) if x is not None]


def _norms(encoder: Any) -> list[Any]:
    return [norm for layer in encoder.layer for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm)]
