"""How a command refuses: one line on stderr and exit code 2, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fastbert.training.errors import DataError

EXIT_CODE = 2
# What a shell gives for a command that Ctrl-C ended.
INTERRUPTED = 130


class Refusal(Exception):
    """A command can't do what it was asked to; the message says why and what would help, in one line."""


@contextmanager
def reported() -> Iterator[None]:
    """Turn a ``Refusal``, a ``DataError`` or the system's own error into one line on stderr and exit code 2."""
    try:
        yield
    except (Refusal, DataError) as refusal:
        told = str(refusal)
    except OSError as error:
        told = f"{error.filename}: {reason(error)}" if error.filename else first_line(error)
    else:
        return
    typer.echo(f"fastbert: {told}", err=True)
    raise typer.Exit(EXIT_CODE)


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason(error: OSError) -> str:
    """What went wrong with a file, without its name: "No such file or directory"."""
    return error.strerror or first_line(error)
