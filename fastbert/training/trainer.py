"""Hugging Face's ``Trainer`` with batches of fastbert's, losses that are exact means, and a journal of the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastbert.models.bert import IGNORED_LABEL
from fastbert.training import resume
from fastbert.training.batches import Batches, EpochLoader, Keyed

LOG = "log.json"
PLOT = "training.png"
# What a log entry holds beside the curves.
_NO_CURVE = ("step", "epoch", "runtime", "per_second", "flos", "num_input_tokens_seen")


class Trainer(transformers.Trainer):
    """Hugging Face's, with a sampler of our own and every loss a mean over all that a step sees.

    A step's examples may come in several batches (accumulation) on several processes, with other numbers of labels in
    each. Their losses are weighted by those numbers, so the gradient is that of one large batch.

    Args:
        data: what is trained on.
        batches: makes the sampler of that, of (processes, process).
        **kwargs: those of Hugging Face.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, data: Keyed, batches: Callable[[int, int], Batches], **kwargs: Any) -> None:
        super().__init__(train_dataset=data, **kwargs)
        self._data = data
        self._batches = batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches of this process, by the epoch's keys."""
        # A generator of its own: making an iterator must not draw from the one that dropout draws from.
        return EpochLoader(
            self._data,
            self._batches(self.args.world_size, self.args.process_index),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of a step, and the number of labels of each kind in all of them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0).to(device)
        return batches, self.accelerator.reduce(counts)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's part of the step's mean loss; its own mean where there is no step, as in evaluation."""
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training and num_items_in_batch is not None:
            # Processes average their gradients, so each one's part is taken that many times.
            parts = self.accelerator.num_processes * self._counts(inputs) / num_items_in_batch
            if "next_sentence_label" in inputs:
                next_sentence = F.cross_entropy(
                    outputs.seq_relationship_logits.float(), inputs["next_sentence_label"].flatten()
                )
                second = self.label_names.index("next_sentence_label")
                loss = (loss - next_sentence) * parts[1 - second] + next_sentence * parts[second]
            else:
                loss = loss * parts[0]
        return (loss, outputs) if return_outputs else loss

    def _counts(self, batch: dict[str, Tensor]) -> Tensor:
        # Stays where the batch is: a number on the host would wait for the device.
        return torch.stack([(batch[name] != IGNORED_LABEL).sum() for name in self.label_names])


class Checkpoints(TrainerCallback):
    """Seals every checkpoint, and keeps the last ``count`` of them and the best one.

    Trainer's own limit also deletes folders of the user's whose names only begin as those of checkpoints do.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once for all processes, after the checkpoint's files have been written."""
        if state.is_world_process_zero:
            output = Path(str(args.output_dir))
            resume.seal(output / f"checkpoint-{state.global_step}")
            resume.thin(output, self.count, state.best_model_checkpoint)


class Journal(TrainerCallback):
    """Keeps ``log.json`` and ``training.png`` in the output folder up to date. Both go on where a run is resumed."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write all entries so far; and where there is no progress bar, tell the last."""
        if not state.is_world_process_zero:
            return
        text = json.dumps(state.log_history, indent=1)
        Path(str(args.output_dir), LOG).write_text(f"{text}\n", "utf-8")
        if args.disable_tqdm:
            entry = state.log_history[-1]
            told = "  ".join(f"{name} {value:.4g}" for name, value in entry.items() if is_curve(name, value))
            print(f"step {state.global_step} of {state.max_steps}  {told}", file=sys.stderr, flush=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the curves so far; the last save is followed by the end, which draws them."""
        if not control.should_training_stop:
            self.on_train_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the curves."""
        if state.is_world_process_zero:
            plot(state.log_history, Path(str(args.output_dir), PLOT))


def plot(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a log's losses in one panel, and each other score of the evaluations in one of its own."""
    found = curves(history)
    scores = [name for name in found if name.startswith("eval_") and name != "eval_loss"]
    figure = matplotlib.figure.Figure(figsize=(5 * (1 + len(scores)), 4), layout="constrained")
    panels = figure.subplots(1, 1 + len(scores), squeeze=False)[0]
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        if name in found:
            panels[0].plot(*zip(*found[name], strict=True), label=label, marker="." if name == "eval_loss" else None)
    panels[0].set(title="loss", xlabel="step")
    if panels[0].lines:
        panels[0].legend()
    for panel, name in zip(panels[1:], scores, strict=True):
        panel.plot(*zip(*found[name], strict=True), marker=".")
        panel.set(title=name.removeprefix("eval_").replace("_", " "), xlabel="step")
    figure.savefig(path, dpi=120)


def curves(history: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The values of a log by name: (step, value), without those of the entry that sums the run up."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        if "train_loss" not in entry:
            for name, value in entry.items():
                if is_curve(name, value):
                    found.setdefault(name, []).append((entry["step"], value))
    return found


def is_curve(name: str, value: Any) -> bool:
    """Whether a value of a log entry is a loss, a score or a setting, not a time or a place."""
    return isinstance(value, int | float) and not any(part in name for part in _NO_CURVE)
