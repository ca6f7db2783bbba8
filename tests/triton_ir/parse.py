"""Triton's intermediate representation, from its text to operations."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Type(NamedTuple):
    """``tensor<32x64xbf16>`` has shape (32, 64) and element "bf16"; a scalar has shape ()."""

    shape: tuple[int, ...]
    element: str

    @property
    def pointee(self) -> str | None:
        """What a pointer points to, or None."""
        match = re.fullmatch(r"!tt\.ptr<(\w+)(?:, \d+)?>", self.element)
        return match and match[1]


@dataclass
class Block:
    """A list of operations with arguments of its own; the last one ends it."""

    arguments: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """One operation: ``%5 = arith.addi %3, %4 : i32``.

    ``words`` is what stands between the name and the types, ``attributes`` what is in braces, ``text`` what is in
    quotes. ``types`` are those of the results, or what is given where there is no arrow.
    """

    name: str
    results: list[str]
    operands: list[str]
    types: list[Type]
    words: str = ""
    attributes: str = ""
    text: str = ""
    blocks: list[Block] = field(default_factory=list)

    def number(self, name: str) -> int:
        """The integer attribute ``name``."""
        match = re.search(rf"\b{name} = (-?\d+)", self.attributes)
        assert match, f"{self.name} has no attribute {name}: {self.attributes}"
        return int(match[1])

    def numbers(self, name: str) -> list[int]:
        """The attribute ``name``, an array of integers."""
        match = re.search(rf"\b{name} = array<i\d+: ([-\d, ]*)>", self.attributes)
        assert match, f"{self.name} has no attribute {name}: {self.attributes}"
        return [int(number) for number in match[1].split(",")]


@dataclass
class Function:
    """A kernel: its parameters by name, and what it does."""

    name: str
    parameters: dict[str, Type]
    body: Block

    def operations(self) -> list[Operation]:
        """All of them, those in blocks included."""
        found, blocks = [], [self.body]
        while blocks:
            for operation in blocks.pop().operations:
                found.append(operation)
                blocks += operation.blocks
        return found

    @functools.cached_property
    def largest(self) -> int:
        """The number of elements of the largest tensor."""
        return max([1, *(math.prod(kind.shape) for operation in self.operations() for kind in operation.types)])

    @functools.cached_property
    def written(self) -> set[str]:
        """The parameters that the kernel writes to: where the pointers of its stores come from."""
        sources: dict[str, set[str]] = {name: {name} for name in self.parameters}
        operations = self.operations()
        passed = [pair for operation in operations for pair in _passed(operation)]
        size = 0
        while size != (size := sum(map(len, sources.values()))):
            for target, source in passed:
                sources.setdefault(target, set()).update(sources.get(source, ()))
        stores = [operation.operands[0] for operation in operations if operation.name in _STORES]
        return set().union(*(sources[name] for name in stores))


_STORES = {"tt.store", "tt.descriptor_store", "ttng.async_tma_copy_local_to_global"}


def _passed(operation: Operation) -> list[tuple[str, str]]:
    """(a name, another that it may be a pointer from), for the names of one operation."""
    pointers = operation.name != "tt.load" and any(kind.pointee for kind in operation.types)
    pairs = [(result, name) for result in operation.results for name in operation.operands] if pointers else []
    for block in operation.blocks:
        ends = block.operations[-1].operands if block.operations else []
        if operation.name == "scf.for":
            carried = block.arguments[1:]
            pairs = [*zip(carried, operation.operands[3:], strict=True), *zip(operation.results, carried, strict=True)]
            pairs += zip(carried, ends[: len(carried)], strict=True)
        else:
            pairs += [(result, name) for result in operation.results for name in ends]
    return pairs


_NAME = r"%[\w$.-]+(?:#\d+)?"
_LINE = re.compile(rf'(?:(?P<results>{_NAME}(?::\d+)?(?:, {_NAME})*) = )?"?(?P<name>[a-z_]+[.][\w.]+)"?(?P<rest>.*)')
_FOR = re.compile(
    rf" (?P<variable>{_NAME}) = (?P<bounds>{_NAME} to {_NAME} step {_NAME})\s*(?:iter_args\((?P<carried>.*?)\))?.*{{$"
)


@functools.cache
def type_of(text: str) -> Type:
    """What a type's text says; layouts are left out."""
    text = text.strip()
    match = re.fullmatch(r"(?:tensor|!tt\.tensordesc|!ttg\.memdesc)<((?:\d+x)*)(!tt\.ptr<[^>]*>|\w+)(?:, .*)?>", text)
    if not match:
        return Type((), text)
    return Type(tuple(int(size) for size in match[1].split("x")[:-1]), match[2])


def parted(text: str) -> list[str]:
    """The parts of a list, at the commas that are in no brackets."""
    parts, depth, last = [], 0, ""
    for character in text:
        if character in "<([{":
            depth += 1
        elif character in ")]}" or (character == ">" and last != "-"):
            depth -= 1
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1:] = [(parts or [""])[-1] + character]
        last = character
    return [part.strip() for part in parts if part.strip()]


def _types(text: str) -> list[Type]:
    for arrow in (" -> ", " to "):
        _, found, after = text.rpartition(arrow)
        if found:
            text = after
            break
    text = text.strip()
    return [type_of(part) for part in parted(text[1:-1] if text.startswith("(") else text)]


def _results(text: str | None) -> list[str]:
    found = []
    for name in (text or "").split(", "):
        base, _, count = name.partition(":")
        found += [f"{base}#{index}" for index in range(int(count))] if count else [base] if base else []
    return found


def _braces(text: str) -> tuple[str, str]:
    """``text`` without its last part in braces, and that part."""
    start = text.find("{")
    if start < 0:
        return text, ""
    depth = 0
    for end, character in enumerate(text[start:], start):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return (text[:start].removesuffix("<") + text[end + 1 :].removeprefix(">")), text[start : end + 1]
    raise AssertionError(f"braces that don't end: {text}")


class _Reader:
    def __init__(self, text: str) -> None:
        self.lines = [line for line in map(str.strip, text.splitlines()) if line]
        self.place = 0

    def next(self) -> str:
        self.place += 1
        return self.lines[self.place - 1]

    def block(self, arguments: list[str]) -> tuple[Block, str]:
        """A block, and the line that ends it."""
        block = Block(arguments)
        while not (line := self.next()).startswith("}"):
            if line.startswith("^"):
                block.arguments += re.findall(rf"({_NAME}):", line)
            else:
                block.operations.append(self.operation(line))
        return block, line

    def operation(self, line: str) -> Operation:
        match = _LINE.fullmatch(line)
        assert match, f"no operation: {line}"
        name, rest, results = match["name"], match["rest"], _results(match["results"])
        text = ""
        if name == "tt.elementwise_inline_asm":
            _, text, rest = rest.split('"', 2)
        if name == "scf.for":
            found = _FOR.fullmatch(rest)
            assert found, f"no loop: {line}"
            pairs = [part.split(" = ") for part in parted(found["carried"] or "")]
            block, _ = self.block([found["variable"], *(pair[0] for pair in pairs)])
            operands = [*re.findall(_NAME, found["bounds"]), *(pair[1] for pair in pairs)]
            return Operation(name, results, operands, [], blocks=[block])
        if name == "scf.if":
            (condition,) = re.findall(_NAME, rest.partition("->")[0])
            blocks = [self.block([])]
            if "else" in blocks[0][1]:
                blocks.append(self.block([]))
            return Operation(name, results, [condition], [], blocks=[block for block, _ in blocks])
        if name == "scf.while":
            pairs = [part.split(" = ") for part in parted(rest.partition(" : ")[0].strip().strip("()"))]
            before, _ = self.block([pair[0] for pair in pairs])
            after, _ = self.block([])
            return Operation(name, results, [pair[1] for pair in pairs], [], blocks=[before, after])
        if rest.endswith("({"):
            rest, attributes = _braces(rest.removesuffix("({"))
            block, end = self.block([])
            types = _types(end.partition(" : ")[2])
            return Operation(name, results, re.findall(_NAME, rest), types, attributes=attributes, blocks=[block])
        rest, attributes = _braces(rest)
        words, found, types = rest.rpartition(" : ")
        if not found:
            words, _, types = rest.partition(" -> ")
        words = words.strip()
        return Operation(name, results, re.findall(_NAME, words), _types(types), words, attributes, text)


def parse(text: str) -> Function:
    """The only function of a module."""
    start = re.search(r"tt\.func public @(\w+)\((.*)\) attributes .*{\n", text)
    assert start, f"no function: {text[:500]}"
    parameters = {}
    for parameter in parted(start[2]):
        name, _, kind = parameter.partition(": ")
        parameters[name] = type_of(_braces(kind)[0])
    body, _ = _Reader(text[start.end() :]).block([])
    return Function(start[1], parameters, body)
