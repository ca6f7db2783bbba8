"""The public function ``embedding_layer_norm``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.backends import checks, select
from fastbert.ops.embedding_layer_norm import schema  # noqa: F401  registers the op


def _triton_reasons(request: select.Request) -> Iterator[str]:
    yield from select.needs_triton(request)
    yield from select.needs_dtype(request, torch.float32, torch.float16, torch.bfloat16)


_MODULE = "fastbert.ops.embedding_layer_norm"
TABLE = select.Table(
    "embedding_layer_norm",
    (
        select.Implementation("triton", f"{_MODULE}.triton", _triton_reasons),
        select.Implementation("torch", f"{_MODULE}.torch", select.nothing),
        select.Implementation("reference", f"{_MODULE}.reference", select.nothing),
    ),
)


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    padding_idx: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """``dropout(layer_norm(word[input_ids] + position[position_ids] + token_type[token_type_ids]))``.

    Args:
        input_ids, position_ids, token_type_ids: ``[T]``, int32 or int64, rows of the three tables. On a CPU an id out
            of range raises IndexError; on a GPU it is an assertion of the device, or undefined.
        word, position, token_type: ``[V, H]``, ``[P, H]``, ``[N, H]``, any floating dtype; each gets its gradient,
            in which ids may repeat, in its own, and it is deterministic.
        weight, bias: ``[H]``, any floating dtype; each gets its gradient in its own.
        eps: added to the variance.
        p: probability of dropping an element, quantised to multiples of 2**-16.
        seed: int64 with one element, on the device of ``word``; None draws one from torch's default generator.
        padding_idx: the row of ``word`` that gets no gradient, counted from the end when negative, as in
            ``torch.nn.Embedding``; None: every row gets one.
        impl: "triton", "torch", "reference", or None for the first of them that can serve the call.

    Returns:
        ``[T, H]``, contiguous, in the dtype that the three tables promote to.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device than it must have.
        IndexError: an id is out of range, on a CPU.
        UnsupportedError: ``impl`` can't serve the call.
    """
    checks.rows("word", word)
    hidden = word.shape[-1]
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        checks.floating(name, table)
        if table.ndim != 2 or table.shape[1] != hidden:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; it must be (rows, {hidden})")
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        checks.integers(name, ids)
        if ids.ndim != 1 or ids.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; all ids must be one-dimensional and of one length")
    checks.vector("weight", weight, hidden)
    checks.vector("bias", bias, hidden)
    checks.probability("p", p)
    checks.same_device(
        word=word,
        position=position,
        token_type=token_type,
        weight=weight,
        bias=bias,
        input_ids=input_ids,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
    )
    rows = word.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx is {padding_idx}; it may be None or {-rows} to {rows - 1}, a row of word")
    seed = checks.dropout_seed(p, seed, word.device)
    dtype = torch.promote_types(torch.promote_types(word.dtype, position.dtype), token_type.dtype)
    chosen = TABLE.choose(impl, select.Request(word.device.type, dtype, p))
    affine_dtype = torch.promote_types(weight.dtype, bias.dtype)
    output: Tensor = torch.ops.fastbert.embedding_layer_norm(
        input_ids,
        position_ids,
        token_type_ids,
        word.to(dtype),
        position.to(dtype),
        token_type.to(dtype),
        weight.to(affine_dtype),
        bias.to(affine_dtype),
        eps,
        p,
        seed,
        -1 if padding_idx is None else padding_idx % rows,
        chosen,
    )[0]
    return output
