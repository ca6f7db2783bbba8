"""What can be trained for, by name; without the libraries that doing it takes."""

from __future__ import annotations

from enum import StrEnum


class Objective(StrEnum):
    """What a model is pretrained for."""

    mlm_nsp = "mlm+nsp"
    mlm = "mlm"
    mae = "mae"


class Kind(StrEnum):
    """The tasks that a model is fine-tuned for."""

    classification = "classification"
    pairs = "pairs"
    ner = "ner"
    qa = "qa"
