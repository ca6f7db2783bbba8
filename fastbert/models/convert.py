"""Fusing models that are already loaded, and code that can't be edited: ``accelerate``, ``patch``, ``unpatch``."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar

import transformers
from torch import nn
from transformers.models.bert import modeling_bert

from fastbert.backends import prepacked
from fastbert.models import bert, layers, upstream

_Model = TypeVar("_Model", bound=nn.Module)

_ABSENT = object()
_lock = threading.Lock()
# What ``patch`` replaced: (module, name) -> the attribute that was there, or _ABSENT.
_replaced: dict[tuple[ModuleType, str], object] = {}


def accelerate(model: _Model, strict: bool = False) -> _Model:
    """Fuse every Hugging Face BERT inside ``model``, in place, and return ``model``.

    Weights, hooks and the module tree stay as they are; only the classes of BERT's modules change, so it works on
    anything that holds a BERT: a head, a ``SentenceTransformer``, a PEFT model, an ``EncoderDecoderModel``. Where there
    is none, or where no part of one would be fused as it is configured, it warns and says why.

    Args:
        model: any module.
        strict: raise where nothing could be fused.

    Raises:
        ValueError: ``strict``, and ``model`` holds no BERT, or none of those it holds can be packed; the message says
            why.
    """
    changed = bert.fuse(model)
    found = {path or "the model": part for path, part in model.named_modules() if isinstance(part, bert.BertModel)}
    reasons = {path: bert.static_padded_reason(part) for path, part in found.items()}
    padded = bool(found) and all(reasons.values())
    if strict:
        if not found:
            raise ValueError(_no_bert(model))
        if padded:
            raise ValueError(f"no BERT in model can be packed: {_listed(reasons)}")
    elif not found and not changed:
        warnings.warn(f"nothing was fused: {_no_bert(model)}", stacklevel=2)
    elif padded and not any(isinstance(part, layers.CONFIGURED) and not part.unfused() for part in model.modules()):
        # A decoder's parts are fused unless eager attention forbids it; then that is what to change.
        reasons |= {path: asked for path, part in found.items() if (asked := layers.stock_asked_for(part.config))}
        warnings.warn(f"nothing was fused: {_listed(reasons)}", stacklevel=2)
    return model


def _listed(reasons: dict[str, str | None]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in reasons.items())


def _no_bert(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return f"model holds no BERT of Hugging Face's to fuse; it is {type(model).__name__} ({kind})"


def refresh(model: nn.Module) -> None:
    """Make the next forward of ``model`` see every change of a weight.

    Inference on a CPU multiplies by reordered copies of the weights, which follow what torch counts as a change, any
    edit of a bias, and of all of a row or column. An edit of single elements that torch doesn't see (through ``.data``,
    or an array of numpy that shares the memory) may take up to 64 forwards to be seen; call this after one.
    """
    prepacked.refresh(model)


def patch() -> None:
    """Make ``transformers`` give fastbert's classes, until ``unpatch``.

    ``from transformers import BertModel``, the Auto classes and all code that looks the names up after this call get
    fastbert's ``BertModel`` and heads. Names imported before keep the classes they had. Patching twice does nothing.
    """
    with _lock:
        if _replaced:
            return
        for module in _namespaces():
            for original, fused in bert.MODELS.items():
                name = original.__name__
                _replaced[module, name] = module.__dict__.get(name, _ABSENT)
                setattr(module, name, fused)


def unpatch() -> None:
    """Undo ``patch``: every name in ``transformers`` is what it was. Without a patch it does nothing."""
    with _lock:
        for (module, name), original in _replaced.items():
            if original is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, original)
        _replaced.clear()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """``patch`` for the length of a ``with`` block; an outer ``patch`` stays in force after it."""
    outer = bool(_replaced)
    patch()
    try:
        yield
    finally:
        if not outer:
            unpatch()


def _namespaces() -> list[ModuleType]:
    """Every module that hands out BERT's classes by name.

    While transformers is being imported it makes its top module anew: code that imported it early holds another one
    than ``sys.modules`` does, and each keeps the names that it was asked for. The garbage collector knows them all,
    but for those that ``gc.freeze`` hid from it: they are looked for among the globals of modules.
    """
    held = (vars(module).values() for module in list(sys.modules.values()) if isinstance(module, ModuleType))
    things = [*itertools.chain.from_iterable(list(values) for values in held), *gc.get_objects()]
    tops = [thing for thing in things if type(thing) is upstream.LazyModule and thing.__name__ == "transformers"]
    return [*dict.fromkeys([transformers, *tops]), importlib.import_module("transformers.models.bert"), modeling_bert]
