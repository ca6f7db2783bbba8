"""The card of a trained checkpoint: what it is, how it was trained, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fastbert._version import __version__


def write(
    folder: Path,
    *,
    title: str,
    text: str,
    pipeline_tag: str | None,
    base: str | None,
    settings: Mapping[str, Any],
    scores: Mapping[str, float],
    dataset: str,
) -> None:
    """Write ``README.md`` with the metadata that Hugging Face's hub reads.

    Args:
        folder: the checkpoint's.
        title, text: of the page; the text may hold Markdown.
        pipeline_tag: the hub's name of the task.
        base: the checkpoint that was fine-tuned, if one was.
        settings: of the run.
        scores: of the model that was saved, by name.
        dataset: what they were measured on, for people.
    """
    results = [
        EvalResult(pipeline_tag or "fill-mask", "custom", dataset, name, value, task_name=title)
        for name, value in scores.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["fastbert"],
        model_name=folder.resolve().name if results else None,
        eval_results=results or None,
        base_model=base,
    )
    page = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n\n{text}\n",
        _table("Scores", f"on {dataset}", {name: f"{value:.4f}" for name, value in scores.items()}) if scores else "",
        _table("Settings", "", {name: value for name, value in settings.items() if value is not None}),
        f"Made with fastbert {__version__}; plain transformers loads it.\n",
    ]
    # A path that isn't UTF-8 can't be written as it is.
    (folder / "README.md").write_text("\n".join(part for part in page if part), "utf-8", errors="backslashreplace")


def _table(name: str, where: str, rows: Mapping[str, Any]) -> str:
    head = f"## {name} {where}".rstrip()
    body = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"{head}\n\n| | |\n|---|---|\n{body}\n"
