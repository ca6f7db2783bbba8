"""What the files of the suite share: a case, the contest about one op, and the budget of time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastbert.backends import select

from .harness import Contest, Contestant
from .shapes import MODELS, Batch, Model, even, full

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "both")
TORCH = "torch eager"
COMPILED = "torch compiled"


def _same(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class Peer:
    """Somebody else's function of an op's tensors.

    ``lay_out`` brings a tensor of the op (an argument, or the gradient of the output) into the layout that the peer
    works on, outside of the timing; ``restore`` brings its results back.
    """

    function: Callable[..., Tensor]
    lay_out: Callable[[Tensor], Tensor] = _same
    restore: Callable[[Tensor], Tensor] = _same


@dataclasses.dataclass(frozen=True)
class Case:
    """One contest: a piece of work on a batch, at a model's shape, in a dtype.

    ``contestants`` are the names of all that could take part; ``quick`` cases are those of ``--quick``.
    """

    work: str
    model: Model
    batch: Batch
    dtype: str
    device: str
    contestants: tuple[str, ...]
    dropout_p: float = 0.0
    seconds: float = 0.25
    quick: bool = False

    @property
    def name(self) -> str:
        dropout = f"p{self.dropout_p:g}-" if self.dropout_p else ""
        return f"{self.work.replace(' ', '-')}-{self.model.name}-{self.batch.name}-{dropout}{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def facts(self) -> dict[str, object]:
        """The columns of a result that say what was measured."""
        batch = self.batch
        return {
            "work": self.work,
            "model": self.model.name,
            "batch": batch.name,
            "dtype": self.dtype,
            "dropout_p": self.dropout_p,
            "sequences": len(batch.lengths),
            "seqlen": batch.seqlen,
            "tokens": batch.tokens,
            "padding_ratio": round(batch.padding_ratio, 4),
            "lengths": _histogram(batch.lengths),
        }


def _histogram(lengths: Sequence[int]) -> dict[str, int]:
    """How many sequences have up to 16, 32, ... tokens."""
    found: dict[str, int] = {}
    for length in sorted(lengths):
        upper = max(16, 1 << (length - 1).bit_length())
        found[str(upper)] = found.get(str(upper), 0) + 1
    return found


def op_shapes(device: str) -> list[tuple[Model, Batch]]:
    """What an op that knows rows only is measured at: 1312 rows on a processor, 32 thousand on a GPU."""
    batch = even(16, 128, 0.64) if device == "cpu" else full(64, 512)
    return [(model, batch) for model in MODELS.values()]


def op_cases(
    op: str,
    device: str,
    shapes: Sequence[tuple[Model, Batch]] | None = None,
    *,
    dropout_p: float = 0.0,
    peers: Sequence[str] = (),
) -> list[Case]:
    """Those of an op: every implementation, PyTorch's own and ``peers``, forward, backward and both.

    The first shape is measured in 16 and 32 bits, the others in 16. PyTorch's is compiled only for the first shape in
    16 bits, since compiling takes longer than everything else; those cases are the quick ones.
    """
    shapes = op_shapes(device) if shapes is None else shapes
    names = (*(f"fastbert {name}" for name in select.table(op).names), TORCH, *peers)
    found = []
    for model, batch in shapes:
        first = (model, batch) == shapes[0]
        for dtype in ("bfloat16", "float32") if first else ("bfloat16",):
            quick = first and dtype == "bfloat16"
            contestants = (*names, COMPILED) if quick else names
            found += [
                Case(f"{op} {direction}", model, batch, dtype, device, contestants, dropout_p, quick=quick)
                for direction in DIRECTIONS
            ]
    return found


def op_contest(
    case: Case,
    tensors: dict[str, Tensor],
    ours: Callable[..., Tensor],
    theirs: dict[str, Peer],
    *,
    flops: float = 0.0,
    bytes_forward: float = 0.0,
    bytes_backward: float = 0.0,
    missing: dict[str, str] | None = None,
    measure: Callable[..., Tensor] | None = None,
) -> Contest:
    """The contest about one op.

    Args:
        tensors: the differentiable arguments, float32 on the case's device; each is rounded to the case's dtype.
        ours: the op, called with ``tensors`` and ``impl``.
        theirs: the same in eager PyTorch ("torch eager"), which is compiled too, and of peers.
        flops: of the products of the forward; the backward has twice as many.
        bytes_forward, bytes_backward: of memory traffic.
        missing: reasons of peers that can't take part.
        measure: what eager PyTorch makes of the op's own dropout mask, for its error; by default the oracle's formula
            in the case's dtype. Without dropout it is "torch eager".
    """
    op, direction = case.work.split(" ")
    dtype = case.torch_dtype
    rounded = {name: value.to(dtype) for name, value in tensors.items()}
    exact = {name: value.double() for name, value in rounded.items()}
    reference = functools.partial(ours, impl="reference")
    request = select.Request(case.device, dtype, case.dropout_p, head_size=case.model.head_size)
    absent = dict(missing or {})
    found: dict[str, tuple[Peer, bool]] = {}
    for row in select.table(op).explain(request):
        name = f"fastbert {row.implementation}"
        if row.reasons:
            absent[name] = "; ".join(row.reasons)
        elif row.implementation == "reference":
            absent[name] = "it is the oracle, and not meant to be fast"
        else:
            found[name] = Peer(functools.partial(ours, impl=row.implementation)), True
    # With dropout on, others draw masks of their own: there is nothing to compare.
    found |= {name: (peer, case.dropout_p == 0.0) for name, peer in theirs.items()}
    if COMPILED in case.contestants and case.device == "cuda":
        compiled = dataclasses.replace(theirs[TORCH], function=torch.compile(theirs[TORCH].function, dynamic=False))
        found[COMPILED] = compiled, case.dropout_p == 0.0
    elif COMPILED in case.contestants:
        absent[COMPILED] = "on a processor compiling takes longer than the whole contest; on a GPU it takes part"
    forward, backward = direction != "backward", direction != "forward"
    # The measure is eager PyTorch's error; with dropout that of the formula, as PyTorch draws another mask.
    eager = Peer(measure or reference) if case.dropout_p else theirs[TORCH]
    return Contest(
        contestants={name: _contestant(peer, rounded, direction, known) for name, (peer, known) in found.items()},
        missing=absent,
        exact=_judged(Peer(reference), exact, direction),
        eager=_judged(eager, rounded, direction),
        dtype=dtype,
        device=torch.device(case.device),
        flops=flops * (forward + 2 * backward),
        bytes=bytes_forward * forward + bytes_backward * backward,
        graphed=True,
    )


def _judged(peer: Peer, tensors: dict[str, Tensor], direction: str) -> dict[str, Tensor]:
    judged = _contestant(peer, tensors, direction, True).judged
    assert judged is not None
    return judged()


def _contestant(peer: Peer, tensors: dict[str, Tensor], direction: str, comparable: bool) -> Contestant:
    if direction == "forward":
        laid_out = {name: peer.lay_out(value) for name, value in tensors.items()}

        @torch.no_grad()
        def forward() -> Tensor:
            return peer.function(**laid_out)

        return Contestant(forward, (lambda: {"output": peer.restore(forward())}) if comparable else None)
    leaves = {name: peer.lay_out(value).detach().clone().requires_grad_(True) for name, value in tensors.items()}
    output = peer.function(**leaves)
    dy = peer.lay_out(_upstream(peer.restore(output.detach())))

    def gradients(output: Tensor, retain_graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, tuple(leaves.values()), dy, retain_graph=retain_graph)

    def call() -> tuple[Tensor, ...]:
        if direction == "backward":
            return gradients(output, retain_graph=True)
        return gradients(peer.function(**leaves), retain_graph=False)

    def judged() -> dict[str, Tensor]:
        return {f"gradient of {name}": peer.restore(one) for name, one in zip(leaves, call(), strict=True)}

    # With dropout PyTorch's attention keeps the seed of a forward that isn't captured in the host's memory; a backward
    # that is captured reads it on the device, which is an illegal access.
    return Contestant(call, judged if comparable else None, capturable=comparable or direction == "both")


def _upstream(output: Tensor) -> Tensor:
    """A gradient of the output: the same numbers in every dtype."""
    numbers = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return numbers.to(output.device, output.dtype)
