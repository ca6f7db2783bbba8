"""``fastbert predict``: what a fine-tuned model says of new texts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from fastbert.cli import checkpoint, machine
from fastbert.cli.errors import Refusal, reason
from fastbert.cli.options import Device, Dtype
from fastbert.training import tasks
from fastbert.training.tasks import Kind

# Texts between two moves of the progress bar.
_SLICE = 256
_TASKS = {
    "BertForSequenceClassification": Kind.classification,
    "BertForTokenClassification": Kind.ner,
    "BertForQuestionAnswering": Kind.qa,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments; see its ``--help``."""

    model: str
    texts: Path
    json: Path
    max_length: int | None
    dtype: Dtype
    device: Device | None
    threads: int | None
    allow_pickle: bool


def main(options: Options) -> None:
    """Write the predictions, in the order of the texts, as a JSON array.

    Raises:
        Refusal, DataError: the checkpoint, the texts or the place for the result can't be used.
    """
    folder = options.json.absolute().parent
    if not folder.is_dir():
        raise Refusal(f"--json {options.json}: the folder {folder} doesn't exist")
    if options.json.is_dir():
        raise Refusal(f"--json {options.json} is a folder; it must be a file")
    if options.json.exists() and not options.json.is_file():
        raise Refusal(f"--json {options.json} is no regular file; it would be replaced")
    if options.json.exists() and options.texts.exists() and options.json.samefile(options.texts):
        raise Refusal(f"--json {options.json} is the file of the texts itself")
    device = machine.choose_device(options.device, options.threads)
    found = checkpoint.find(options.model, options.allow_pickle)
    kind, trained_length = _task(found)
    task: Any = tasks.of(kind)
    tokenizer = checkpoint.load_tokenizer(found)
    examples = task.read_unlabelled(options.texts)
    if not examples:
        raise Refusal(f"--texts {options.texts} holds no examples")
    max_length = checkpoint.length_limit(found, tokenizer, options.max_length, trained_length)
    model, _ = checkpoint.load_head(found, task.head, found.config, complete=True)
    model.to(device=device, dtype=getattr(torch, options.dtype)).eval()
    console = Console(stderr=True)
    predictions: list[dict[str, Any]] = []
    slices = [examples[start : start + _SLICE] for start in range(0, len(examples), _SLICE)]
    for part in track(slices, "predicting", console=console, disable=not console.is_terminal):
        predictions += task.predict(model, tokenizer, part, max_length)
    _write(options.json, predictions)
    typer.echo(f"{options.json}: {len(predictions)} predictions of {found.name}, {task.title}")


def _task(found: checkpoint.Checkpoint) -> tuple[Kind, int | None]:
    """What a checkpoint is for, and the length that it was trained with, where it says so."""
    noted = getattr(found.config, "fastbert", None)
    if isinstance(noted, dict) and noted.get("task") in list(Kind):
        return Kind(noted["task"]), noted.get("max_length")
    architectures = found.config.architectures or []
    kinds = [_TASKS[name] for name in architectures if name in _TASKS]
    if not kinds:
        made_of = ", ".join(architectures) or "nothing that it names"
        raise Refusal(f"{found.name} is {made_of}; predict serves {', '.join(_TASKS)}")
    return kinds[0], None


def _write(path: Path, predictions: list[dict[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.new")
    try:
        # A label may hold half a character, which JSON escapes just so.
        text = f"{json.dumps(predictions, indent=1, ensure_ascii=False)}\n"
        partial.write_text(text, "utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Refusal(f"--json {path} can't be written: {reason(error)}") from None
