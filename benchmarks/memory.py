"""The memory that a call takes: its peak, and what autograd keeps of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastbert.cli import machine


def memory(call: Callable[[], object], device: torch.device) -> dict[str, int | None]:
    """Bytes: the peak above what was held before the call, and what the call keeps for a backward pass."""
    kept = _Kept()
    with kept.counting(), _peak(device) as peak:
        call()
    return {"peak": peak.bytes, "kept": kept.bytes}


class _Kept:
    """Counts the storages that autograd saves, each once; leaves and their views, which live on anyway, don't count."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            base = tensor if tensor._base is None else tensor._base
            if not (base.is_leaf and base.requires_grad):
                storage = tensor.untyped_storage()
                self._seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


class _Peak:
    bytes: int | None = None


@contextmanager
def _peak(device: torch.device) -> Iterator[_Peak]:
    """The most that was allocated on a GPU, or resident in memory, above what was before."""
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    machine.release_memory()
    # Linux lets a process set back its own high-water mark (proc(5), /proc/pid/clear_refs).
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield peak
        return
    before = _status("VmRSS")
    yield peak
    peak.bytes = max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)[1])
