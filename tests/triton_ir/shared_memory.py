"""Shared memory, and what runs beside a program: copies and products that it starts and waits for.

Hardware finishes these at any time between their start and the wait for them. Here a launch finishes all copies as
early as possible and all products as late, or the other way round. Whoever reads what hasn't arrived, or overwrites
what is still to be read, has wrong numbers with one of the two. Operations are those of Triton's dialects for GPUs, run
for one program at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .execute import DTYPES, Frame, block_of, handles, load, poison, product, store
from .memory import Descriptor, Pointer
from .parse import Operation

Action = Callable[[], None]
# What stands for the order of operations; they run in theirs anyway.
_TOKEN = torch.zeros(1)


class DeadlockError(AssertionError):
    """A program waits for what will never come."""


@dataclasses.dataclass
class Buffer:
    """A part of shared memory, ``[1, *shape]``; ``fenced`` is shared by the parts of one allocation."""

    tensor: Tensor
    fenced: dict[str, bool]


@dataclasses.dataclass
class Product:
    """The sums of a product that may not have been computed yet."""

    tensor: Tensor
    action: Action | None


@dataclasses.dataclass
class Barrier:
    """It turns to its other phase when the bytes that it expects have come."""

    phase: int = 0
    expected: int = 0
    bytes: int = 0
    copies: list[Action] = dataclasses.field(default_factory=list)


class Asynchronous:
    """What one program has started and not waited for."""

    def __init__(self, late_copies: bool) -> None:
        self.late_copies = late_copies
        self.open: list[Action] = []
        self.groups: list[list[Action]] = []
        self.products: list[Product] = []
        self.stores: list[Action] = []
        self.barriers: dict[int, Barrier] = {}

    def copy(self, action: Action, queue: list[Action]) -> None:
        """Start a copy."""
        if self.late_copies:
            queue.append(action)
        else:
            action()
            queue.append(lambda: None)

    def multiply(self, product: Product) -> None:
        """Start a product."""
        self.products.append(product)
        if self.late_copies:
            self.finish_products(0)

    def finish_products(self, pending: int) -> None:
        """Wait until no more than ``pending`` products are left."""
        while len(self.products) > pending:
            first = self.products.pop(0)
            assert first.action is not None
            first.action()
            first.action = None

    def finish_stores(self, pending: int) -> None:
        """Wait until no more than ``pending`` stores are left."""
        while len(self.stores) > pending:
            self.stores.pop(0)()

    def finish(self) -> None:
        """Wait for all that a program's end waits for."""
        self.finish_products(0)
        self.finish_stores(0)

    def needed(self, operand: Any) -> Any:
        """An operand; the compiler that follows waits for sums which an operation takes too early."""
        if isinstance(operand, Product):
            if operand.action is not None:
                self.finish_products(len(self.products) - 1 - self.products.index(operand))
            return operand.tensor
        return operand


@handles("ttg.convert_layout", "ttg.local_dealloc", "ttng.init_barrier", "ttng.inval_barrier")
def _same(frame: Frame, operation: Operation, value: Any, *others: Any) -> Any:
    return value


@handles("ttng.fence_async_shared")
def _fence(frame: Frame, operation: Operation) -> None:
    for buffer in frame.launch.buffers:
        buffer.fenced["fenced"] = True


@handles("ttg.local_alloc")
def _alloc(frame: Frame, operation: Operation, value: Tensor | None = None) -> Buffer:
    kind = operation.types[-1]
    dtype = DTYPES[kind.element]
    if value is None:
        tensor = torch.full((1, *kind.shape), poison(dtype), dtype=dtype)
    else:
        tensor = value.expand(1, *kind.shape).clone(memory_format=torch.contiguous_format)
    buffer = Buffer(tensor, {"fenced": value is None})
    frame.launch.buffers.append(buffer)
    return buffer


@handles("ttg.memdesc_index")
def _index(frame: Frame, operation: Operation, buffer: Buffer, index: Tensor) -> Buffer:
    (place,) = index.tolist()
    assert 0 <= place < buffer.tensor.shape[1], f"part {place} of {buffer.tensor.shape[1]}"
    return Buffer(buffer.tensor[:, place], buffer.fenced)


@handles("ttg.memdesc_trans")
def _transposed(frame: Frame, operation: Operation, buffer: Buffer) -> Buffer:
    order = operation.numbers("order")
    return Buffer(buffer.tensor.permute(0, *(axis + 1 for axis in order)), buffer.fenced)


@handles("ttg.local_load")
def _local_load(frame: Frame, operation: Operation, buffer: Buffer, token: Any = None) -> Tensor:
    return buffer.tensor.clone()


@handles("ttg.local_store")
def _local_store(frame: Frame, operation: Operation, value: Tensor, buffer: Buffer) -> None:
    buffer.tensor.copy_(value)
    buffer.fenced["fenced"] = False


@handles("ttg.async_copy_global_to_local")
def _async_copy(frame: Frame, operation: Operation, pointer: Pointer, buffer: Buffer, *rest: Tensor) -> Tensor:
    """``%pointers, %buffer mask %mask other %other``; where the mask doesn't hold, zeros without an ``other``."""
    mask = rest[0] if " mask " in operation.words else None
    other = rest[-1] if " other " in operation.words else torch.zeros(1, dtype=buffer.tensor.dtype)
    state = frame.launch.asynchronous
    state.copy(lambda: buffer.tensor.copy_(load(frame, operation, pointer, mask, other)), state.open)
    return _TOKEN


@handles("ttg.async_commit_group")
def _commit(frame: Frame, operation: Operation, *tokens: Any) -> Tensor:
    state = frame.launch.asynchronous
    state.groups.append(state.open)
    state.open = []
    return _TOKEN


@handles("ttg.async_wait")
def _wait(frame: Frame, operation: Operation, *tokens: Any) -> Tensor:
    state = frame.launch.asynchronous
    while len(state.groups) > operation.number("num"):
        for action in state.groups.pop(0):
            action()
    return _TOKEN


def _contents(operand: Any) -> Tensor:
    return operand.tensor if isinstance(operand, Buffer) else operand


@handles("ttng.warp_group_dot")
def _warp_group_dot(frame: Frame, operation: Operation, a: Any, b: Buffer, c: Any, *rest: Any) -> Any:
    assert not rest, "a predicate"
    state = frame.launch.asynchronous
    for operand in (a, b):
        if isinstance(operand, Buffer):
            assert operand.fenced["fenced"], "a product of what was written without a fence"
    precision = ("tf32", "tf32x3", "ieee")[operation.number("inputPrecision")]
    found = Product(torch.empty(1, *operation.types[-1].shape), None)
    found.action = lambda: found.tensor.copy_(
        product(_contents(a), _contents(b), c.tensor if isinstance(c, Product) else c, precision)
    )
    if "isAsync = true" in operation.attributes:
        state.multiply(found)
        return found
    state.products.append(found)
    state.finish_products(0)
    return found.tensor


@handles("ttng.warp_group_dot_wait")
def _warp_group_dot_wait(frame: Frame, operation: Operation, *operands: Any) -> list[Any]:
    frame.launch.asynchronous.finish_products(operation.number("pendings"))
    return list(operands)


def _barrier(frame: Frame, buffer: Buffer) -> Barrier:
    return frame.launch.asynchronous.barriers.setdefault(buffer.tensor.data_ptr(), Barrier())


@handles("ttng.barrier_expect")
def _expect(frame: Frame, operation: Operation, buffer: Buffer, holds: Tensor) -> None:
    if holds.item():
        _barrier(frame, buffer).expected += int(operation.words.split(",")[1])


@handles("ttng.async_tma_copy_global_to_local")
def _tma_load(frame: Frame, operation: Operation, descriptor: Descriptor, *rest: Any) -> None:
    """``%descriptor[%row, %column] %buffer, %barrier, %holds``."""
    *starts, target, buffer, holds = rest
    if not holds.item():
        return
    barrier = _barrier(frame, buffer)
    barrier.bytes += target.tensor.numel() * target.tensor.itemsize
    zero = torch.zeros(1, dtype=target.tensor.dtype)

    def action() -> None:
        pointer, inside = block_of(descriptor, target.tensor.shape[1:], starts)
        target.tensor.copy_(load(frame, operation, pointer, inside, zero))

    frame.launch.asynchronous.copy(action, barrier.copies)


@handles("ttng.wait_barrier")
def _wait_barrier(frame: Frame, operation: Operation, buffer: Buffer, phase: Tensor) -> None:
    barrier = _barrier(frame, buffer)
    if barrier.phase != phase.item():
        return
    if barrier.expected == 0 or barrier.bytes != barrier.expected:
        raise DeadlockError(f"{barrier.bytes} bytes come to a barrier that waits for {barrier.expected}")
    for action in barrier.copies:
        action()
    frame.launch.asynchronous.barriers[buffer.tensor.data_ptr()] = Barrier(phase=1 - barrier.phase)


@handles("ttng.async_tma_copy_local_to_global")
def _tma_store(frame: Frame, operation: Operation, descriptor: Descriptor, *rest: Any) -> None:
    *starts, source = rest
    assert source.fenced["fenced"], "a copy of what was written without a fence"
    pointer, inside = block_of(descriptor, source.tensor.shape[1:], starts)
    state = frame.launch.asynchronous
    state.copy(lambda: store(frame, operation, pointer, source.tensor.clone(), inside), state.stores)


@handles("ttng.async_tma_store_wait")
def _tma_store_wait(frame: Frame, operation: Operation) -> None:
    frame.launch.asynchronous.finish_stores(operation.number("pendings"))
