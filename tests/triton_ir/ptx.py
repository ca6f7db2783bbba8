"""Runs the assembly that kernels hold: a few instructions of PTX, each on all elements at once.

A register is a tensor of int64 with the bits of an unsigned number, a predicate one of bool. What instructions do is
from NVIDIA's "PTX ISA", chapter "Instruction Set".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALL = 0xFFFFFFFF


def _halves(x: Tensor) -> Tensor:
    """float16 ``[..., 2]``, the low half first."""
    parts = torch.stack([x & 0xFFFF, x >> 16 & 0xFFFF], -1)
    return parts.to(torch.int32).to(torch.int16).view(torch.float16)


def _not_less(a: Tensor, b: Tensor) -> Tensor:
    """Which halves of ``a`` aren't less than those of ``b``, or are no numbers: bool ``[..., 2]``."""
    return ~(_halves(a) < _halves(b))


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Four bytes of eight, by the lower digits of ``selector``; the sign's replication isn't known here."""
    pool = torch.stack([x >> 8 * byte & 0xFF for x in (a, b) for byte in range(4)], -1)
    found = torch.zeros_like(a)
    for byte in range(4):
        digit = selector >> 4 * byte & 0xF
        assert (digit < 8).all(), "prmt with a replicated sign"
        found = found | torch.gather(pool, -1, digit[..., None].expand(*a.shape, 1))[..., 0] << 8 * byte
    return found


def _set(a: Tensor, b: Tensor) -> Tensor:
    kept = _not_less(a, b).long() * 0xFFFF
    return kept[..., 0] | kept[..., 1] << 16


_INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "mov.u64": lambda a: a,
    # To the nearest, ties away from zero.
    "cvt.rna.tf32.f32": lambda a: (a + 0x1000) & 0xFFFFE000,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: (a + b) & _ALL,
    "shr.u32": lambda a, b: a >> b.clamp(max=32),
    "abs.f16x2": lambda a: a & 0x7FFF7FFF,
    "prmt.b32": _prmt,
    "set.geu.u32.f16x2": _set,
    "setp.ne.u32": lambda a, b: a != b,
    # Two predicates, one of each half, each combined with a third.
    "setp.geu.xor.f16x2": lambda a, b, c: (_not_less(a, b) ^ c[..., None]).unbind(-1),
    "selp.b32": lambda a, b, c: torch.where(c, a, b),
}


def _packed(operand: Tensor, pack: int) -> list[Tensor]:
    """The registers that hold ``pack`` elements each time."""
    elements = operand.reshape(-1, pack)
    if operand.itemsize == 4:
        return list((elements.view(torch.int32).long() & _ALL).unbind(-1))
    assert (operand.itemsize, pack) == (2, 2), f"{pack} elements of {operand.itemsize} bytes"
    low, high = (elements.view(torch.int16).long() & 0xFFFF).unbind(-1)
    return [low | high << 16]


def _unpacked(registers: list[Tensor], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    if dtype == torch.int64:
        return registers[0].reshape(shape)
    if dtype.itemsize == 4:
        return torch.stack(registers, -1).to(torch.int32).view(dtype).reshape(shape)
    parts = torch.stack([registers[0] & 0xFFFF, registers[0] >> 16], -1)
    return parts.to(torch.int32).to(torch.int16).view(dtype).reshape(shape)


def run(
    text: str,
    constraints: str,
    pack: int,
    operands: Sequence[Tensor],
    results: Sequence[torch.dtype],
    cycles: int,
    shape: Sequence[int],
) -> list[Tensor]:
    """The results of assembly, each in ``shape``, for operands of that shape.

    Args:
        text: The instructions.
        constraints: One for each register, those of results first, with an equals sign.
        pack: The number of elements that an execution takes.
        operands: Those of the operation.
        results: The dtypes of its results.
        cycles: What the clock shows.
        shape: That of each result.

    Raises:
        NotImplementedError: An instruction that isn't known here.
    """
    counts = [pack if dtype.itemsize >= 4 else pack * dtype.itemsize // 4 for dtype in results]
    inputs = [register for operand in operands for register in _packed(operand, pack)]
    kinds = constraints.split(",")
    assert [kind.startswith("=") for kind in kinds] == [True] * sum(counts) + [False] * len(inputs)
    registers = {f"${sum(counts) + index}": register for index, register in enumerate(inputs)}
    registers["%clock64"] = torch.full([1], cycles)
    any_register = inputs[0] if inputs else registers["%clock64"]
    for line in text.replace("\\0A", "\n").strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        if name not in _INSTRUCTIONS:
            raise NotImplementedError(f"{name} of PTX")
        target, *sources = re.split(r",\s*", rest)
        values = [
            registers[source] if source in registers else torch.full_like(any_register, int(source, 0))
            for source in sources
        ]
        found = _INSTRUCTIONS[name](*values)
        targets = target.split("|")
        registers.update(zip(targets, found if len(targets) > 1 else [found], strict=True))
    computed, first = [], 0
    for dtype, count in zip(results, counts, strict=True):
        computed.append(_unpacked([registers[f"${first + index}"] for index in range(count)], dtype, shape))
        first += count
    return computed
