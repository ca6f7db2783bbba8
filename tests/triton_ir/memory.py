"""The memory of a launch: every access is within its tensor, and no program's write meets another's access."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NOBODY, SEVERAL = -1, -2


class OutOfBoundsError(AssertionError):
    """A program reads or writes outside of a tensor."""


class RaceError(AssertionError):
    """What a launch computes depends on the order of its programs."""


class Memory:
    """The elements of one tensor, by their distance from its first, and which programs read and wrote them.

    ``name`` is that of the kernel's parameter. Only what lies in the tensor itself may be accessed, not what lies
    between its rows.
    """

    def __init__(self, name: str, tensor: Tensor, written: bool) -> None:
        self.name = name
        self.tensor = tensor
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.first = tensor.storage_offset()
        self.elements = storage
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.last = last if tensor.numel() else -1
        self.own: Tensor | None = None
        if tensor.numel() <= last:
            self.own = torch.zeros(len(storage), dtype=torch.bool)
            self.own.as_strided(tensor.shape, tensor.stride(), self.first).fill_(True)
        self.written = written
        if written:
            self.writer, self.reader = (torch.full([len(storage)], NOBODY, dtype=torch.int32) for _ in range(2))

    def view(self, dtype: torch.dtype) -> Memory:
        """The same memory as elements of another dtype of the same size."""
        found = object.__new__(Memory)
        found.__dict__.update(self.__dict__)
        found.elements = self.elements.view(dtype)
        return found

    def places(self, offsets: Tensor, what: str) -> Tensor:
        """Where elements at ``offsets`` are in the storage."""
        if offsets.numel():
            least, most = (int(bound) for bound in torch.aminmax(offsets))
            if least < 0 or most > self.last:
                wrong = least if least < 0 else most
                raise OutOfBoundsError(f"{what} of {self.name} at element {wrong}, and its last is {self.last}")
        places = offsets + self.first
        if self.own is not None and not self.own[places].all():
            raise OutOfBoundsError(f"{what} between the rows of {self.name}, {tuple(self.tensor.shape)}")
        return places

    def read(self, places: Tensor, programs: Tensor) -> Tensor:
        """The elements; ``programs`` has the shape of ``places``."""
        if self.written:
            writer = self.writer[places]
            self._same((writer == NOBODY) | (writer == programs), "reads what another writes")
            reader = self.reader[places]
            self.reader[places] = torch.where((reader == NOBODY) | (reader == programs), programs, SEVERAL)
            several = self.reader[places] != programs  # of two programs in this read, one was noted
            self.reader[places[several]] = SEVERAL
        return self.elements[places]

    def write(self, places: Tensor, values: Tensor, programs: Tensor) -> None:
        """Set the elements; ``values`` and ``programs`` have the shape of ``places``."""
        assert self.written
        for others, what in ((self.writer, "writes where another writes"), (self.reader, "writes what another reads")):
            before = others[places]
            self._same((before == NOBODY) | (before == programs), what)
        self.writer[places] = programs
        self._same(self.writer[places] == programs, "writes where another writes")
        self.elements[places] = values
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.elements.itemsize]
        if not torch.equal(self.elements[places].view(bits), values.to(self.elements.dtype).view(bits)):
            raise RaceError(f"a program writes two values to one place of {self.name}")

    def _same(self, fine: Tensor, what: str) -> None:
        if not fine.all():
            raise RaceError(f"a program {what}, in {self.name}")


@dataclasses.dataclass
class Pointer:
    """Pointers into one memory: ``offsets`` counts elements from its first one."""

    memory: Memory
    offsets: Tensor


@dataclasses.dataclass
class Descriptor:
    """A tensor that is read and written by blocks; beyond its shape a block is zeros, and isn't written."""

    memory: Memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]
