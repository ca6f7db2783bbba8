"""Encoded examples, and a model's outputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel

from fastbert.training.batches import Collator, Keyed

# Examples of a batch in inference: enough for any processor, and a step of a progress bar.
_BATCH = 32


class Encoded(Keyed):
    """Examples as lists of ids and labels; keys of all epochs give the same ones.

    Args:
        examples: each with ``input_ids``.
    """

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = examples
        self.lengths = [len(example["input_ids"]) for example in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: int) -> dict[str, Any]:
        return self.examples[key % len(self.examples)]


def label_names(model: PreTrainedModel) -> list[str]:
    """The names of a model's labels, in the order of its logits."""
    names: Any = model.config.id2label
    return [names[index] for index in range(len(names))]


@torch.inference_mode()
def logits(model: PreTrainedModel, encoded: Encoded, collator: Collator) -> Iterator[list[Tensor]]:
    """For each example in order, the rows of the model's outputs (but for a loss) that are its own, on the CPU.

    The model is in evaluation mode. What an output says of padding is cut off.
    """
    by_token = not isinstance(model, BertForSequenceClassification)
    for start in range(0, len(encoded), _BATCH):
        examples = encoded.examples[start : start + _BATCH]
        batch = {name: value.to(model.device) for name, value in collator(examples).items()}
        outputs = [x.float().cpu() for x in model(**batch).to_tuple()]
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            yield [x[row, :size] if by_token else x[row] for x in outputs]
