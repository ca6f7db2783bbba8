"""JSON files that a user names, or that a folder of theirs holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.cli.errors import Refusal, first_line, reason

_LONGEST_SHOWN = 60


class Kind(NamedTuple):
    """A kind of value, in words, and whether a value is of it."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # Larger whole numbers are no number of anything, and arrays don't take them.
    return isinstance(value, float) or (type(value) is int and -(1 << 63) <= value < 1 << 63)


def _is_text(value: Any) -> bool:
    # JSON can escape half a character, which UTF-8 can't encode.
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


TEXT = Kind("a text", _is_text)
NUMBER = Kind("a number", _is_number)
FINITE = Kind("a finite number", lambda value: _is_number(value) and math.isfinite(value))
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and 0 < value < math.inf)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
ANYTHING = Kind("anything", lambda value: True)


def or_null(kind: Kind) -> Kind:
    """That kind of value, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def one_of(texts: tuple[str, ...]) -> Kind:
    """One of these texts."""
    return Kind(f"one of {', '.join(texts)}", lambda value: value in texts)


def read(path: Path, name: str) -> Any:
    """What a JSON file holds that is called ``name`` in a refusal.

    Raises:
        Refusal: it can't be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Refusal(f"{name} can't be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{name} is no JSON: {first_line(error)}") from None


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The object that a JSON file holds, as ``read`` reads it.

    Raises:
        Refusal: it can't be read, or holds no object.
    """
    found = read(path, name)
    if not isinstance(found, dict):
        raise Refusal(f"{name} is no JSON object")
    return found


def check(value: Any, shape: Any, name: str) -> None:
    """Refuse a value of another shape.

    Args:
        value: what a JSON file holds.
        shape: a ``Kind``; or a list of one shape, that of all members; or a dict of shapes by key. A key that ends in
            "?" may be missing, others may be there, and the key "*" stands for all.
        name: the file, in a refusal.

    Raises:
        Refusal: the value is of another shape; the message says where.
    """
    for told, expected in _misfits(value, shape, ""):
        told = told if len(told) <= _LONGEST_SHOWN else f"{told[:_LONGEST_SHOWN]}..."
        raise Refusal(f"{name}: {told}; it must be {expected}")


def _misfits(value: Any, shape: Any, place: str) -> Iterator[tuple[str, str]]:
    """Where a value is of another shape: what is there, and what it must be."""
    if isinstance(shape, dict) and isinstance(value, dict):
        kinds = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        for key, kind in kinds.items():
            name = key.removesuffix("?")
            inside = f"{place}.{name}" if place else name
            if name in value:
                yield from _misfits(value[name], kind, inside)
            elif name == key:
                yield f"{inside} is missing", _words(kind)
    elif isinstance(shape, list) and isinstance(value, list):
        for number, member in enumerate(value):
            yield from _misfits(member, shape[0], f"{place}[{number}]")
    elif not (isinstance(shape, Kind) and shape.holds(value)):
        yield f"{place or 'the whole'} is {value!r}", _words(shape)


def _words(shape: Any) -> str:
    return "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else str(shape.words)
