"""Linear layers of CPU inference: matrix products with prepacked weights and fused post-operations.

The packed copy of a weight is private: it is held here, keyed on the module that owns the weight, never saved, and
rebuilt when the weight has changed. Changes that torch counts are seen at once. Others (through ``.data``, or an array
of numpy that shares the memory) are looked for at each use: those of a bias, and of all of a row or column, are seen at
once, those of single elements within ``FORWARDS_TO_READ_ALL`` uses, since so many read the whole weight.
``backends/host_linear.py`` multiplies by it where it can, otherwise ``backends/onednn.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastbert.backends import extension, host_linear, onednn

# As many as csrc/linear/checksum.h takes turns.
FORWARDS_TO_READ_ALL = 64


class PackedLinear(NamedTuple):
    """A packed weight ``[N, K]`` (opaque), its bias ``[N]``, or None, and the module that multiplies by it."""

    weight: Tensor
    bias: Tensor | None
    kernels: ModuleType


class _Checksums:
    """What parameters held: one element and a checksum of each row, a vector being one row, and more of sparse ones."""

    def __init__(self, described: Tensor, kept: object) -> None:
        """``described`` (int64 ``[matrices, 7]``) is what the extension knows of each; ``kept`` holds the memory."""
        self._described, self._kept = described, kept
        self._table = (extension.memory(described), len(described))
        self._turn = 0

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> _Checksums:
        """Those of parameters as they are now."""
        matrices = [p.detach().reshape(-1, p.shape[-1]) for p in parameters]
        rows = sum(matrix.shape[0] for matrix in matrices)
        samples = torch.empty(sum(sum(matrix.shape) for matrix in matrices), 2, dtype=torch.int32)
        checksums = torch.empty(rows, dtype=torch.int64)
        table, row, sample = [], 0, 0
        for matrix in matrices:
            count, columns = matrix.shape
            size = (matrix.data_ptr(), count, columns * matrix.itemsize, matrix.itemsize)
            table.append([*size, samples[sample:].data_ptr(), 0, checksums[row:].data_ptr()])
            row += count
            sample += count + columns
        assert row == rows, "the extension writes as many checksums as there are rows"
        assert sample == len(samples), "the extension has room for as many samples as there are rows and columns"
        described = torch.tensor(table)
        # The parameters' memory is kept with the rest, so that an address can't come to mean another tensor.
        made = cls(described, (matrices, samples, checksums))
        extension.module().checksums_remember(*made._table)
        return made

    @classmethod
    def joined(cls, several: Sequence[_Checksums]) -> _Checksums:
        """Several, to be looked at in one call."""
        return cls(torch.cat([one._described for one in several]), [one._kept for one in several])

    def unchanged(self, turn: int | None = None) -> bool:
        """Whether the parameters are what they were, as far as can be seen at this turn; by default at the next."""
        self._turn = self._turn + 1 if turn is None else turn
        same: bool = extension.module().checksums_unchanged(*self._table, self._turn, torch.get_num_threads())
        return same


class _Entry(NamedTuple):
    """What a packed weight was made of."""

    stamp: tuple[object, ...]
    checksums: _Checksums
    packed: PackedLinear


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_lock = threading.Lock()


def unsupported(x: Tensor, linears: Sequence[nn.Linear]) -> str | None:
    """Why ``x`` can't be multiplied by the prepacked weights of ``linears``, in one sentence; None when it can."""
    if x.device.type != "cpu":
        return f"prepacked linears run on the cpu, and the tensors are on {x.device.type}"
    if torch.compiler.is_compiling():
        return "the model is being traced, and a prepacked weight is no part of a graph"
    parameters = _parameters(linears)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        return "gradients are needed, and a prepacked weight has none (use torch.no_grad() or torch.inference_mode())"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, which casts the weights at every use"
    for parameter in parameters:
        if parameter.dtype != x.dtype:
            return f"the input is {x.dtype} and a weight or bias {parameter.dtype}"
        if not parameter.is_contiguous():
            return "a weight isn't contiguous"
        if parameter.data_ptr() % parameter.itemsize:
            return "a weight lies at an address that is no multiple of its elements' size"
        if parameter.is_inference():
            return "a weight was made in inference mode, where torch doesn't tell whether it has changed"
    if x.numel() == 0:
        return "there is nothing to multiply"
    return missing(x.dtype)


def missing(dtype: torch.dtype) -> str | None:
    """Why no weight of ``dtype`` can be prepacked, in one sentence; None when it can.

    The extension is needed even where oneDNN multiplies: it tells whether a weight has changed.
    """
    return extension.missing() or onednn.missing(dtype)


def kernels(linears: Sequence[nn.Linear]) -> ModuleType:
    """The module whose functions multiply by the prepacked weights of ``linears``, side by side."""
    features, depth = sum(linear.weight.shape[0] for linear in linears), linears[0].weight.shape[1]
    if host_linear.missing(linears[0].weight.dtype) is None and host_linear.fits(features, depth):
        return host_linear
    return onednn


def pack(owner: nn.Module, linears: Sequence[nn.Linear]) -> PackedLinear:
    """The prepacked weight of one linear layer, or of several side by side (their outputs are concatenated).

    The copy belongs to ``owner`` and is rebuilt if a weight or bias has another address, dtype, shape or version
    counter than before, or if what is read of its elements at this use differs.
    """
    parameters = _parameters(linears)
    stamp = tuple([(p.data_ptr(), p._version, p.dtype, p.shape) for p in parameters])
    entry = _entries.get(owner)
    if entry is not None and entry.stamp == stamp and entry.checksums.unchanged():
        return entry.packed
    with torch.no_grad(), _lock:
        # Before the weight is read: a change in between must be seen next time.
        checksums = _Checksums.of(parameters)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        chosen = kernels(linears)
        packed = PackedLinear(chosen.pack(weight), bias, chosen)
        _entries[owner] = _Entry(stamp, checksums, packed)
    return packed


class PackedModules:
    """Modules whose prepacked weights are looked at in one call."""

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        found = [(owner, _entries.get(owner)) for owner in owners]
        self._entries = [(owner, entry) for owner, entry in found if entry is not None]
        self._checksums: _Checksums | None = None
        # Another thread may have forgotten one.
        if len(self._entries) == len(owners):
            self._checksums = _Checksums.joined([entry.checksums for _, entry in self._entries])

    def unchanged(self) -> bool:
        """Whether all are still held, of weights that are what they were; those that aren't are forgotten.

        Where a weight lies and what torch counts of its changes is for the caller to look at.
        """
        if self._checksums is None or any(_entries.get(owner) is not entry for owner, entry in self._entries):
            return False
        if self._checksums.unchanged():
            return True
        for owner, entry in self._entries:
            # At the same turn: what it saw may not be seen again for many others.
            if not entry.checksums.unchanged(self._checksums._turn):
                drop(owner)
        return False


def drop(owner: nn.Module) -> None:
    """Forget the prepacked weight of ``owner``, if there is one.

    Not while tracing: the graph would depend on what is held here, and be compiled again whenever that changes.
    """
    if not torch.compiler.is_compiling():
        _entries.pop(owner, None)


def refresh(root: nn.Module) -> None:
    """Forget the prepacked weights of all modules below ``root``."""
    for module in root.modules():
        drop(module)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """xWᵀ + b: ``[..., K]`` -> ``[..., N]``."""
    y: Tensor = packed.kernels.linear(x, packed.weight, packed.bias)
    return y


def linear_gelu(x: Tensor, packed: PackedLinear, approximate: str) -> Tensor:
    """gelu(xWᵀ + b), the activation applied inside the product; ``approximate`` is "none" (erf) or "tanh"."""
    y: Tensor = packed.kernels.linear_gelu(x, packed.weight, packed.bias, approximate)
    return y


def linear_add(x: Tensor, packed: PackedLinear, other: Tensor) -> Tensor:
    """xWᵀ + b + other, the addition inside the product; ``x`` is ``[..., K]``, ``other`` ``[..., N]``, contiguous."""
    y: Tensor = packed.kernels.linear_add(x, packed.weight, packed.bias, other)
    return y


def _parameters(linears: Sequence[nn.Linear]) -> list[Tensor]:
    return [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
