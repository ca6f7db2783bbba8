"""Which implementation each part of a model uses, and why."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel
from transformers.models.bert import modeling_bert

from fastbert.backends import onednn, prepacked, select
from fastbert.models import bert, interface, layers, upstream

_LAYER = re.compile(r"\.layer\.(\d+)")

# Looked up once: ``fastbert.patch`` changes what the name means.
_HuggingFaceBertModel = modeling_bert.BertModel


@dataclasses.dataclass(frozen=True)
class Part:
    """One row of an explanation: a part of the model, what computes it, and why it isn't something faster."""

    path: str
    part: str
    implementation: str
    reason: str


class Explanation(list[Part]):
    """The rows, which have been printed: an interactive session doesn't show them again."""

    def __repr__(self) -> str:
        return f"<explanation of {len(self)} parts>"

    def _ipython_display_(self) -> None:
        pass


def explain(model: nn.Module) -> list[Part]:
    """Print, and return as data, which implementation each part of every BERT in ``model`` uses and why.

    It tells of the model as it is now (its modules, device, dtype and mode), for a forward pass without gradients in
    ``eval`` mode and with gradients in ``train`` mode; and how the last forward pass was laid out.
    """
    rows = [row for path, module in model.named_modules() for row in _explain_module(path or "model", module)]
    if not rows:
        rows = [Part("model", type(model).__name__, "unchanged", "it holds no BERT of Hugging Face's")]
    table = Table(title="fastbert.explain")
    for heading in ("path", "part", "implementation", "why"):
        table.add_column(heading, overflow="fold")
    for row in _merge_layers(rows):
        # As text, not as markup: an extra in brackets would be taken for a style.
        table.add_row(*map(Text, dataclasses.astuple(row)))
    # What isn't a terminal has no width of its own; 80 columns would break the paths.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return Explanation(rows)


def _merge_layers(rows: list[Part]) -> list[Part]:
    """One row for each part that several layers compute in the same way; its path tells which layers."""
    layers_of: dict[Part, list[int]] = {}
    for row in rows:
        number = _LAYER.search(row.path)
        same = dataclasses.replace(row, path=_LAYER.sub(".layer.{}", row.path))
        layers_of.setdefault(same, []).extend([int(number[1])] if number else [])
    return [dataclasses.replace(row, path=row.path.format(_span(numbers))) for row, numbers in layers_of.items()]


def _span(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def _explain_module(path: str, module: nn.Module) -> list[Part]:
    if isinstance(module, bert.BertModel):
        parts = [] if upstream.unknown(module, "BertModel") else _parts(path, module)
        return [*_layout(path, module), *parts]
    rows = []
    if isinstance(module, _HuggingFaceBertModel):
        rows.append(Part(path, "BertModel", "Hugging Face", "fastbert.accelerate(model) has not been called on it"))
    if _attends_by_name(module):
        rows.append(_op(path, "attention", "attention", _attention_request(module)))
    return rows


def _attends_by_name(module: nn.Module) -> bool:
    """Whether it is a model whose own layers look up ``attn_implementation="fastbert"``, and not one around such."""
    config = getattr(module, "config", None)
    if not isinstance(module, PreTrainedModel) or getattr(config, "_attn_implementation", None) != interface.NAME:
        return False
    return not any(isinstance(part, PreTrainedModel) for part in list(module.modules())[1:])


def _attention_request(model: Any) -> select.Request:
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout_p = getattr(config, "attention_probs_dropout_prob", 0.0) if model.training else 0.0
    return select.Request(model.device.type, model.dtype, float(dropout_p), size)


def _layout(path: str, model: bert.BertModel) -> list[Part]:
    reason = bert.static_padded_reason(model)
    rows = [Part(path, "layout", "padded" if reason else bert.PACKED, reason or "padding is removed at the embeddings")]
    if model.route is not None and not reason:
        packed = model.route == bert.PACKED
        rows.append(Part(path, "last forward", bert.PACKED if packed else "padded", "" if packed else model.route))
    return rows


def _parts(path: str, model: bert.BertModel) -> list[Part]:
    config = model.config
    training = model.training
    hidden = select.Request(model.device.type, model.dtype, layers.dropout_p(model.embeddings.dropout))
    attention = _attention_request(model)
    layout_reason = bert.static_padded_reason(model)
    if layout_reason:
        rows = [Part(f"{path}.embeddings", "embeddings", "Hugging Face", layout_reason)]
    else:
        rows = [_fused_or_op(f"{path}.embeddings", "embeddings", model.embeddings, "embedding_layer_norm", hidden)]
    for index, layer in enumerate(model.encoder.layer):
        where = f"{path}.encoder.layer.{index}"
        if not isinstance(layer, layers.BertLayer):
            continue
        if not training and not layout_reason:
            with torch.no_grad():
                divided = layer.divided(torch.empty(1, config.hidden_size, dtype=model.dtype, device=model.device))
            rows.append(
                Part(where, "its parts", "one by one" if divided else "one call", divided or "by the extension")
            )
            if not divided:
                continue
        attend = layer.attention.self
        if layout_reason:
            rows.append(Part(f"{where}.attention.self", "query, key, value", "modules, one by one", layout_reason))
            rows.append(Part(f"{where}.attention.self", "attention", config._attn_implementation, layout_reason))
        else:
            rows.append(_linear(f"{where}.attention.self", "query, key, value", attend, training, "one product"))
            rows.append(_op(f"{where}.attention.self", "attention", "attention", attention))
        for name, part in (("attention.output", layer.attention.output), ("output", layer.output)):
            rows.append(
                _fused_or_op(
                    f"{where}.{name}", "dense, dropout, residual, LayerNorm", part,
                    "bias_dropout_residual_layer_norm", hidden, training,
                )
            )  # fmt: skip
        rows.append(
            _fused_or_op(f"{where}.intermediate", "dense, GELU", layer.intermediate, "linear_gelu", hidden, training)
        )
        if training and not layout_reason:
            kept = "computed again" if (reason := layer.unfused()) is None else "kept"
            rows.append(Part(where, "first LayerNorm and GELU, for the backward", kept, reason or "one function"))
    return rows


def _fused_or_op(
    path: str, part: str, module: Any, op: str, request: select.Request, training: bool | None = None
) -> Part:
    reason = module.unfused() if hasattr(module, "unfused") else f"it is a {type(module).__name__}"
    if reason:
        return Part(path, part, "Hugging Face", reason)
    dense = module.linears()[0] if hasattr(module, "linears") else None
    if dense is not None and (called := layers.unusual(dense, nn.Linear)):
        rest = _op(path, part, op, request)
        return dataclasses.replace(rest, implementation=f"dense, then {rest.implementation}", reason=f"dense: {called}")
    if training is False and dense is not None:
        row = _linear(path, part, module, training, "post-operation in the product")
        if row.implementation.endswith("prepacked"):
            return row
    return _op(path, part, op, request)


def _op(path: str, part: str, op: str, request: select.Request) -> Part:
    rows = select.table(op).explain(request)
    chosen = next(row for row in rows if row.chosen)
    # What is for other devices would only hide why something for this one was passed over.
    passed_over = [
        f"{row.implementation}: {'; '.join(row.reasons)}"
        for row in rows[: rows.index(chosen)]
        if not any(reason.startswith("it runs on ") for reason in row.reasons)
    ]
    return Part(path, part, f"ops.{op}: {chosen.implementation}", "; ".join(passed_over) or "first choice")


def _linear(path: str, part: str, module: Any, training: bool, gain: str) -> Part:
    reason: str | None = module.unfused()
    if reason:
        return Part(path, part, "modules, one by one", reason)
    dense = module.linears()[0]
    if training:
        return Part(path, part, "torch linear", "gradients are needed, and a prepacked weight has none")
    with torch.no_grad():
        reason = prepacked.unsupported(dense.weight, [dense])
    if reason:
        return Part(path, part, "torch linear", reason)
    kernels = "onednn" if prepacked.kernels([dense]) is onednn else "extension"
    return Part(path, part, f"{kernels} prepacked", gain)
