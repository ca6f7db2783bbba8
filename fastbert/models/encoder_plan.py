"""What is known of an encoder's modules, found out once and used until something about them changes.

A forward on a GPU of few tokens is bound by the host, and so is a training step of many short texts: to look at each
module anew takes longer than to launch its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from fastbert.models.snapshot import Snapshot

# What ``.data`` can change of a parameter that stays the same object.
_FACTS = attrgetter("shape", "dtype", "device")


class EncoderPlan(Snapshot):
    """A snapshot of all modules and tensors of an encoder, or of another module.

    Attributes:
        found: what was found out about them, by name.
    """

    found: dict[str, Any]

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder, encoder.modules(), tensors=True)
        self._facts = list(map(_FACTS, self.tensors))
        self.found = {}

    def holds(self, root: Any) -> bool:
        """As a snapshot does, and only with tensors of the same shapes and dtypes on the same devices."""
        return super().holds(root) and self.same_facts()

    def same_facts(self) -> bool:
        """Whether the tensors that were there have the same shapes and dtypes, on the same devices."""
        return list(map(_FACTS, self.tensors)) == self._facts


def of(encoder: Any) -> EncoderPlan:
    """The plan that the encoder has, or a new one where something has changed.

    It is made before anything is looked at: what another thread changes meanwhile is then seen next time.
    """
    kept: EncoderPlan | None = encoder.__dict__.get("_plan")
    if kept is None or not kept.holds(encoder):
        kept = encoder.__dict__["_plan"] = EncoderPlan(encoder)
    return kept


def lookup(encoder: Any) -> Callable[[], EncoderPlan]:
    """``of(encoder)`` for one forward: it is asked once whether anything has changed, if at all."""
    return functools.cache(functools.partial(of, encoder))
