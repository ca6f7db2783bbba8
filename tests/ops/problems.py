"""One call of each op for the tests: its tensors, the op, its oracle, and the same in eager PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import parity
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.backends import philox, select
from fastbert.ops.attention import reference as attention_reference
from fastbert.ops.bias_dropout_residual import reference as bias_dropout_residual_reference
from fastbert.ops.bias_dropout_residual_layer_norm import reference as bias_dropout_residual_layer_norm_reference
from fastbert.ops.bias_gelu import reference as bias_gelu_reference
from fastbert.ops.embedding_layer_norm import reference as embedding_layer_norm_reference
from fastbert.ops.layer_norm import reference as layer_norm_reference
from fastbert.ops.linear_gelu import reference as linear_gelu_reference

SEED = 0x1234_5678_9ABC_DEF0
EPS = 1e-12
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Those with Triton's kernels.
BY_TRITON = {"triton", "persistent", "by_shape", "cublas_triton"}
LENGTHS = (3, 0, 37, 1, 19)
TOKENS = 60


@dataclass
class Problem:
    """``actual(**tensors, impl=...)`` is the op, ``oracle`` its reference's forward, ``eager`` plain PyTorch.

    Made with ``seed=None``, only ``actual`` is of use: the op then draws its seed itself.
    """

    op: str
    tensors: dict[str, Tensor]
    actual: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    dropout_p: float = 0.0
    dy: Tensor | None = None
    longest: int = 0

    def implementations(self) -> list[str]:
        """The names of those that can serve it on a CPU.

        Where Triton's kernels are run on the CPU, those and the reference: the others run elsewhere.
        """
        first = next(iter(self.tensors.values()))
        rows = select.table(self.op).explain(select.Request("cpu", first.dtype, self.dropout_p))
        names = [row.implementation for row in rows if not row.reasons]
        if not BY_TRITON.isdisjoint(names):
            names = [name for name in names if name in BY_TRITON or name == "reference"]
        return names

    def check(self, *implementations: str, roundings: int = 1) -> None:
        """Parity of these implementations, or of all that can serve the problem."""
        actual = {impl: functools.partial(self.actual, impl=impl) for impl in implementations or self.implementations()}
        steps = {impl: roundings + self.more_roundings(impl) for impl in actual}
        parity.check(actual, self.oracle, self.eager, self.tensors, self.dy, steps)

    def more_roundings(self, impl: str) -> int:
        """The rounding steps in float32 that an implementation is known to have beside those of eager PyTorch.

        "triton": where float32 is split into two numbers of TF32, each operand is off by up to half a unit of its last
        place, and of the four products that of the low parts, another half, is left out: three halves of a step.

        Backwards of attention take probabilities from the log-sum-exp: exp(S - lse). Half a unit of the last place of
        lse, about log(keys), is a relative error of all probabilities of a query, of two steps with 55 keys or more and
        of one with fewer. "triton" holds it in base 2, 1.44 times as large. The forward of "simd" adds up S in another
        order: another step, since what S was rounded by no longer cancels.
        """
        if next(iter(self.tensors.values())).dtype != torch.float32:
            return 0
        split = 2 if impl == "triton" else 0
        if self.op == "linear_gelu":
            return split
        if self.op != "attention" or impl not in ("triton", "sdpa", "simd"):
            return 0
        lse = math.log(max(self.longest, 2)) / (math.log(2) if impl == "triton" else 1)
        return split + max(1, math.ceil(2 ** (math.floor(math.log2(lse)) - 1))) + (impl == "simd")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def seed_of(p: float, seed: int | None) -> Tensor | None:
    """A fresh tensor each time: a mask must depend on the value, not on the address."""
    return None if p == 0.0 or seed is None else torch.tensor([seed])


def eager_dropout(x: Tensor, p: float, seed: int | None) -> Tensor:
    if p == 0.0:
        return x
    return torch.where(philox.hidden_mask(seed_of(p, seed), x.shape, p), x * philox.scale(p), 0.0)


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attention(
    lengths: Sequence[int] = LENGTHS,
    heads: int = 3,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    p: float = 0.0,
    scale: float | None = None,
    spare_rows: int = 3,
    spare_keys: int = 2,
    seed: int | None = SEED,
) -> Problem:
    """``spare_rows`` rows after the last sequence hold NaN, and so does the incoming gradient there."""
    tokens = sum(lengths)
    qkv = random(tokens + spare_rows, 3, heads, size, dtype=dtype)
    dy = random(tokens + spare_rows, heads, size, dtype=dtype)
    qkv[tokens:] = dy[tokens:] = float("nan")
    cu_seqlens = cumulative(lengths)
    max_seqlen = max(lengths, default=0) + spare_keys
    factor = 1.0 / math.sqrt(size) if scale is None else scale

    def actual(qkv: Tensor, impl: str | None = None) -> Tensor:
        return ops.attention(qkv, cu_seqlens, max_seqlen, scale=scale, dropout_p=p, seed=seed_of(p, seed), impl=impl)

    def oracle(qkv: Tensor) -> Tensor:
        return attention_reference.forward(qkv, cu_seqlens, max_seqlen, factor, p, seed_of(p, seed))[0]

    def eager(qkv: Tensor) -> Tensor:
        parts = [qkv[:0, 0]]
        for sequence, (length, part) in enumerate(zip(lengths, qkv[:tokens].split(list(lengths)), strict=True)):
            q, k, v = part.permute(1, 2, 0, 3)
            probabilities = torch.softmax(factor * q @ k.mT, -1)
            if p > 0.0:
                where = torch.tensor([sequence])
                mask = philox.attention_mask(seed_of(p, seed), where, heads, length, length, p)[0]
                probabilities = torch.where(mask, probabilities * philox.attention_scale(p), 0.0)
            parts.append((probabilities @ v).transpose(0, 1))
        return torch.cat([*parts, qkv.new_zeros(spare_rows, heads, size)])

    return Problem("attention", {"qkv": qkv}, actual, oracle, eager, p, dy, max(lengths, default=0))


def layer_norm(shape: Sequence[int] = (8, 5, 24), dtype: torch.dtype = torch.float32, eps: float = EPS) -> Problem:
    hidden = shape[-1]
    tensors = {
        "x": random(*shape, dtype=dtype),
        "weight": 1.0 + random(hidden, dtype=dtype),
        "bias": random(hidden, dtype=dtype),
    }
    return Problem(
        "layer_norm",
        tensors,
        functools.partial(ops.layer_norm, eps=eps),
        lambda **tensors: layer_norm_reference.forward(**tensors, eps=eps)[0],
        lambda x, weight, bias: F.layer_norm(x, (hidden,), weight, bias, eps),
    )


def bias_gelu(
    shape: Sequence[int] = (8, 5, 24), dtype: torch.dtype = torch.float32, approximate: str = "none"
) -> Problem:
    tensors = {"x": 3.0 * random(*shape, dtype=dtype), "bias": random(shape[-1], dtype=dtype)}
    return Problem(
        "bias_gelu",
        tensors,
        functools.partial(ops.bias_gelu, approximate=approximate),
        functools.partial(bias_gelu_reference.forward, approximate=approximate),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
    )


def linear_gelu(
    shape: Sequence[int] = (8, 5, 24),
    features: int = 40,
    dtype: torch.dtype = torch.float32,
    approximate: str = "none",
    has_bias: bool = True,
) -> Problem:
    tensors = {
        "x": random(*shape, dtype=dtype),
        "weight": random(features, shape[-1], dtype=dtype) / math.sqrt(shape[-1]),
        "bias": random(features, dtype=dtype),
    }
    if not has_bias:
        del tensors["bias"]
    return Problem(
        "linear_gelu",
        tensors,
        lambda x, weight, bias=None, impl=None: ops.linear_gelu(x, weight, bias, approximate=approximate, impl=impl),
        lambda x, weight, bias=None: linear_gelu_reference.forward(x, weight, bias, approximate, True)[0],
        lambda x, weight, bias=None: F.gelu(F.linear(x, weight, bias), approximate=approximate),
    )


def bias_dropout_residual(
    shape: Sequence[int] = (8, 5, 24),
    dtype: torch.dtype = torch.float32,
    p: float = 0.1,
    has_bias: bool = True,
    seed: int | None = SEED,
) -> Problem:
    tensors = {
        "x": random(*shape, dtype=dtype),
        "bias": random(shape[-1], dtype=dtype),
        "residual": random(*shape, dtype=dtype),
    }
    if not has_bias:
        del tensors["bias"]
    return Problem(
        "bias_dropout_residual",
        tensors,
        lambda x, residual, bias=None, impl=None: ops.bias_dropout_residual(
            x, bias, residual, p=p, seed=seed_of(p, seed), impl=impl
        ),
        lambda x, residual, bias=None: bias_dropout_residual_reference.forward(x, bias, residual, p, seed_of(p, seed)),
        lambda x, residual, bias=None: residual + eager_dropout(x if bias is None else x + bias, p, seed),
        p,
    )


def bias_dropout_residual_layer_norm(
    shape: Sequence[int] = (8, 5, 24),
    dtype: torch.dtype = torch.float32,
    p: float = 0.1,
    has_bias: bool = True,
    seed: int | None = SEED,
) -> Problem:
    tensors = bias_dropout_residual(shape, dtype, p, has_bias).tensors
    tensors |= {"weight": 1.0 + random(shape[-1], dtype=dtype), "ln_bias": random(shape[-1], dtype=dtype)}

    def actual(x, residual, weight, ln_bias, bias=None, impl=None):
        return ops.bias_dropout_residual_layer_norm(
            x, bias, residual, weight, ln_bias, EPS, p=p, seed=seed_of(p, seed), impl=impl
        )

    def oracle(x, residual, weight, ln_bias, bias=None):
        return bias_dropout_residual_layer_norm_reference.forward(
            x, bias, residual, weight, ln_bias, EPS, p, seed_of(p, seed)
        )[0]

    def eager(x, residual, weight, ln_bias, bias=None):
        hidden = residual + eager_dropout(x if bias is None else x + bias, p, seed)
        return F.layer_norm(hidden, hidden.shape[-1:], weight, ln_bias, EPS)

    return Problem("bias_dropout_residual_layer_norm", tensors, actual, oracle, eager, p)


def embedding_layer_norm(
    tokens: int = TOKENS,
    hidden: int = 24,
    dtype: torch.dtype = torch.float32,
    p: float = 0.1,
    padding_idx: int | None = 0,
    ids_dtype: torch.dtype = torch.int64,
    seed: int | None = SEED,
) -> Problem:
    sizes = {"word": 11, "position": 7, "token_type": 2}
    tensors = {name: random(rows, hidden, dtype=dtype) for name, rows in sizes.items()}
    tensors |= {"weight": 1.0 + random(hidden, dtype=dtype), "bias": random(hidden, dtype=dtype)}
    ids = [torch.randint(rows, (tokens,), dtype=ids_dtype) for rows in sizes.values()]
    row = -1 if padding_idx is None else padding_idx

    def eager(word, position, token_type, weight, bias):
        looked_up = F.embedding(ids[0], word, padding_idx) + F.embedding(ids[1], position)
        return eager_dropout(
            F.layer_norm(looked_up + F.embedding(ids[2], token_type), (hidden,), weight, bias, EPS), p, seed
        )

    return Problem(
        "embedding_layer_norm",
        tensors,
        lambda impl=None, **tensors: ops.embedding_layer_norm(
            *ids, **tensors, eps=EPS, p=p, seed=seed_of(p, seed), padding_idx=padding_idx, impl=impl
        ),
        lambda **tensors: embedding_layer_norm_reference.forward(
            *ids, **tensors, eps=EPS, p=p, seed=seed_of(p, seed), padding_idx=row
        )[0],
        eager,
        p,
    )


# What every test of the contract is run on: by the op's name, with its dropout or without, a maker of a small problem.
MAKERS: dict[str, Callable[..., Problem]] = {
    "attention": attention,
    "attention-dropout": functools.partial(attention, p=0.1),
    "layer_norm": layer_norm,
    "bias_gelu": bias_gelu,
    "linear_gelu": linear_gelu,
    "bias_dropout_residual": bias_dropout_residual,
    "bias_dropout_residual-none": functools.partial(bias_dropout_residual, p=0.0),
    "bias_dropout_residual_layer_norm": bias_dropout_residual_layer_norm,
    "bias_dropout_residual_layer_norm-none": functools.partial(bias_dropout_residual_layer_norm, p=0.0, has_bias=False),
    "embedding_layer_norm": embedding_layer_norm,
    "embedding_layer_norm-none": functools.partial(embedding_layer_norm, p=0.0),
}
if select._TRITON_DEVICE == "cpu":
    MAKERS = {name: maker for name, maker in MAKERS.items() if not BY_TRITON.isdisjoint(maker().implementations())}
