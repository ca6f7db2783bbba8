"""Runs a kernel in Triton's intermediate representation on the CPU.

A value has a first dimension more than its type: a place for each program, or one for all where they agree. Where
programs go different ways, each way is run by those that take it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ptx
from .memory import Descriptor, Memory, Pointer
from .parse import Block, Function, Operation, Type

DTYPES = {
    "i1": torch.bool,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}
# Elements of the largest tensor of a kernel that are computed at once, over programs: few enough for the cache.
AT_ONCE = 1 << 18
# What memory holds that nobody has set.
_POISON = {torch.bool: True, torch.int8: 0x55, torch.int16: 0x5555, torch.int32: 0x55555555, torch.int64: 0x5555 << 40}


def poison(dtype: torch.dtype) -> Any:
    """A value that is noticed in a result."""
    return math.nan if dtype.is_floating_point else _POISON[dtype]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of a value, or of the offsets of a pointer."""
    if isinstance(value, Pointer):
        return Pointer(value.memory, function(value.offsets))
    return value if isinstance(value, Descriptor) else function(value)


def _taken(value: Any, index: Tensor) -> Any:
    """The places of some programs."""
    return _mapped(value, lambda x: x if x.shape[0] == 1 else x[index])


def _joined(parts: Sequence[tuple[Tensor, Any]], programs: int) -> Any:
    """One value of parts, each with the places that it has."""
    first = parts[0][1]
    if isinstance(first, Pointer):
        assert all(part.memory is first.memory for _, part in parts), "a pointer into one of several tensors"
        return Pointer(first.memory, _joined([(index, part.offsets) for index, part in parts], programs))
    found = first.new_empty((programs, *first.shape[1:]))
    for index, part in parts:
        found[index] = part
    return found


class Frame:
    """The values of a block for the programs that run it: its own, and those around it.

    ``index`` holds the places of its programs among those of ``outer``; None if they are the same.
    """

    def __init__(self, launch: Launch, programs: Tensor, outer: Frame | None = None, index: Tensor | None = None):
        self.launch = launch
        self.programs = programs
        self.outer = outer
        self.index = index
        self.values: dict[str, Any] = {}

    def inner(self, index: Tensor | None = None) -> Frame:
        """A frame for all programs or for those at ``index``."""
        return Frame(self.launch, self.programs if index is None else self.programs[index], self, index)

    def __getitem__(self, name: str) -> Any:
        found = self.values.get(name)
        if found is None:
            assert self.outer is not None, f"{name} has no value"
            found = self.outer[name]
            if self.index is not None:
                found = self.values[name] = _taken(found, self.index)
        return found

    def run(self, block: Block, arguments: Iterable[Any] = ()) -> list[Any]:
        """Run a block in this frame. Returns the operands of the operation that ends it, if one does."""
        self.values.update(zip(block.arguments, arguments, strict=True))
        asynchronous = self.launch.asynchronous
        for operation in block.operations:
            operands = [self[name] for name in operation.operands]
            if operation.name in _ENDS:
                return operands
            if asynchronous is not None and operation.name not in _PASSING:
                operands = [asynchronous.needed(operand) for operand in operands]
            computed = _COMPUTED.get(operation.name)
            if computed is not None:
                self.values[operation.results[0]] = computed(*operands)
                continue
            handler = _HANDLERS.get(operation.name)
            if handler is None:
                raise NotImplementedError(f"{operation.name} in {self.launch.function.name}")
            results = handler(self, operation, *operands)
            if operation.results:
                results = results if isinstance(results, list) else [results]
                self.values.update(zip(operation.results, results, strict=True))
        return []


class Launch:
    """A kernel, its arguments by the function's parameters, and the grid; ``run`` executes it.

    Args:
        function: What ``parse`` returns.
        arguments: The function's parameters, each with a name: tensors for pointers, ``(tensor, shape, strides)`` for
            descriptors, and numbers.
        grid: The number of programs along each axis.
    """

    def __init__(self, function: Function, arguments: Sequence[tuple[str, Any]], grid: Sequence[int]) -> None:
        self.function = function
        self.grid = (*grid, 1, 1)[:3]
        self.cycles = 0
        self.asynchronous: Any = None
        self.buffers: list[Any] = []
        self.arguments: dict[str, Any] = {}
        for (parameter, kind), (name, value) in zip(function.parameters.items(), arguments, strict=True):
            self.arguments[parameter] = _argument(name, kind, value, parameter in function.written)

    def run(self, beside: Callable[[], Any] | None = None) -> None:
        """Run all programs.

        Args:
            beside: Makes an ``Asynchronous`` of ``shared_memory.py`` for each program, which then runs alone; needed
                where the kernel has operations of a GPU.

        Raises:
            OutOfBoundsError: A program reads or writes outside of a tensor.
            RaceError: Programs don't agree on what they read and write.
            NotImplementedError: The kernel has an operation that isn't known here.
        """
        programs = math.prod(self.grid)
        at_once = 1 if beside else max(1, AT_ONCE // self.function.largest)
        for start in range(0, programs, at_once):
            if beside:
                self.asynchronous = beside()
                self.buffers = []
            frame = Frame(self, torch.arange(start, min(start + at_once, programs), dtype=torch.int32))
            frame.values.update(self.arguments)
            frame.run(self.function.body)
            if beside:
                self.asynchronous.finish()


def _argument(name: str, kind: Type, value: Any, written: bool) -> Any:
    if kind.element.startswith("!tt.ptr"):
        memory = Memory(name, value, written)
        dtype = DTYPES[kind.pointee]
        memory = memory if value.dtype == dtype else memory.view(dtype)
        return Pointer(memory, torch.zeros(1, dtype=torch.int64))
    if isinstance(value, tuple):
        tensor, shape, strides = value
        return Descriptor(Memory(name, tensor, written), tuple(shape), tuple(strides))
    return torch.tensor([value], dtype=DTYPES[kind.element])


def _unsigned(x: Tensor) -> Tensor:
    """The bits of integers below 64 bits, as int64 that isn't negative."""
    if x.dtype == torch.bool:
        return x.long()
    return x.long() & ((1 << 8 * x.itemsize) - 1)


def _shrui(x: Tensor, count: Tensor) -> Tensor:
    if x.dtype == torch.int64:
        ones = torch.where(count == 0, -1, (1 << (64 - count).clamp(max=63)) - 1)
        return (x >> count) & ones
    return (_unsigned(x) >> count.long()).to(x.dtype)


def _flipped(x: Tensor) -> Tensor:
    """Integers in the order of their bits as unsigned ones."""
    return x ^ torch.iinfo(x.dtype).min


_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
    "ult": lambda a, b: _flipped(a) < _flipped(b),
    "ule": lambda a, b: _flipped(a) <= _flipped(b),
    "ugt": lambda a, b: _flipped(a) > _flipped(b),
    "uge": lambda a, b: _flipped(a) >= _flipped(b),
    "oeq": operator.eq,
    "olt": operator.lt,
    "ole": operator.le,
    "ogt": operator.gt,
    "oge": operator.ge,
    "une": operator.ne,
    "uno": lambda a, b: a.isnan() | b.isnan(),
    "ord": lambda a, b: ~(a.isnan() | b.isnan()),
}

# What needs nothing but its operands.
_COMPUTED: dict[str, Callable[..., Any]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrsi": operator.rshift,
    "arith.shrui": _shrui,
    "arith.maxsi": torch.maximum,
    "arith.minsi": torch.minimum,
    "arith.divsi": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "arith.ceildivsi": lambda a, b: -torch.div(-a, b, rounding_mode="floor"),
    "arith.remsi": torch.fmod,
    "arith.addf": operator.add,
    "arith.subf": operator.sub,
    "arith.mulf": operator.mul,
    "arith.divf": operator.truediv,
    "arith.negf": operator.neg,
    "arith.maxnumf": torch.fmax,
    "arith.minnumf": torch.fmin,
    "arith.maximumf": torch.maximum,
    "arith.minimumf": torch.minimum,
    "math.absf": torch.abs,
    "math.exp": torch.exp,
    "math.exp2": torch.exp2,
    "math.log2": torch.log2,
    "math.sqrt": torch.sqrt,
    "math.rsqrt": torch.rsqrt,
    "math.erf": torch.erf,
    "math.fma": lambda a, b, c: a * b + c,
    "tt.precise_sqrt": torch.sqrt,
    "tt.precise_divf": operator.truediv,
    "tt.approx_divf": operator.truediv,
    "tt.join": lambda a, b: torch.stack(torch.broadcast_tensors(a, b), -1),
}
_ENDS = {"scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return", "tt.return"}
# These take the sums of products that haven't been computed yet.
_PASSING = {"scf.for", "scf.while", "scf.if", "ttng.warp_group_dot", "ttng.warp_group_dot_wait"}
_HANDLERS: dict[str, Callable[..., Any]] = {}


def handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what runs operations of these names: it takes the frame, the operation and the operands."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@handles("arith.constant")
def _constant(frame: Frame, operation: Operation) -> Tensor:
    kind = operation.types[-1] if operation.types else Type((), "i1")
    dtype = DTYPES[kind.element]
    text = operation.words.removeprefix("dense<").removesuffix(">")
    if text in ("true", "false"):
        value: Any = text == "true"
    elif dtype.is_floating_point and text.startswith("0x"):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        number = int(text, 16)
        number -= (1 << 8 * dtype.itemsize) if number >> (8 * dtype.itemsize - 1) else 0
        value = torch.tensor(number, dtype=bits).view(dtype).item()
    else:
        value = float(text) if dtype.is_floating_point else int(text)
    return torch.full([1, *(1 for _ in kind.shape)], value, dtype=dtype).expand(1, *kind.shape)


@handles("tt.get_program_id", "tt.get_num_programs")
def _program(frame: Frame, operation: Operation) -> Tensor:
    axis = "xyz".index(operation.words)
    if operation.name == "tt.get_num_programs":
        return torch.tensor([frame.launch.grid[axis]], dtype=torch.int32)
    return frame.programs // math.prod(frame.launch.grid[:axis]) % frame.launch.grid[axis]


@handles("tt.make_range")
def _range(frame: Frame, operation: Operation) -> Tensor:
    return torch.arange(operation.number("start"), operation.number("end"), dtype=torch.int32)[None]


@handles("tt.splat", "tt.broadcast")
def _expanded(frame: Frame, operation: Operation, value: Any) -> Any:
    shape = operation.types[-1].shape
    if operation.name == "tt.splat":
        return _mapped(value, lambda x: x.reshape(-1, *(1 for _ in shape)).expand(-1, *shape))
    return _mapped(value, lambda x: x.expand(-1, *shape))


@handles("tt.expand_dims")
def _expand_dims(frame: Frame, operation: Operation, value: Any) -> Any:
    axis = operation.number("axis")
    return _mapped(value, lambda x: x.unsqueeze(axis + 1))


@handles("tt.reshape")
def _reshape(frame: Frame, operation: Operation, value: Any) -> Any:
    return _mapped(value, lambda x: x.reshape(-1, *operation.types[-1].shape))


@handles("tt.trans")
def _trans(frame: Frame, operation: Operation, value: Any) -> Any:
    order = operation.numbers("order")
    return _mapped(value, lambda x: x.permute(0, *(axis + 1 for axis in order)))


@handles("tt.split")
def _split(frame: Frame, operation: Operation, value: Tensor) -> list[Tensor]:
    return list(value.unbind(-1))


@handles("arith.extsi", "arith.truncf", "arith.extf", "arith.sitofp", "arith.fptosi", "tt.fp_to_fp")
def _converted(frame: Frame, operation: Operation, value: Tensor) -> Tensor:
    dtype = DTYPES[operation.types[-1].element]
    return -value.to(dtype) if operation.name == "arith.extsi" and value.dtype == torch.bool else value.to(dtype)


@handles("arith.trunci")
def _truncated(frame: Frame, operation: Operation, value: Tensor) -> Tensor:
    dtype = DTYPES[operation.types[-1].element]
    return (value & 1).bool() if dtype == torch.bool else value.to(dtype)


@handles("arith.extui")
def _extended(frame: Frame, operation: Operation, value: Tensor) -> Tensor:
    return _unsigned(value).to(DTYPES[operation.types[-1].element])


@handles("arith.bitcast", "tt.bitcast")
def _bitcast(frame: Frame, operation: Operation, value: Any) -> Any:
    kind = operation.types[-1]
    if isinstance(value, Pointer):
        return Pointer(value.memory.view(DTYPES[kind.pointee]), value.offsets)
    return value.contiguous().view(DTYPES[kind.element])


@handles("arith.cmpi", "arith.cmpf")
def _compared(frame: Frame, operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    return _COMPARISONS[operation.words.partition(",")[0]](a, b)


@handles("arith.select")
def _selected(frame: Frame, operation: Operation, condition: Tensor, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        assert a.memory is b.memory, "a pointer into one of two tensors"
        return Pointer(a.memory, _selected(frame, operation, condition, a.offsets, b.offsets))
    missing = a.dim() - condition.dim()
    return torch.where(condition.reshape(*condition.shape, *(1 for _ in range(missing))), a, b)


@handles("tt.addptr")
def _addptr(frame: Frame, operation: Operation, pointer: Pointer, offset: Tensor) -> Pointer:
    return Pointer(pointer.memory, pointer.offsets + offset)


def _access(frame: Frame, pointer: Pointer, mask: Tensor | None, what: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """(the mask, expanded, the places of what is accessed, the programs that do): the latter where the mask holds."""
    offsets = pointer.offsets
    programs = frame.programs.reshape(-1, *(1 for _ in offsets.shape[1:]))
    memory = pointer.memory
    if mask is not None:
        offsets, mask = torch.broadcast_tensors(offsets, mask)
    if memory.written:
        shape = torch.broadcast_shapes(offsets.shape, programs.shape)
        offsets, programs = offsets.expand(shape), programs.expand(shape)
        mask = None if mask is None else mask.expand(shape)
    else:
        programs = programs[:1].expand(offsets.shape)
    if mask is None:
        return None, memory.places(offsets, what), programs
    return mask, memory.places(offsets[mask], what), programs[mask]


@handles("tt.load")
def load(frame: Frame, operation: Operation, pointer: Pointer, mask: Any = None, other: Any = None) -> Tensor:
    """What is at the pointers; where the mask doesn't hold ``other``, or what would be noticed."""
    mask, places, programs = _access(frame, pointer, mask, "a read")
    values = pointer.memory.read(places, programs)
    if mask is None:
        return values
    found = torch.full(mask.shape, poison(values.dtype), dtype=values.dtype) if other is None else other
    found = found.expand(mask.shape).clone()
    found[mask] = values
    return found


@handles("tt.store")
def store(frame: Frame, operation: Operation, pointer: Pointer, values: Tensor, mask: Any = None) -> None:
    """Write at the pointers where the mask holds."""
    mask, places, programs = _access(frame, pointer, mask, "a write")
    values = values.expand(places.shape) if mask is None else values.expand(mask.shape)[mask]
    pointer.memory.write(places, values, programs)


def block_of(descriptor: Descriptor, shape: Sequence[int], starts: Sequence[Tensor]) -> tuple[Pointer, Tensor]:
    """(pointers to a block of a descriptor's tensor, which of them are inside)."""
    offsets, inside = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    for axis, (start, size) in enumerate(zip(starts, shape, strict=True)):
        place = start.reshape(-1, 1).long() + torch.arange(size)
        place = place.reshape(-1, *(size if other == axis else 1 for other in range(len(shape))))
        offsets = offsets + place * descriptor.strides[axis]
        inside = inside & (place >= 0) & (place < descriptor.shape[axis])
    return Pointer(descriptor.memory, offsets), inside


@handles("tt.descriptor_load")
def _descriptor_load(frame: Frame, operation: Operation, descriptor: Descriptor, *starts: Tensor) -> Tensor:
    pointer, inside = block_of(descriptor, operation.types[-1].shape, starts)
    return load(frame, operation, pointer, inside, torch.zeros(1, dtype=descriptor.memory.elements.dtype))


@handles("tt.descriptor_store")
def _descriptor_store(frame: Frame, operation: Operation, descriptor: Descriptor, *rest: Tensor) -> None:
    *starts, values = rest
    pointer, inside = block_of(descriptor, operation.types[-1].shape, starts)
    store(frame, operation, pointer, values, inside)


def _tf32(x: Tensor) -> Tensor:
    """``x`` rounded to TF32, ties away from zero."""
    return ((x.view(torch.int32) + 4096) & -8192).view(torch.float32)


@handles("tt.dot")
def _dot(frame: Frame, operation: Operation, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    precision = re.search(r"inputPrecision = (\w+)", operation.words)
    return product(a, b, c, precision[1] if precision else "ieee")


def product(a: Tensor, b: Tensor, c: Tensor, precision: str) -> Tensor:
    """``c + a @ b`` in float32; operands of float32 in as many parts of TF32 as ``precision`` says."""
    if a.dtype != torch.float32 or precision == "ieee":
        return torch.matmul(a.float(), b.float()) + c
    a, b = a.contiguous(), b.contiguous()
    high_a, high_b = _tf32(a), _tf32(b)
    if precision == "tf32x3":
        c = torch.matmul(_tf32(a - high_a), high_b) + c
        c = torch.matmul(high_a, _tf32(b - high_b)) + c
    return torch.matmul(high_a, high_b) + c


_REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "arith.addf": lambda x, axis: x.sum(axis),
    "arith.addi": lambda x, axis: x.sum(axis, dtype=x.dtype),
    "arith.maxnumf": lambda x, axis: torch.where(x.isnan(), -math.inf, x).amax(axis),
    "arith.maxsi": lambda x, axis: x.amax(axis),
    "arith.minsi": lambda x, axis: x.amin(axis),
}


@handles("tt.reduce")
def _reduce(frame: Frame, operation: Operation, value: Tensor) -> Tensor:
    combine = operation.blocks[0].operations
    names = [one.name for one in combine]
    if len(names) != 2 or names[0] not in _REDUCTIONS:
        raise NotImplementedError(f"a reduction by {names}")
    return _REDUCTIONS[names[0]](value, operation.number("axis") + 1)


@handles("tt.scan")
def _scan(frame: Frame, operation: Operation, value: Tensor) -> Tensor:
    names = [one.name for one in operation.blocks[0].operations]
    if names != ["arith.addi", "tt.scan.return"] or "reverse = false" not in operation.attributes:
        raise NotImplementedError(f"a scan by {names}, {operation.attributes}")
    return value.cumsum(operation.number("axis") + 1, dtype=value.dtype)


@handles("tt.elementwise_inline_asm")
def _inline_asm(frame: Frame, operation: Operation, *operands: Tensor) -> Any:
    frame.launch.cycles += 1000
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands)) if operands else (1,)
    return ptx.run(
        operation.text,
        re.search(r'constraints = "([^"]*)"', operation.attributes)[1],
        operation.number("packed_element"),
        [operand.expand(shape) for operand in operands],
        [DTYPES[kind.element] for kind in operation.types],
        frame.launch.cycles,
        shape,
    )


@handles("llvm.intr.assume")
def _assume(frame: Frame, operation: Operation, condition: Tensor) -> None:
    assert condition.all(), f"an assumption of {frame.launch.function.name} doesn't hold"


@handles("scf.if")
def _if(frame: Frame, operation: Operation, condition: Tensor) -> list[Any]:
    if condition.all():
        return frame.inner().run(operation.blocks[0])
    if not condition.any():
        return frame.inner().run(operation.blocks[1]) if len(operation.blocks) > 1 else []
    parts = []
    for block, taken in zip(operation.blocks, (condition, ~condition), strict=False):
        (index,) = taken.nonzero(as_tuple=True)
        parts.append((index, frame.inner(index).run(block)))
    programs = len(frame.programs)
    return [
        _joined([(index, values[place]) for index, values in parts], programs)
        for place in range(len(operation.results))
    ]


class _Loop:
    """Programs leave a loop one after the other; what it carries is kept for those that have left."""

    def __init__(self, frame: Frame, carried: list[Any]) -> None:
        self.frame = self.outer = frame
        self.carried = carried
        self.left: list[tuple[Tensor, list[Any]]] = []

    def keep(self, staying: Tensor) -> bool:
        """Go on with the programs that stay. Returns whether any do."""
        if staying.all():
            return True
        index = self.frame.index if self.frame is not self.outer else torch.arange(len(self.outer.programs))
        if not staying.any():
            self.left.append((index, self.carried))
            return False
        (leaving,), (staying,) = (~staying).nonzero(as_tuple=True), staying.nonzero(as_tuple=True)
        self.left.append((index[leaving], [_taken(value, leaving) for value in self.carried]))
        self.carried = [_taken(value, staying) for value in self.carried]
        self.frame = self.outer.inner(index[staying])
        return True

    def results(self) -> list[Any]:
        """What it carries, for all programs, in their order."""
        if len(self.left) == 1:
            return self.left[0][1]
        programs = len(self.outer.programs)
        return [
            _joined([(index, values[place]) for index, values in self.left], programs)
            for place in range(len(self.carried))
        ]


@handles("scf.for")
def _for(frame: Frame, operation: Operation, *carried: Any) -> list[Any]:
    loop = _Loop(frame, list(carried))
    while True:
        variable, high, step, *values = loop.carried
        assert (step > 0).all(), "a loop whose step isn't positive"
        if not loop.keep(variable < high):
            return loop.results()[3:]
        variable, high, step, *values = loop.carried
        values = loop.frame.inner().run(operation.blocks[0], [variable, *values])
        loop.carried = [variable + step, high, step, *values]


@handles("scf.while")
def _while(frame: Frame, operation: Operation, *carried: Any) -> list[Any]:
    before, after = operation.blocks
    loop = _Loop(frame, list(carried))
    while True:
        condition, *values = loop.frame.inner().run(before, loop.carried)
        loop.carried = values
        if not loop.keep(condition):
            return loop.results()
        loop.carried = loop.frame.inner().run(after, loop.carried)
