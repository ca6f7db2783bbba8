"""The tasks that a BERT is fine-tuned for: how each reads data, encodes it, scores and predicts."""

from __future__ import annotations

from fastbert.training.kinds import Kind
from fastbert.training.tasks.classification import Classification
from fastbert.training.tasks.ner import NamedEntities
from fastbert.training.tasks.qa import QuestionAnswering

Task = Classification | NamedEntities | QuestionAnswering


def of(kind: Kind) -> Task:
    """The task of that name."""
    match kind:
        case Kind.ner:
            return NamedEntities()
        case Kind.qa:
            return QuestionAnswering()
        case _:
            return Classification(pairs=kind == Kind.pairs)


__all__ = ["Kind", "Task", "of"]
