"""The rows that a run of ``fastbert embed`` has made so far, kept so that a stopped run can go on.

Two files stand beside the output while a run lasts. ``OUT.partial`` is a ``.npy`` file of the final shape, to which
each window of rows is appended. ``OUT.progress.json`` says how many rows are whole and where in the text file the next
one's line begins; it is replaced when the rows are on the disk. So a run that is killed at any moment loses the window
it was in and no more.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.cli.errors import Refusal, reason

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_FLOAT32 = np.dtype("<f4")
_LONGEST_SHOWN = 16


class PartialRows:
    """The rows of ``out``, float32 ``[rows, width]``, as far as they are done.

    Args:
        out: the output; the two files are put beside it.
        identity: what the rows depend on, as JSON; a run only goes on with rows of an equal identity.
        rows, width: the shape of the whole.
        restart: forget what there is.

    Attributes:
        path: the file that holds the rows.
        width: numbers in a row.
        done: how many of them are whole.
        offset: where in the text file the line of the next one begins, in bytes.

    Raises:
        Refusal: the files can't be written, are damaged, belong to another identity, or another run holds them.
    """

    def __init__(self, out: Path, identity: dict[str, Any], rows: int, width: int, restart: bool) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self.done = self.offset = 0
        self._progress = out.with_name(f"{out.name}.progress.json")
        self._identity = identity
        self.width = width
        self._rows = rows
        self._header = _npy_header(rows, width)
        try:
            # Not opened with "w": that would empty the file of a run that is still going.
            self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise Refusal(f"--out: {self.path} can't be written: {reason(error)}") from None
        try:
            self._lock()
            if not restart:
                self._resume()
            self._prepare()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PartialRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def bytes_left(self) -> int:
        """The size of the rows that are still to be appended."""
        return (self._rows - self.done) * self.width * _FLOAT32.itemsize

    def append(self, rows: npt.NDArray[np.float32], text_bytes: int) -> None:
        """Add ``rows`` ``[N, width]``, made of ``text_bytes`` bytes of text, and record that they are done.

        Raises:
            Refusal: there is no space left, or writing fails; what was done before is kept.
        """
        try:
            self._write(rows.astype(_FLOAT32).tobytes())
            os.fsync(self._file.fileno())
            self._record(self.done + len(rows), self.offset + text_bytes)
        except OSError as error:
            raise self.refusal(error) from None

    def blocks(self, rows: int) -> Iterator[npt.NDArray[np.float32]]:
        """All rows, ``rows`` at a time."""
        self._file.seek(len(self._header))
        with open(self._file.fileno(), "rb", closefd=False) as file:
            while block := file.read(rows * self.width * _FLOAT32.itemsize):
                yield np.frombuffer(block, _FLOAT32).reshape(-1, self.width)

    def finish(self, finished: Path, out: Path) -> None:
        """Put ``finished`` (``path`` itself, or a file made of it) in the place of ``out``; nothing else is left."""
        os.replace(finished, out)
        self.path.unlink(missing_ok=True)
        self._progress.unlink()

    def refusal(self, error: OSError) -> Refusal:
        """What to tell the user about a failure to write beside the output."""
        kept = f"{self.done} of {self._rows} rows are kept, and the same command goes on with them"
        if error.errno in _NO_SPACE:
            return Refusal(f"no space is left in {self.path.parent}: {kept} once there is")
        return Refusal(f"writing in {self.path.parent} failed ({reason(error)}): {kept}")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"another run is writing {self.path}") from None

    def _resume(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size == 0 or not self._progress.exists():
            return
        try:
            recorded = json.loads(self._progress.read_text("utf-8"))
            identity, done, offset = recorded["identity"], int(recorded["rows_done"]), int(recorded["offset"])
        except (OSError, ValueError, KeyError, TypeError):
            raise Refusal(f"{self._progress} is damaged; --restart begins again") from None
        differing = [name for name in self._identity if identity.get(name) != self._identity[name]]
        if differing:
            told = ", ".join(_difference(name, identity.get(name), self._identity[name]) for name in differing)
            raise Refusal(
                f"{self.path} is of a run with another {told}; the same command as then goes on with it, "
                "and --restart begins again"
            )
        if size < len(self._header) + done * self.width * _FLOAT32.itemsize:
            raise Refusal(f"{self.path} is shorter than {self._progress.name} says; --restart begins again")
        self.done, self.offset = done, offset

    def _prepare(self) -> None:
        """Cut off what isn't whole, so that the next row follows the last one that is."""
        try:
            self._file.seek(0)
            self._write(self._header)
            end = len(self._header) + self.done * self.width * _FLOAT32.itemsize
            self._file.truncate(end)
            self._file.seek(end)
            self._record(self.done, self.offset)
        except OSError as error:
            raise self.refusal(error) from None

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _record(self, done: int, offset: int) -> None:
        new = self._progress.with_name(f"{self._progress.name}.new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({"rows_done": done, "offset": offset, "identity": self._identity}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._progress)
        self.done, self.offset = done, offset


def _npy_header(rows: int, width: int) -> bytes:
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(_FLOAT32), "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _difference(name: str, then: object, now: object) -> str:
    shown = all(len(str(value)) <= _LONGEST_SHOWN for value in (then, now))
    return f"{name} ({then} then, {now} now)" if shown else name
