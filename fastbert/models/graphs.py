"""CUDA graphs: inference replayed without the host's launches, one graph for each bucket of batch, length and tokens.

At small batches a forward is bound by the host, which launches some eight kernels a layer. A captured graph is one
launch. It computes one shape only, so a batch is padded to the nearest bucket of batch size and length, and its valid
tokens to the nearest share of the bucket's positions; attention skips all padding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.models import bert
from fastbert.models.snapshot import Snapshot

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
# A batch whose tokens fill a quarter of its bucket or more computes at most half as many again.
TOKEN_SHARES = (0.25, 0.375, 0.5, 0.75, 1.0)
# To count a batch's tokens waits for the device, which takes longer than what it saves of fewer positions.
_LEAST_COUNTED = 2048

_WARM_UP = 3
_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")
# What changes nothing where it says what the configuration does.
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
# What is read of the configuration in inference and may be changed at any time.
_SETTINGS = attrgetter("_attn_implementation", *_OUTPUTS)
# What a graph knows of a parameter or buffer: where its numbers are, and how they are to be read.
_FACTS = (Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype"))
# Outputs of two dimensions whose second is the position; of any other it is a class or a feature.
_BY_POSITION = ("start_logits", "end_logits")

# Batch size, length and tokens.
Bucket = tuple[int, int, int]


def cuda_graphs(
    model: nn.Module,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    lengths: Sequence[int] = LENGTHS,
    token_shares: Sequence[float] = TOKEN_SHARES,
) -> GraphedModel:
    """Make ``model`` replay CUDA graphs in inference.

    Args:
        model: a fastbert model or one that ``accelerate`` has converted, on a GPU and in ``eval`` mode.
        batch_sizes, lengths: the buckets; a batch takes the smallest that holds it. Lengths over the model's
            ``max_position_embeddings`` are left out.
        token_shares: the shares of a bucket's positions that its graphs compute, each above 0 and at most 1; a batch
            takes the smallest that its valid tokens fit in, and all positions if they fit in none. Buckets of fewer
            than 2048 positions, where to count the tokens takes longer than to compute them, have all positions only.

    Returns:
        A module that is called as ``model`` is, with the same outputs. A graph is captured at the first batch of its
        bucket; what the graphs can't serve is run by ``model`` itself, and ``route`` says why.

    Raises:
        TypeError: ``model`` isn't one of fastbert's.
        ValueError: there is no bucket, or one isn't positive; a share isn't above 0 and at most 1.
    """
    return GraphedModel(model, batch_sizes, lengths, token_shares)


@dataclasses.dataclass
class _Captured:
    """A graph with the tensors that it reads and writes."""

    graph: Any
    inputs: dict[str, Tensor]
    outputs: Any


class GraphedModel(nn.Module):
    """A model whose inference is replayed from graphs; see :func:`cuda_graphs`.

    Padding may be anywhere in a row; but as under ``torch.compile``, the pooled output of a row that begins with it is
    NaN. Weights may be changed in place (``load_state_dict``, an optimizer's step); where they move (``to``), or where
    modules, hooks or the switches of adapters change, graphs are captured again. Outputs are copies, so the next call
    leaves them as they are. Calls of several threads wait for each other.

    Attributes:
        model: the model.
        route: how the last call went: "graph BATCHxLENGTH", with ", N tokens" where these are fewer than the bucket's
            positions; or why it was run without.
    """

    route: str | None = None

    def __init__(
        self, model: Any, batch_sizes: Sequence[int], lengths: Sequence[int], token_shares: Sequence[float]
    ) -> None:
        super().__init__()
        if type(model) not in bert.MODELS.values():
            raise TypeError(
                f"model is a {type(model).__module__}.{type(model).__qualname__}; it must be one of fastbert's, or one "
                "that fastbert.accelerate has converted"
            )
        for name, sizes in (("batch_sizes", batch_sizes), ("lengths", lengths)):
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name} is {tuple(sizes)}; it must be one positive number or more")
        if not all(0.0 < share <= 1.0 for share in token_shares):
            raise ValueError(f"token_shares is {tuple(token_shares)}; each must be above 0 and at most 1")
        self.model = model
        self._shares = tuple(sorted(token_shares))
        self._batch_sizes = tuple(sorted(batch_sizes))
        self._lengths = tuple(sorted(n for n in lengths if n <= model.config.max_position_embeddings))
        self._captured: dict[Bucket, _Captured] = {}
        self._refused: dict[Bucket, str] = {}
        # The model that the graphs are of.
        self._snapshot: Snapshot | None = None
        self._facts: list[Any] = []
        # Made with the first graph: the memory that all graphs share, and the end of the last call.
        self._pool: Any = None
        self._done: Any = None
        self._lock = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        given, reason = self._given(args, kwargs)
        if reason is None:
            batch, length = given["input_ids"].shape
            sizes = (_smallest(self._batch_sizes, batch), _smallest(self._lengths, length))
            reason = self._outside(sizes, batch, length)
        if reason is None:
            with self._lock, torch.cuda.device_of(given["input_ids"]):
                bucket = (*sizes, self._tokens(*sizes, given))
                reason = self._replayable(bucket, given)
                if reason is None:
                    self.route = f"graph {bucket[0]}x{bucket[1]}"
                    if bucket[2] < bucket[0] * bucket[1]:
                        self.route += f", {bucket[2]} tokens"
                    return self._replay(self._captured[bucket], given)
        self.route = reason
        return self.model(*args, **kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], str | None]:
        """The arguments that a graph takes, and why a call can't be replayed whatever its size is."""
        names = (*_ARGUMENTS, *(f"positional argument {place}" for place in range(len(_ARGUMENTS) + 1, len(args) + 1)))
        given = {
            name: value
            for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items()
            if value is not None and not (name in _OUTPUTS and value is getattr(self.model.config, name))
        }
        ids = given.get("input_ids")
        if other := sorted(given.keys() - set(_ARGUMENTS)):
            return given, f"{', '.join(other)} is given"
        if self.model.training:
            return given, "the model is in train mode, and the graphs are of inference (call eval() first)"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            return given, "gradients are needed (use torch.no_grad() or torch.inference_mode())"
        if ids is None or ids.dim() != 2 or ids.numel() == 0:
            return given, "input_ids isn't [batch, sequence]"
        if any(value.shape != ids.shape for value in given.values()):
            return given, "attention_mask or token_type_ids hasn't the shape of input_ids"
        if torch.compiler.is_compiling():
            return given, "the model is being traced"
        return given, self._missing_device(ids)

    def _missing_device(self, ids: Tensor) -> str | None:
        if ids.device.type != "cuda":
            return f"graphs are of a GPU, and the tensors are on {ids.device.type}"
        if torch.cuda.is_current_stream_capturing():
            return "a graph is being captured around it"
        return None

    def _tokens(self, batch: int, length: int, given: dict[str, Tensor]) -> int:
        """How many tokens the graph for a batch computes; waits for the device where they have to be counted."""
        positions = batch * length
        if positions < _LEAST_COUNTED or not self._shares or self._shares[0] == 1.0:
            return positions
        mask = given.get("attention_mask")
        tokens = given["input_ids"].numel() if mask is None else int(torch.count_nonzero(mask))
        found: int | None = _smallest([math.ceil(share * positions) for share in self._shares], tokens)
        return positions if found is None else found

    def _outside(self, bucket: tuple[int | None, int | None], batch: int, length: int) -> str | None:
        if bucket[0] is None:
            return f"the batch is {batch}, and the largest bucket {self._batch_sizes[-1]}"
        if bucket[1] is None:
            return f"the length is {length}, and the largest bucket {self._lengths[-1] if self._lengths else 'none'}"
        return None

    def _replayable(self, bucket: Bucket, given: dict[str, Tensor]) -> str | None:
        """Capture the bucket's graph unless there is one; why it can't be."""
        if not self._unchanged():
            # Every graph reads weights where they were, and runs the kernels of the modules that there were.
            self._captured.clear()
            self._refused.clear()
            self._snapshot = Snapshot(self.model, self.model.modules(), tensors=True)
            self._facts = self._look()
            if not self._unchanged():
                return "a module doesn't show whether it has changed, as those of TorchScript don't"
        if bucket in self._captured:
            return None
        if bucket in self._refused:
            return self._refused[bucket]
        try:
            self._captured[bucket] = self._capture(bucket, given["input_ids"].device)
        except RuntimeError as error:
            self._refused[bucket] = f"no graph could be captured: {str(error).splitlines()[0]}"
            return self._refused[bucket]
        return None

    def _unchanged(self) -> bool:
        """Whether the model is what it was when the snapshot was taken."""
        snapshot = self._snapshot
        return snapshot is not None and snapshot.holds(self.model) and self._look() == self._facts

    def _look(self) -> list[Any]:
        assert self._snapshot is not None
        return [_SETTINGS(self.model.config), *(list(map(fact, self._snapshot.tensors)) for fact in _FACTS)]

    # Not in inference mode, even where the caller is: its tensors couldn't be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, bucket: Bucket, device: torch.device) -> _Captured:
        batch, length, tokens = bucket
        inputs = {name: torch.zeros(batch, length, dtype=torch.int64, device=device) for name in _ARGUMENTS}
        # As many tokens, and as long a row, as the graph has room for, so that what is warmed up is what will run.
        inputs["attention_mask"].view(-1)[:tokens] = 1
        forward = functools.partial(self.model, **inputs, packed_tokens=tokens)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        if self._pool is None:
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        graph = torch.cuda.CUDAGraph()
        # Other threads, of a data loader for instance, may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = forward()
        return _Captured(graph, inputs, outputs)

    def _replay(self, captured: _Captured, given: dict[str, Tensor]) -> Any:
        batch, length = given["input_ids"].shape
        # The last call's copies may still be under way on another stream, and all graphs share their memory.
        self._done.wait()
        for name, target in captured.inputs.items():
            value = given.get(name)
            if target.shape != (batch, length):
                target.zero_()
            if value is not None:
                target[:batch, :length].copy_(value != 0 if name == "attention_mask" else value, non_blocking=True)
            else:
                target[:batch, :length].fill_(1 if name == "attention_mask" else 0)
        captured.graph.replay()
        outputs = _copied(captured.outputs, batch, length)
        self._done.record()
        return outputs


def _smallest(sizes: Sequence[int], needed: int) -> Any:
    return next((size for size in sizes if size >= needed), None)


def _copied(outputs: Any, batch: int, length: int) -> Any:
    """The part of an output that belongs to the batch, in memory of its own."""

    def copied(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(name, one) for one in value)
        value = value[:batch]
        if value.dim() == 3 or name in _BY_POSITION:
            value = value[:, :length]
        return value.clone()

    return type(outputs)(**{name: copied(name, value) for name, value in outputs.items()})
