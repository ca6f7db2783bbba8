"""How a checkpoint of sentence-transformers' format says that texts become embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fastbert.cli import json_files
from fastbert.cli.errors import Refusal
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
    """The recipe in ``folder``; an empty one where there is none.

    Raises:
        Refusal: a file of it is damaged.
    """
    path = folder / "modules.json"
    if not path.exists():
        return Recipe()
    modules = json_files.read(path, str(path))
    if not isinstance(modules, list) or not all(map(_is_module, modules)):
        raise Refusal(f"{path} is no list of modules, each with its type and its path")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    unserved = next((f"a {kind} module" for kind in kinds if kind not in _KEPT), None)
    pooling = None
    if "Pooling" in kinds:
        mode = _pooling_mode(_settings(folder / modules[kinds.index("Pooling")]["path"] / "config.json"))
        if mode in tuple(Pooling):
            pooling = Pooling(mode)
        else:
            unserved = unserved or f"pooling by {mode}"
    max_length = _settings(folder / "sentence_bert_config.json").get("max_seq_length")
    return Recipe(pooling, "Normalize" in kinds, max_length, unserved)


def _is_module(module: Any) -> bool:
    return isinstance(module, dict) and all(isinstance(module.get(name), str) for name in ("type", "path"))


def _pooling_mode(settings: dict[str, Any]) -> str:
    if "pooling_mode" in settings:
        mode = settings["pooling_mode"]
        return " and ".join(map(str, mode)) if isinstance(mode, list) else str(mode)
    flags = [name.removeprefix(_FLAG_PREFIX) for name, on in settings.items() if name.startswith(_FLAG_PREFIX) and on]
    return " and ".join(_FLAGS.get(flag, flag) for flag in flags) or "nothing"


def _settings(path: Path) -> dict[str, Any]:
    return json_files.read_object(path, str(path)) if path.exists() else {}
