"""Query, key and value weights side by side, so that each layer's projection is one product.

Where weights aren't prepacked (``backends/prepacked.py``: on a GPU, for instance) inference copies those of all layers
into one buffer at each forward, by a launch or two for the whole model. Nothing has to be known of when a weight
changes, and there is no wait for the device to find out. For BERT-base in 16 bits that is 42 MB read and written, 18 µs
at an H200's 4.8 TB/s (data sheet); joining them layer by layer took two launches a layer.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.backends import prepacked


class Projection(NamedTuple):
    """The joined weight ``[3 * H, H]`` and bias ``[3 * H]`` of a layer."""

    weight: Tensor
    bias: Tensor | None


class _Buffers(NamedTuple):
    """Where each weight and bias goes, the projections that they make, and the shapes that these are of."""

    targets: list[Tensor]
    projections: list[Projection]
    shapes: tuple[Any, ...]


_buffers: weakref.WeakKeyDictionary[nn.Module, _Buffers] = weakref.WeakKeyDictionary()


def join(encoder: Any, x: Tensor) -> dict[nn.Module, Projection]:
    """The projections of the self-attention modules of ``encoder`` that can be joined, for ``x``.

    Empty in training, where the joint weight has to be differentiated, while tracing, and where weights are prepacked.
    """
    if torch.compiler.is_compiling() or (x.device.type == "cpu" and prepacked.missing(x.dtype) is None):
        return {}
    if torch.is_grad_enabled() and x.requires_grad:
        return {}
    attentions = [layer.attention.self for layer in encoder.layer]
    chosen = [one for one in attentions if _is_plain(one.query.weight) and one.unfused() is None]
    linears = [linear for attention in chosen for linear in (attention.query, attention.key, attention.value)]
    sources = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
    if not sources or (torch.is_grad_enabled() and any(p.requires_grad for p in sources)):
        return {}
    # Offloaded and flattened weights are here, and in shape, only while their layer runs.
    if any(p.device != x.device or p.dtype != sources[0].dtype for p in sources) or any(
        linear.weight.shape != (linear.out_features, linear.in_features) for linear in linears
    ):
        return {}
    buffers = _find(encoder, linears, sources)
    with torch.no_grad():
        torch._foreach_copy_(buffers.targets, sources)
    return dict(zip(chosen, buffers.projections, strict=True))


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is whole now: a sharded one is only while its layer runs."""
    return type(weight) in (nn.Parameter, Tensor)


def _find(encoder: nn.Module, linears: list[nn.Linear], sources: list[Tensor]) -> _Buffers:
    """The encoder's buffers, kept from one forward to the next."""
    first = sources[0]
    shapes = (first.device, first.dtype, *(p.shape for p in sources))
    # A graph that is being captured gets buffers of its own: it must not write to ones that are dropped later.
    capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
    found = None if capturing else _buffers.get(encoder)
    if found is not None and found.shapes == shapes:
        return found
    # Tensors made in inference mode can't be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        targets, projections = [], []
        for place in range(0, len(linears), 3):
            three = linears[place : place + 3]
            sizes = [linear.out_features for linear in three]
            weight = first.new_empty(sum(sizes), three[0].in_features)
            bias = None if three[0].bias is None else first.new_empty(sum(sizes))
            parts = [list(weight.split(sizes))] + ([] if bias is None else [list(bias.split(sizes))])
            targets += [part for linear_parts in zip(*parts, strict=True) for part in linear_parts]
            projections.append(Projection(weight, bias))
    made = _Buffers(targets, projections, shapes)
    if not capturing:
        _buffers[encoder] = made
    return made
