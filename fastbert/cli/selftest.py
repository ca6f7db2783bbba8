"""Does what fastbert would run on this machine give the right numbers? Small inputs, every op, two small models.

The parity tests ask for the last bit. This asks whether what is installed works here, so it allows each implementation
the error of the reference in the same dtype twice over, and eight roundings more: with so few numbers the reference
may be nearer to the truth by luck than it mostly is, on one processor and not on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert import modeling_bert

import fastbert
from fastbert import ops
from fastbert.backends import select
from fastbert.cli import parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DROPOUT = 0.1
HEAD_SIZE = 64

_SEED = 1234
_TOKENS, _HEADS, _HIDDEN, _INTERMEDIATE, _ROWS = 37, 2, 80, 112, 11
# Sequences of 5, 0, 15 and 16 tokens; the last token belongs to none.
_CU_SEQLENS = (0, 5, 5, 20, 36)
_EPS = 1e-12
# A layer with the first is one call on a CPU; with the second its parts run one by one.
_FEATURES = (256, 260)


class Check(NamedTuple):
    """One result: the largest error found, what it may be, and what is wrong, if anything is."""

    what: str
    device: str
    dtype: str
    error: float | None
    tolerance: float | None
    failure: str | None


class Error(NamedTuple):
    """The largest error of one tensor, and what it may be."""

    name: str
    value: float
    tolerance: float


class Case(NamedTuple):
    """A call of an op: its float64 arguments that get gradients, and a function of them and ``impl``."""

    op: str
    arguments: dict[str, Tensor]
    call: Callable[..., Tensor]


def run(device: torch.device) -> list[Check]:
    """Every implementation that can run on ``device``, in every dtype, with and without dropout; then two models."""
    checks = []
    for p in (0.0, DROPOUT):
        for case in cases(p, device):
            for dtype in DTYPES:
                request = select.Request(device.type, dtype, p, HEAD_SIZE)
                able = [row for row in select.table(case.op).explain(request) if not row.reasons]
                # The reference is what the others are judged by; by itself it is only of interest where it runs.
                names = [row.implementation for row in able if row.chosen or row.implementation != "reference"]
                for name in names:
                    what = f"{case.op}: {name}" + (f", dropout {p}" if p else "")
                    checks.append(_check(what, device, dtype, partial(_op_errors, case, name, dtype)))
    for size in _FEATURES:
        what = f"BertModel against Hugging Face: intermediate size {size}"
        checks.append(_check(what, device, torch.float32, partial(_model_errors, device, size)))
    return checks


def cases(p: float, device: torch.device) -> list[Case]:
    """One call of every op that has dropout ``p``; with 0 also of those that have none."""
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    def rows(limit: int) -> Tensor:
        return torch.randint(0, limit, (_TOKENS,), generator=generator).to(device)

    seed = torch.tensor([_SEED], device=device)
    cu_seqlens = torch.tensor(_CU_SEQLENS, dtype=torch.int32, device=device)
    longest = int(cu_seqlens.diff().max())
    input_ids, position_ids, token_type_ids = (rows(_ROWS) for _ in range(3))
    affine = {"weight": 1 + normal(_HIDDEN) / 4, "bias": normal(_HIDDEN)}
    sublayer = {"x": normal(_TOKENS, _HIDDEN), "bias": normal(_HIDDEN), "residual": normal(_TOKENS, _HIDDEN)}
    found = [
        Case(
            "attention",
            {"qkv": normal(_TOKENS, 3, _HEADS, HEAD_SIZE)},
            lambda qkv, impl: ops.attention(qkv, cu_seqlens, longest, dropout_p=p, seed=seed, impl=impl),
        ),
        Case(
            "bias_dropout_residual",
            sublayer,
            lambda x, bias, residual, impl: ops.bias_dropout_residual(x, bias, residual, p=p, seed=seed, impl=impl),
        ),
        Case(
            "bias_dropout_residual_layer_norm",
            {**sublayer, "weight": affine["weight"], "ln_bias": affine["bias"]},
            lambda x, bias, residual, weight, ln_bias, impl: ops.bias_dropout_residual_layer_norm(
                x, bias, residual, weight, ln_bias, _EPS, p=p, seed=seed, impl=impl
            ),
        ),
        Case(
            "embedding_layer_norm",
            {**{name: normal(_ROWS, _HIDDEN) for name in ("word", "position", "token_type")}, **affine},
            lambda word, position, token_type, weight, bias, impl: ops.embedding_layer_norm(
                input_ids,
                position_ids,
                token_type_ids,
                word,
                position,
                token_type,
                weight,
                bias,
                _EPS,
                p=p,
                seed=seed,
                impl=impl,
            ),
        ),
    ]
    if p > 0.0:
        return found
    return [
        *found,
        Case(
            "layer_norm",
            {"x": normal(_TOKENS, _HIDDEN), **affine},
            lambda x, weight, bias, impl: ops.layer_norm(x, weight, bias, _EPS, impl=impl),
        ),
        Case(
            "bias_gelu",
            {"x": normal(_TOKENS, _INTERMEDIATE), "bias": normal(_INTERMEDIATE)},
            lambda x, bias, impl: ops.bias_gelu(x, bias, impl=impl),
        ),
        Case(
            "linear_gelu",
            {
                "x": normal(_TOKENS, _HIDDEN),
                "weight": normal(_INTERMEDIATE, _HIDDEN) / _HIDDEN**0.5,
                "bias": normal(_INTERMEDIATE),
            },
            lambda x, weight, bias, impl: ops.linear_gelu(x, weight, bias, impl=impl),
        ),
    ]


def _check(what: str, device: torch.device, dtype: torch.dtype, measure: Callable[[], Iterable[Error]]) -> Check:
    name = str(dtype).removeprefix("torch.")
    try:
        worst = max(measure(), key=lambda error: error.value / error.tolerance if isfinite(error.value) else inf)
    except Exception as raised:  # whatever a broken kernel raises is what the user came to be told
        return Check(what, device.type, name, None, None, f"{type(raised).__name__}: {raised}")
    if not isfinite(worst.value):
        return Check(what, device.type, name, None, worst.tolerance, f"the {worst.name} isn't finite")
    failure = None
    if worst.value > worst.tolerance:
        failure = f"the {worst.name} is off by {worst.value:.2e}, and may be by {worst.tolerance:.2e}"
    return Check(what, device.type, name, worst.value, worst.tolerance, failure)


def _op_errors(case: Case, impl: str, dtype: torch.dtype) -> Iterator[Error]:
    exact = _forward_backward(case, "reference", dtype, torch.float64)
    rounded = _forward_backward(case, "reference", dtype, dtype)
    found = _forward_backward(case, impl, dtype, dtype)
    for name, truth in exact.items():
        rounding = torch.finfo(dtype).eps * float(truth.abs().max())
        yield Error(name, _distance(found[name], truth), 2 * _distance(rounded[name], truth) + 8 * rounding)


def _forward_backward(case: Case, impl: str, rounded_to: torch.dtype, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and all gradients, float64, of arguments rounded to one dtype and computed in another."""
    arguments = {name: value.to(rounded_to).to(dtype).requires_grad_(True) for name, value in case.arguments.items()}
    output = case.call(**arguments, impl=impl)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).view(output.shape)
    gradients = torch.autograd.grad(output, list(arguments.values()), upstream.to(rounded_to).to(dtype))
    names = ["output", *(f"gradient of {name}" for name in arguments)]
    return {name: value.detach().double() for name, value in zip(names, (output, *gradients), strict=True)}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _model_errors(device: torch.device, intermediate_size: int) -> Iterator[Error]:
    """A BERT of two layers on a padded batch: the states in inference, then every gradient."""
    config = BertConfig(
        vocab_size=97,
        hidden_size=_HEADS * HEAD_SIZE,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        intermediate_size=intermediate_size,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        theirs = modeling_bert.BertModel(config, add_pooling_layer=False)
        input_ids = torch.randint(0, config.vocab_size, (4, 32)).to(device)
    ours = fastbert.BertModel(config, add_pooling_layer=False)
    ours.load_state_dict(theirs.state_dict())
    theirs.to(device).eval()  # type: ignore[arg-type]
    ours.to(device).eval()  # type: ignore[arg-type]
    mask = (torch.arange(32) < torch.tensor([1, 9, 20, 32])[:, None]).to(device)
    tolerance, _ = parity.float32_tolerance(config)

    def states(model: modeling_bert.BertModel) -> Tensor:
        output: Tensor = model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        return output[mask]

    with torch.inference_mode():
        yield Error("states", _distance(states(ours), states(theirs)), tolerance)
    for model in (theirs, ours):
        found = states(model)
        (found * torch.linspace(-1, 1, found.numel(), device=device).view(found.shape)).sum().backward()
    for (name, expected), actual in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert expected.grad is not None
        assert actual.grad is not None
        scale = max(1.0, float(expected.grad.abs().max()))
        yield Error(f"gradient of {name}", _distance(actual.grad, expected.grad), tolerance * scale)
