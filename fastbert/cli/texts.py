"""Reading texts: lines of a UTF-8 file, or docstrings of the Python standard library."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbert.cli.errors import Refusal, reason
from fastbert.training import standard_library
from fastbert.training.errors import DataError

# A longer line is no text but a file without line ends, and reading it whole would not be bounded memory.
_LONGEST_LINE = 1 << 20
STANDARD_INPUT = Path("-")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line of a file: its text without the line end, and its bytes as they stand in the file."""

    text: str
    raw: bytes


class Scan(NamedTuple):
    """What one pass over a text file found: the number of lines, and the hash of all bytes."""

    lines: int
    sha256: str


class State(NamedTuple):
    """Size in bytes and time of the last change in nanoseconds: equal states mean an unchanged file."""

    size: int
    changed: int


def open_file(path: Path) -> BinaryIO:
    """Open a text file for reading; "-" is a copy of standard input, which can be read more than once.

    Raises:
        Refusal: it isn't there, isn't a file, can't be read, or is empty.
    """
    try:
        file = _copy_of_standard_input() if path == STANDARD_INPUT else path.open("rb")
    except IsADirectoryError:
        raise Refusal(f"--texts {path} is a folder; it must be a text file with one text per line") from None
    except OSError as error:
        raise Refusal(f"--texts {path} can't be read: {reason(error)}") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file, and it must be one to be read more than once"
    elif status.st_size == 0:
        problem = "is empty; it must hold one text per line"
    else:
        return file
    file.close()
    raise Refusal(f"--texts {path} {problem}")


def _copy_of_standard_input() -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    # There is none where a shell closes it.
    if sys.stdin is not None:
        shutil.copyfileobj(sys.stdin.buffer, file)
    file.flush()
    file.seek(0)
    return file


def state(file: BinaryIO) -> State:
    """The state of an open file."""
    status = os.fstat(file.fileno())
    return State(status.st_size, status.st_mtime_ns)


def lines(path: Path, file: BinaryIO, number: int = 1) -> Iterator[Line]:
    r"""The lines of ``file`` from where it stands, which is the start of line ``number``; they end with \n or \r\n.

    Raises:
        Refusal: a line isn't UTF-8 or is longer than a text can be; the message names line and byte.
    """
    start = file.tell()
    while raw := file.readline(_LONGEST_LINE + 1):
        if len(raw) > _LONGEST_LINE:
            raise Refusal(f"--texts {path}: line {number} is longer than {_LONGEST_LINE} bytes; one line is one text")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise Refusal(
                f"--texts {path} is not UTF-8: line {number} has byte 0x{raw[error.start]:02x} "
                f"at offset {start + error.start} of the file"
            ) from None
        if start == 0 and raw.startswith(_BYTE_ORDER_MARK):
            text = text[1:]
        yield Line(text.removesuffix("\n").removesuffix("\r"), raw)
        start += len(raw)
        number += 1


def scan(path: Path, file: BinaryIO) -> Scan:
    """Read the whole file once, so that everything wrong with it is known before any work is done."""
    file.seek(0)
    digest = hashlib.sha256()
    count = 0
    for line in lines(path, file):
        digest.update(line.raw)
        count += 1
    return Scan(count, digest.hexdigest())


def first_texts(path: Path, limit: int) -> list[str]:
    """The first ``limit`` lines that aren't blank.

    Raises:
        Refusal: as ``open_file`` and ``lines``; or all lines are blank.
    """
    found: list[str] = []
    with open_file(path) as file:
        for line in lines(path, file):
            if line.text.strip():
                found.append(line.text)
            if len(found) == limit:
                break
    if not found:
        raise Refusal(f"--texts {path} has blank lines only; it must hold one text per line")
    return found


def docstrings(limit: int) -> list[str]:
    """The first ``limit`` different docstrings of this Python's standard library, in the order of its files."""
    found: dict[str, None] = {}
    try:
        for docstring in standard_library.docstrings():
            found.setdefault(docstring.text)
            if len(found) == limit:
                break
    except DataError as error:
        raise Refusal(f"{error}; name a file with --texts") from None
    return list(found)
