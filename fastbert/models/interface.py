"""``attn_implementation="fastbert"`` for Hugging Face models: packed attention behind their attention interface.

Two tables of Hugging Face's must agree: one holds the attention, the other makes the mask that it gets. Without an
entry in the second, padding would be ignored without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.backends import transforms
from fastbert.models import packing, upstream

NAME = "fastbert"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = upstream.bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for ``attention``: ``[B, S]`` where only padding is hidden, else sdpa's ``[B, 1, S, S]``."""
    if mask_function is upstream.bidirectional_mask_function and q_length == kv_length:
        return attention_mask
    made: Tensor | None = upstream.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **kwargs
    )
    return made


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scale · QKᵀ)V without the padding; with causal or other 4-D masks it is torch's own attention.

    Args:
        query, key, value: ``[B, A, S, D]``.
        attention_mask: None, bool ``[B, S]``, or what torch's ``scaled_dot_product_attention`` takes.
        dropout: probability of dropping an attention probability.
        scaling: factor of the scores; None is ``D ** -0.5``.
        is_causal: None takes the module's.

    Returns:
        (``[B, S, A, D]``, None); zeros at padded positions of a 2-D mask.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = query.shape == key.shape == value.shape and (attention_mask is None or attention_mask.dim() == 2)
    elsewhere = (causal and attention_mask is None) or kwargs.get("position_bias") is not None or transforms.active()
    if not whole or elsewhere:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :]
        output: Tensor = upstream.sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )[0]
        return output, None
    batch, heads, seqlen, head_size = query.shape
    qkv = torch.stack((query, key, value), dim=1).permute(0, 3, 1, 2, 4)
    if attention_mask is None:
        packed = packing.full(batch, seqlen, query.device)
    else:
        packed = packing.from_mask_static(attention_mask)
    tokens = packed.pack(qkv.reshape(batch, seqlen, -1)).view(-1, 3, heads, head_size)
    context = ops.attention(tokens, packed.cu_seqlens, packed.max_seqlen, scale=scaling, dropout_p=dropout)
    return packed.unpack(context.flatten(1)).view(batch, seqlen, heads, head_size), None


def register() -> None:
    """Add "fastbert" to Hugging Face's attention and mask interfaces, where they are as fastbert knows them."""
    if not upstream.HAS_INTERFACE:
        return
    upstream.AttentionInterface.register(NAME, attention)
    upstream.AttentionMaskInterface.register(NAME, attention_mask)
