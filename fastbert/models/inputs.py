"""Checks of a model's inputs, made before anything is launched.

Each error names the argument, what it is and what it may be. Values are looked at on the CPU, where that is cheap; on
a GPU it would wait for the device, so it is done only when the environment variable ``FASTBERT_CHECK_IDS`` is 1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from transformers import BertConfig

from fastbert.backends import transforms

_ID_DTYPES = (torch.int64, torch.int32)


class EmptyBatchError(ValueError, RuntimeError):
    """There are no tokens. Hugging Face raises RuntimeError there, so callers that catch either are served."""


def boolean_4d(mask: Tensor | None, attn_implementation: str, dtype: torch.dtype) -> Tensor | None:
    """Give a 0/1 or boolean 4-D mask one meaning, "attend where set"; other masks are returned as they are.

    Attention by ``eager`` adds its mask to the scores, so there it becomes 0 and the lowest number of the model's
    ``dtype``.
    """
    if mask is None or mask.dim() != 4 or mask.is_floating_point():
        return mask
    mask = mask.to(torch.bool)
    if attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def broadcast_2d(mask: Tensor | None, embedded: Tensor | None) -> Tensor | None:
    """A mask ``[S]`` or ``[1, S]`` for every row of ``embedded`` (``[B, S, ...]``); other masks as they are."""
    if mask is None or embedded is None or embedded.dim() < 2 or mask.dim() not in (1, 2):
        return mask
    batch, seqlen = embedded.shape[:2]
    if mask.shape[-1] == seqlen and (mask.dim() == 1 or (mask.shape[0] == 1 and batch > 1)):
        return mask.expand(batch, seqlen)
    return mask


def check(
    config: BertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> None:
    """Raise if the arguments of a forward pass over whole sequences can't be served.

    Args:
        config: its ``vocab_size``, ``type_vocab_size``, ``max_position_embeddings`` and ``hidden_size`` are the limits.
        input_ids: int32 or int64 ``[B, S]``; or None with ``inputs_embeds`` ``[B, S, H]``.
        attention_mask: None, ``[B, S]`` (see ``broadcast_2d``) or ``[B or 1, A or 1, S, S]``.
        token_type_ids, position_ids: int32 or int64, broadcastable to ``[B, S]``.

    Raises:
        TypeError: ids that aren't integers.
        ValueError: a shape, or a length over ``max_position_embeddings``; EmptyBatchError: no tokens.
        IndexError: an id outside its table.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        _check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, sequence]")
        batch, seqlen = input_ids.shape
        name = "input_ids"
    else:
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; it must be [batch, sequence, H]")
        batch, seqlen, hidden = inputs_embeds.shape
        if hidden != config.hidden_size:
            raise ValueError(f"inputs_embeds has {hidden} features; it must have hidden_size, {config.hidden_size}")
        name = "inputs_embeds"
    if batch == 0 or seqlen == 0:
        raise EmptyBatchError(f"{name} has {batch} sequences of length {seqlen}; there must be at least one of each")
    if position_ids is None:
        if seqlen > config.max_position_embeddings:
            raise ValueError(
                f"{name} has sequence length {seqlen}; it may be at most max_position_embeddings, "
                f"{config.max_position_embeddings}"
            )
    else:
        _check_ids("position_ids", position_ids, config.max_position_embeddings, "max_position_embeddings")
        _check_broadcast("position_ids", position_ids, name, batch, seqlen)
    if token_type_ids is not None:
        _check_ids("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size")
        _check_broadcast("token_type_ids", token_type_ids, name, batch, seqlen)
    if attention_mask is not None:
        _check_mask(attention_mask, name, batch, seqlen)


def _check_ids(name: str, ids: Tensor, limit: int, limit_name: str) -> None:
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{name} has dtype {ids.dtype}; it may be torch.int64 or torch.int32")
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta or transforms.active():
        return
    if ids.device.type != "cpu" and os.environ.get("FASTBERT_CHECK_IDS") != "1":
        return
    low, high = ids.aminmax()
    if low < 0 or high >= limit:
        wrong = int(low if low < 0 else high)
        raise IndexError(f"{name} holds {wrong}; values must be from 0 to {limit_name} - 1, which is {limit - 1}")


def _check_broadcast(name: str, ids: Tensor, main: str, batch: int, seqlen: int) -> None:
    sizes = (batch, seqlen)[-ids.dim() :]
    if ids.dim() not in (1, 2) or any(size not in (1, whole) for size, whole in zip(ids.shape, sizes, strict=True)):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; with {main} of {(batch, seqlen)} it must match that")


def _check_mask(mask: Tensor, main: str, batch: int, seqlen: int) -> None:
    if mask.dim() in (1, 2):
        if mask.shape != (batch, seqlen):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, and {main} {(batch, seqlen)}; they must match"
            )
    elif mask.dim() == 4:
        if mask.shape[0] not in (1, batch) or mask.shape[-1] != seqlen or mask.shape[-2] not in (1, seqlen):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, and {main} {(batch, seqlen)}; a 4-D mask must be "
                f"[{batch} or 1, heads or 1, {seqlen}, {seqlen}]"
            )
    else:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it may be [batch, sequence], [sequence] or "
            "[batch, heads, query, key] (a 3-D mask needs a head dimension: mask[:, None])"
        )
