"""Texts to padded batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Batch(NamedTuple):
    """``input_ids`` and ``attention_mask`` (1 where a token is), int64 ``[B, S]``, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Ids of each text, ``[CLS]`` and ``[SEP]`` included, cut to ``max_length``."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def pad(ids: Sequence[Sequence[int]], pad_token_id: int | None) -> Batch:
    """One batch, padded to its longest text; padding is masked, so its id (None is 0) doesn't matter."""
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(mask.shape, pad_token_id or 0)
    input_ids[mask] = torch.tensor([token for row in ids for token in row])
    return Batch(input_ids, mask.to(torch.int64))


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of each text's tokens, in float32: ``[B, S, H]``, ``[B, S]`` -> ``[B, H]``."""
    weights = mask.to(torch.float32)
    summed = torch.einsum("bsh,bs->bh", states.float(), weights)
    return summed / weights.sum(1, keepdim=True)
