"""``fastbert finetune``: a checkpoint and labelled data to a model for one task."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import sklearn.metrics  # noqa: F401  scores need it: it must not be missed when the training is over
import transformers
import typer
from transformers import BertConfig

from fastbert.cli import checkpoint, machine
from fastbert.cli.errors import Refusal
from fastbert.cli.options import Device
from fastbert.training import batches, card, run, tasks
from fastbert.training.run import Settings
from fastbert.training.tasks import Kind, Task

# Enough for most sentences and the beginnings of documents; a context needs more.
_MAX_LENGTH = {Kind.qa: 384}
_MAX_LENGTH_OTHERWISE = 128


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments, beside the run's own settings; see its ``--help``."""

    task: Kind
    model: str | None
    train: Path
    eval: Path | None
    max_length: int | None
    freeze_encoder: bool
    device: Device | None
    threads: int | None
    allow_pickle: bool


def main(options: Options, settings: Settings) -> None:
    """Fine-tune, and leave a checkpoint in the output folder.

    Raises:
        Refusal, DataError: the data, the checkpoint or the output folder can't be used.
    """
    machine.choose_device(options.device, options.threads)
    run.join_processes(settings)
    if settings.early_stopping_patience is not None and options.eval is None:
        raise Refusal("--early-stopping-patience needs --eval: without it nothing says which model is better")
    task: Any = tasks.of(options.task)
    started = checkpoint.find(options.model, options.allow_pickle)
    tokenizer = checkpoint.load_tokenizer(started)
    positions = started.config.max_position_embeddings
    max_length = options.max_length or min(_MAX_LENGTH.get(options.task, _MAX_LENGTH_OTHERWISE), positions)
    checkpoint.length_limit(started, tokenizer, max_length, None)
    train_examples = task.read(options.train, "train")
    labels = task.labels(train_examples)
    train_data = task.encode(train_examples, tokenizer, max_length, labels)
    eval_data, compute_metrics = None, None
    if options.eval is not None:
        eval_examples = task.read(options.eval, "test")
        eval_data = task.encode(eval_examples, tokenizer, max_length, labels)
        compute_metrics = functools.partial(task.scores, eval_examples, eval_data, labels)
    about = {**dataclasses.asdict(options), "max_length": max_length, "device": None, "threads": None}
    with run.opened(settings, {"command": "finetune", **about}) as resumed:
        transformers.set_seed(settings.seed)
        config = _config(started.config, task, options.task, labels, max_length, train_examples)
        model, missing = checkpoint.load_head(started, task.head, config, complete=False)
        if options.freeze_encoder:
            model.base_model.requires_grad_(False)
        if run.is_main_process():
            pooler = ", and a new pooler" if any(".pooler." in name for name in missing) else ""
            typer.echo(
                f"{started.name}, for {task.title}{pooler}: {len(train_examples):,} examples in {len(train_data):,} "
                f"sequences of up to {max_length} tokens"
                + (f"; labels {', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}" if labels else ""),
                err=True,
            )
        scores = run.train(
            model,
            tokenizer,
            train_data,
            eval_data,
            settings,
            collator=batches.Collator(tokenizer.pad_token_id, task.keys),
            checkpoint=resumed,
            compute_metrics=compute_metrics,
            best=task.best,
        )
    if run.is_main_process():
        card.write(
            settings.output,
            title=f"BERT, fine-tuned for {task.title}",
            text=f"{started.name}, trained on {options.train}" + (f". Labels: {', '.join(labels)}." if labels else "."),
            pipeline_tag=task.pipeline_tag,
            base=options.model,
            settings={**about, **dataclasses.asdict(settings)},
            scores=scores,
            dataset=str(options.eval),
        )
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items()) or "not evaluated, for want of --eval"
        typer.echo(f"{settings.output}: {told}")


def _config(
    base: BertConfig, task: Task, kind: Kind, labels: list[str] | None, max_length: int, examples: list[Any]
) -> BertConfig:
    config = copy.deepcopy(base)
    if labels is None:
        config.num_labels = 2
    else:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if kind in (Kind.classification, Kind.pairs):
        config.problem_type = "single_label_classification"
    # What `fastbert predict` has to know; others pass over it.
    config.fastbert = {"task": str(kind), "max_length": max_length}
    if kind == Kind.qa:
        config.fastbert["answers_may_be_missing"] = any(example.answers == () for example in examples)
    return config
