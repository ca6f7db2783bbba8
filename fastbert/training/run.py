"""One training run: its settings, its output folder, what a stopped one goes on with, and what it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    SchedulerType,
    TrainingArguments,
)

from fastbert.models import upstream
from fastbert.training import resume
from fastbert.training.batches import Batches, Collator, Keyed
from fastbert.training.errors import DataError
from fastbert.training.files import is_utf_8
from fastbert.training.resume import SETTINGS
from fastbert.training.trainer import LOG, PLOT, Checkpoints, Journal, Trainer, is_curve

# Version 2, a layer at a time, each process with its own shards in a checkpoint.
_FSDP = {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
# They say how a run goes on, not what it computes.
_OF_THE_CALL = ("output", "resume", "overwrite")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is trained; fields that Hugging Face's ``TrainingArguments`` has too have its names and meaning.

    ``epochs`` or ``steps`` (of the optimizer) say how long, ``batch_size`` (examples) or ``tokens_per_batch`` what one
    process sees at once. ``eval_steps`` and ``save_steps`` of None stand for every epoch.
    """

    output: Path
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    seed: int = 42
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    early_stopping_patience: int | None = None
    fsdp: bool = False
    use_cpu: bool = False
    resume: bool = False
    overwrite: bool = False


@contextlib.contextmanager
def opened(settings: Settings, about: dict[str, Any]) -> Iterator[Path | None]:
    """Make the output folder, note what the run is, and find what a stopped one left.

    Where the run turns out to be impossible before a step is made, a folder that was made for it is taken away again.

    Args:
        settings: of the run.
        about: what else decides its result, to be saved as JSON.

    Yields:
        The checkpoint to go on with, or None to begin.

    Raises:
        DataError: the folder has a run in it and neither ``resume`` nor ``overwrite`` is asked for; there is none to
            resume, one of other settings, or one whose last checkpoint is damaged.
    """
    output = settings.output
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file; it must be a folder")
    if not is_utf_8(output.absolute()):
        raise DataError(f"--output {output} has a name that isn't UTF-8, which the tokenizer can't be saved under")
    # Through JSON, so that what is compared is what was written.
    decisive = {**about, **_decisive(settings), "processes": PartialState().num_processes}
    wanted = json.loads(json.dumps(decisive, default=str))
    if settings.resume:
        resume.check_same(output, wanted)
        yield resume.last_checkpoint(output, PartialState().num_processes, settings.fsdp)
        return
    if output.exists() and any(output.iterdir()) and not settings.overwrite:
        is_run = (output / SETTINGS).exists()
        told = "--resume goes on with it, and --overwrite begins again" if is_run else "--overwrite adds to it"
        raise DataError(f"--output {output} is not empty; {told}")
    made = not output.exists()
    # No process changes anything before all have looked.
    wait_for_everyone()
    if is_main_process():
        _clear(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(f"{json.dumps(wanted, indent=1)}\n", "utf-8")
    wait_for_everyone()
    try:
        yield None
    except Exception:
        if made and is_main_process() and not (output / LOG).exists():
            shutil.rmtree(output, ignore_errors=True)
        raise


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Keyed,
    eval_data: Dataset[Any] | None,
    settings: Settings,
    *,
    collator: Collator,
    checkpoint: Path | None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    preprocess_logits: Callable[[Any, Any], Any] | None = None,
    best: str | None = None,
) -> dict[str, float]:
    """Train, and save the model, its tokenizer and the journal in the output folder.

    Args:
        model: what is trained, in place.
        tokenizer: saved beside it.
        train_data, eval_data: examples; of the training data by key, see ``batches``.
        settings: how.
        collator: makes batches of examples.
        checkpoint: where to go on, from ``opened``.
        compute_metrics, preprocess_logits: as Hugging Face's ``Trainer`` takes them.
        best: the score by which early stopping keeps the best of the evaluated models.

    Returns:
        The scores of the model that was saved: "loss" and the others; none without ``eval_data``.
    """
    if settings.early_stopping_patience is None:
        best = None
    arguments = _arguments(settings, best, evaluates=eval_data is not None)

    def batches(processes: int, process: int) -> Batches:
        try:
            return Batches(
                train_data.lengths,
                settings.seed,
                batch_size=settings.batch_size,
                tokens_per_batch=settings.tokens_per_batch,
                processes=processes,
                process=process,
            )
        except ValueError as error:
            raise DataError(str(error)) from None

    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.fsdp:
        _shard(model)
    trainer = Trainer(
        model=model,
        args=arguments,
        data=train_data,
        batches=batches,
        data_collator=collator,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits,
        callbacks=[Checkpoints(settings.save_total_limit), Journal()],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if settings.fsdp:
        # Checkpoints are in shards; the result is one that anything loads.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if is_main_process():
        # Trainer's pickle of its arguments, that nothing reads: what it holds is in fastbert.json.
        (settings.output / "training_args.bin").unlink(missing_ok=True)
    if eval_data is None:
        return {}
    step = trainer.state.global_step if best is None else trainer.state.best_global_step
    logged = (e for e in reversed(trainer.state.log_history) if e["step"] == step and "eval_loss" in e)
    scores = next(logged, None) or trainer.evaluate()
    # Without what tells how long it took.
    return {name.removeprefix("eval_"): value for name, value in scores.items() if is_curve(name, value)}


def _shard(model: PreTrainedModel) -> None:
    """Shard the model over all processes, in place: each layer by itself, all the rest together.

    accelerate would do it, but puts the embeddings and the head's product, which share their weight, in a group of
    their own, and the head's bias, which two modules share as well, in that group and in the rest.
    """
    model.to(PartialState().device)
    for module in model.modules():
        if isinstance(module, upstream.BertLayer):
            fully_shard(module)
    fully_shard(model)


def join_processes(settings: Settings) -> None:
    """Find the other processes, where torchrun or accelerate has started some. To be called before all else here.

    Raises:
        DataError: what is asked for isn't done on these processes and their devices.
    """
    state = PartialState(cpu=settings.use_cpu or not torch.cuda.is_available())
    if settings.fp16 and settings.bf16:
        raise DataError("--fp16 and --bf16 are both given; it may be one of them")
    if settings.fp16 and state.device.type == "cpu":
        raise DataError("--fp16 is for a GPU, and this run is on cpu; --bf16 runs on both")
    if settings.fsdp and state.distributed_type != DistributedType.MULTI_GPU:
        raise DataError(
            f"--fsdp shards over the processes of several GPUs, and this run has {state.num_processes} on "
            f"{state.device.type}; torchrun or accelerate launch starts more"
        )


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return bool(PartialState().is_main_process)


def wait_for_everyone() -> None:
    """Go on when all processes are here."""
    PartialState().wait_for_everyone()


def _decisive(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in _OF_THE_CALL}


def _clear(output: Path) -> None:
    """Take an earlier run's own files out of its folder."""
    if (output / SETTINGS).exists():
        for path in (
            *resume.checkpoints(output),
            *(output / name for name in (SETTINGS, LOG, PLOT, "tokenizer.json")),
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _arguments(settings: Settings, best: str | None, evaluates: bool) -> TrainingArguments:
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # The best model is one of those that were saved, so it is saved when it is evaluated.
    save_steps = settings.save_steps if best is None else settings.eval_steps
    return TrainingArguments(
        output_dir=str(settings.output),
        num_train_epochs=settings.epochs or 1.0,
        max_steps=settings.steps or -1,
        # The sampler makes the training batches; only evaluation counts examples.
        per_device_eval_batch_size=settings.batch_size or 32,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SchedulerType(settings.lr_scheduler_type),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        bf16=settings.bf16,
        fp16=settings.fp16,
        seed=settings.seed,
        use_cpu=settings.use_cpu or not torch.cuda.is_available(),
        logging_steps=settings.logging_steps,
        eval_strategy=_strategy(settings.eval_steps) if evaluates else IntervalStrategy.NO,
        eval_steps=settings.eval_steps,
        save_strategy=_strategy(save_steps),
        # Not looked at where it is by the epoch.
        save_steps=save_steps or 1,
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        restore_callback_states_from_checkpoint=True,
        include_num_input_tokens_seen="non_padding",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        # Its annotation is the one of a time when it was a string.
        fsdp=settings.fsdp or None,  # type: ignore[arg-type]
        fsdp_config=_FSDP if settings.fsdp else None,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )


def _strategy(steps: int | None) -> IntervalStrategy:
    return IntervalStrategy.EPOCH if steps is None else IntervalStrategy.STEPS
