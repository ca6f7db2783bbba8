"""The rows that a run of ``fastbert embed`` has made so far, kept so that a stopped run can go on.

Two files stand beside the output while a run lasts. ``OUT.partial`` is a ``.npy`` file of the final shape, to which
each window of rows is appended. ``OUT.progress.json`` says how many rows are whole and where in the text file the next
one's line begins; it is replaced when the rows are on the disk. So a run that is killed at any moment loses the window
it was in and no more. One that is interrupted also keeps the rows of that window that are done.

The record holds checksums of the rows and of itself, so that damage to either is refused.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbert.cli.errors import Refusal, reason

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_FLOAT32 = np.dtype("<f4")
_LONGEST_SHOWN = 16
_BLOCK_BYTES = 1 << 20


class _Done(NamedTuple):
    """How many of the first rows are whole, where the next one's line begins, and their CRC-32.

    ``ahead`` are rows behind them that are whole too, by number.
    """

    rows: int
    offset: int
    crc32: int
    ahead: Mapping[int, npt.NDArray[np.float32]]

    def crc32_with_ahead(self) -> int:
        """The checksum of all these rows."""
        crc32 = self.crc32
        for _, row in sorted(self.ahead.items()):
            crc32 = zlib.crc32(row.astype(_FLOAT32).tobytes(), crc32)
        return crc32


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

    Raises:
        Refusal: the files can't be written, are damaged, belong to another identity, or another run holds them.
    """

    def __init__(self, out: Path, identity: dict[str, Any], rows: int, width: int, restart: bool) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        # One value, so that an interruption finds it as it was or as it will be.
        self._done = _Done(0, 0, 0, {})
        self._progress = out.with_name(f"{out.name}.progress.json")
        self._identity = identity
        self.width = width
        self._row_bytes = width * _FLOAT32.itemsize
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
    def done(self) -> int:
        """How many of the first rows are whole."""
        return self._done.rows

    @property
    def offset(self) -> int:
        """Where in the text file the line of the row after those begins, in bytes."""
        return self._done.offset

    @property
    def kept(self) -> int:
        """How many rows are whole, with those that an interruption left of a window."""
        return self._done.rows + len(self._done.ahead)

    @property
    def bytes_left(self) -> int:
        """The size of the rows that are still to be appended."""
        return (self._rows - self.done) * self._row_bytes

    def begin(self, count: int) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Room for the next ``count`` rows, ``[count, width]``, and the indices of those that aren't there yet."""
        rows = np.empty((count, self.width), np.float32)
        missing = []
        for index in range(count):
            row = self._done.ahead.get(self.done + index)
            if row is None:
                missing.append(index)
            else:
                rows[index] = row
        return rows, missing

    def append(self, rows: npt.NDArray[np.float32], text_bytes: int) -> None:
        """Add ``rows`` ``[N, width]``, made of ``text_bytes`` bytes of text, and record that they are done.

        Raises:
            Refusal: there is no space left, or writing fails; what was done before is kept.
        """
        data = rows.astype(_FLOAT32).tobytes()
        done = self.done + len(rows)
        ahead = {number: row for number, row in self._done.ahead.items() if number >= done}
        try:
            self._write(self.done, data)
            os.fsync(self._file.fileno())
            self._record(_Done(done, self.offset + text_bytes, zlib.crc32(data, self._done.crc32), ahead))
        except OSError as error:
            raise self.refusal(error) from None

    def keep(self, first: int, rows: npt.NDArray[np.float32], whole: Sequence[int]) -> None:
        """Add those of ``rows`` ``[N, width]`` whose indices are ``whole``, and record them.

        ``first`` is the number of the first of ``rows``, one that wasn't done when they were begun.

        Raises:
            Refusal: as ``append``.
        """
        added = {first + index: rows[index] for index in whole if first + index >= self.done}
        try:
            for number, row in added.items():
                self._write(number, row.astype(_FLOAT32).tobytes())
            os.fsync(self._file.fileno())
            self._record(self._done._replace(ahead={**self._done.ahead, **added}))
        except OSError as error:
            raise self.refusal(error) from None

    def blocks(self, rows: int) -> Iterator[npt.NDArray[np.float32]]:
        """All rows, ``rows`` at a time."""
        self._file.seek(len(self._header))
        with open(self._file.fileno(), "rb", closefd=False) as file:
            while block := file.read(rows * self._row_bytes):
                yield np.frombuffer(block, _FLOAT32).reshape(-1, self.width)

    def finish(self, finished: Path, out: Path) -> None:
        """Put ``finished`` (``path`` itself, or a file made of it) in the place of ``out``; nothing else is left."""
        os.replace(finished, out)
        self.path.unlink(missing_ok=True)
        self._progress.unlink()

    def refusal(self, error: OSError) -> Refusal:
        """What to tell the user about a failure to write beside the output."""
        kept = f"{self.kept} of {self._rows} rows are kept, and the same command goes on with them"
        if error.errno in _NO_SPACE:
            return Refusal(f"no space is left in {self.path.parent}: {kept} once there is")
        return Refusal(f"writing in {self.path.parent} failed ({reason(error)}): {kept}")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"another run is writing {self.path}") from None

    def _resume(self) -> None:
        if not self._progress.exists():
            if not self._header.startswith(self._file.read(len(self._header) + 1)):
                raise Refusal(f"{self.path} is not of a stopped run; --restart begins again in its place")
            return
        try:
            recorded = json.loads(self._progress.read_text("utf-8"))
            sound = recorded.pop("crc32") == _crc32(recorded)
            done, offset, identity = recorded["rows_done"], recorded["offset"], recorded["identity"]
            numbers = [done, offset, recorded["rows_crc32"], *recorded["rows_ahead"]]
            sound = sound and isinstance(identity, dict) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise Refusal(f"{self._progress} is damaged; --restart begins again")
        differing = [name for name in self._identity if identity.get(name) != self._identity[name]]
        if differing:
            told = ", ".join(_difference(name, identity.get(name), self._identity[name]) for name in differing)
            raise Refusal(
                f"{self.path} is of a run with another {told}; the same command as then goes on with it, "
                "and --restart begins again"
            )
        if max([done, *(number + 1 for number in recorded["rows_ahead"])]) > self._rows:
            raise Refusal(f"{self._progress} is damaged; --restart begins again")
        ahead = {number: self._row(number) for number in recorded["rows_ahead"]}
        found = _Done(done, offset, self._crc32_of_first(done), ahead)
        if found.crc32_with_ahead() != recorded["rows_crc32"]:
            raise Refusal(f"{self.path} is damaged: it has other rows than were written; --restart begins again")
        self._done = found

    def _crc32_of_first(self, rows: int) -> int:
        """The checksum of so many rows, or of what there is of them."""
        self._file.seek(len(self._header))
        crc32, left = 0, rows * self._row_bytes
        while left and (data := self._file.read(min(left, _BLOCK_BYTES))):
            crc32 = zlib.crc32(data, crc32)
            left -= len(data)
        return crc32

    def _row(self, number: int) -> npt.NDArray[np.float32]:
        """A row, or what there is of it."""
        self._file.seek(self._place(number))
        data = self._file.read(self._row_bytes)
        return np.frombuffer(data[: len(data) // _FLOAT32.itemsize * _FLOAT32.itemsize], _FLOAT32)

    def _prepare(self) -> None:
        """Cut off what isn't whole, so that the next row follows the last one that is."""
        try:
            self._file.seek(0)
            self._write_all(self._header)
            self._file.truncate(self._place(max(self._done.ahead, default=self.done - 1) + 1))
            self._record(self._done)
        except OSError as error:
            raise self.refusal(error) from None

    def _place(self, number: int) -> int:
        return len(self._header) + number * self._row_bytes

    def _write(self, number: int, data: bytes) -> None:
        """Write rows from ``number`` on."""
        self._file.seek(self._place(number))
        self._write_all(data)

    def _write_all(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _record(self, done: _Done) -> None:
        record = {
            "rows_done": done.rows,
            "offset": done.offset,
            "rows_ahead": sorted(done.ahead),
            "rows_crc32": done.crc32_with_ahead(),
            "identity": self._identity,
        }
        new = self._progress.with_name(f"{self._progress.name}.new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({**record, "crc32": _crc32(record)}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._progress)
        self._done = done


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _npy_header(rows: int, width: int) -> bytes:
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(_FLOAT32), "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _difference(name: str, then: object, now: object) -> str:
    shown = all(len(str(value)) <= _LONGEST_SHOWN for value in (then, now))
    return f"{name} ({then} then, {now} now)" if shown else name
