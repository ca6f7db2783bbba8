"""Finding the tokens of a padded batch on a GPU: two launches by Triton, against PyTorch's operators."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastbert.ops.unpad import reference

from .harness import Contest, Contestant
from .shapes import MODELS, even, full
from .suite import TORCH, Case

_TRITON = "fastbert triton"


def cases(device: str) -> list[Case]:
    """None on a processor, which has PyTorch's operators only. The dtype has no part in the work."""
    if device == "cpu":
        return []
    batches = (even(64, 512, 0.5), full(64, 512), even(512, 64, 0.5))
    return [
        Case("unpad forward", MODELS["BERT-base"], batch, "float32", device, (_TRITON, TORCH), quick=True)
        for batch in batches
    ]


def build(case: Case) -> Contest:
    from fastbert.ops.unpad import triton

    mask = case.batch.mask().to(device=case.device, dtype=torch.int64)

    def numbers(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
        cu_seqlens, indices, facts = found
        # Integers that float32 holds exactly; the facts about padding that is read are as many as were asked for.
        return {"cu_seqlens": cu_seqlens.double(), "indices": indices.double(), "facts": facts[:2].double()}

    calls = {
        _TRITON: functools.partial(triton.unpad, mask, None, True),
        TORCH: functools.partial(reference.unpad, mask, None, True),
    }
    exact = numbers(calls[TORCH]())
    return Contest(
        {
            name: Contestant(call, lambda call=call: numbers(call()))  # type: ignore[misc]
            for name, call in calls.items()
        },
        missing={},
        exact=exact,
        eager=exact,
        dtype=case.torch_dtype,
        device=torch.device(case.device),
        # The mask is read once and a place written for each position.
        bytes=2.0 * 8 * mask.numel(),
        graphed=True,
    )


def bench_unpad(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
