"""How a checkpoint of sentence-transformers' format says that texts become embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.cli.options import Pooling

_KEPT = ("Transformer", "Pooling", "Normalize")
# Before sentence-transformers 5.3 a pooling was one flag of several.
_FLAG_PREFIX = "pooling_mode_"
_FLAGS = {"cls_token": "cls", "mean_tokens": "mean"}


class Recipe(NamedTuple):
    """Pooling, normalisation and the length limit in tokens; None where the checkpoint says nothing.

    ``unserved`` is what the recipe has that ``fastbert embed`` doesn't do.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    unserved: str | None = None


def read(folder: Path) -> Recipe:
    """The recipe in ``folder``; an empty one where there is none."""
    modules = _json(folder / "modules.json")
    if not isinstance(modules, list):
        return Recipe()
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unserved = next((f"a {kind} module" for kind in kinds if kind not in _KEPT), None)
    pooling = None
    if "Pooling" in kinds:
        settings = _json(folder / modules[kinds.index("Pooling")].get("path", "") / "config.json")
        mode = _pooling_mode(settings if isinstance(settings, dict) else {})
        if mode in tuple(Pooling):
            pooling = Pooling(mode)
        else:
            unserved = unserved or f"pooling by {mode}"
    transformer = _json(folder / "sentence_bert_config.json")
    max_length = transformer.get("max_seq_length") if isinstance(transformer, dict) else None
    return Recipe(pooling, "Normalize" in kinds, max_length, unserved)


def _pooling_mode(settings: dict[str, Any]) -> str:
    if "pooling_mode" in settings:
        mode = settings["pooling_mode"]
        return mode if isinstance(mode, str) else " and ".join(map(str, mode))
    flags = [name.removeprefix(_FLAG_PREFIX) for name, on in settings.items() if name.startswith(_FLAG_PREFIX) and on]
    return " and ".join(_FLAGS.get(flag, flag) for flag in flags) or "nothing"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
