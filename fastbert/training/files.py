"""Reading what users have: text, CSV, JSON lines and saved datasets. Each error names the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.training.errors import DataError, install

# The standard library's limit of 128 KiB is less than a long document.
_LONGEST_FIELD = 1 << 27


class Row(NamedTuple):
    """Values by column, and where they stand: "reviews.csv, line 7"."""

    values: dict[str, Any]
    place: str


def is_utf_8(path: Path) -> bool:
    """Whether a path is text. On Linux it may be any bytes, which Python shows as halves of characters."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file, without their ends (\n or \r\n) and without a byte order mark.

    Raises:
        DataError: it can't be read, or a line isn't UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8: line {line} has byte 0x{raw[error.start]:02x}") from None
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found if found[-1] else found[:-1]


def saved_dataset(folder: Path, split: str) -> Any | None:
    """The ``datasets.Dataset`` that ``save_to_disk`` left in ``folder``, or None where it left none.

    Of a ``DatasetDict`` it is the part named ``split``.

    Raises:
        DataError: it is damaged, has no such part, or the package ``datasets`` isn't installed.
    """
    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return None
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            f"{folder}: a saved dataset needs datasets, which isn't installed: {install('train')}"
        ) from None

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises what it comes upon in a damaged folder
        told = " ".join(str(error).split())
        raise DataError(f"{folder} can't be read as a saved dataset: {told}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(repr, loaded))}")
        return loaded[split]
    return loaded


def saved_rows(dataset: Any, folder: Path) -> Iterator[Row]:
    """The rows of a saved dataset.

    Raises:
        DataError: one is damaged.
    """
    found = iter(dataset)
    for number in range(len(dataset)):
        place = f"{folder}, row {number}"
        try:
            values = next(found)
        except (ValueError, LookupError, OSError) as error:
            raise DataError(f"{place} can't be read: {error}") from None
        yield Row(values, place)


def rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a ``.csv``, ``.tsv`` or ``.jsonl`` file with at least ``columns``.

    The values of ``columns`` are text. A CSV file begins with the columns' names; one that doesn't name any of
    ``columns`` and has as many is taken to have them in that order.

    Raises:
        DataError: another kind of file, or a line that can't be read or lacks a column.
    """
    match path.suffix.lower():
        case ".jsonl":
            found = _json_rows(path)
        case ".csv" | ".tsv" as suffix:
            found = _csv_rows(path, columns, "\t" if suffix == ".tsv" else ",")
        case suffix:
            raise DataError(f"{path} ends in {suffix or 'no suffix'}; it may be .csv, .tsv or .jsonl, or a folder")
    for row in found:
        for column in columns:
            if row.values.get(column) is None:
                there = ", ".join(map(str, row.values)) or "nothing"
                raise DataError(f"{row.place} has no {column!r}; it has {there}")
        yield Row(
            {**row.values, **{column: text(row.values[column], column, row.place) for column in columns}}, row.place
        )


def text(value: Any, name: str, place: str) -> str:
    """A value as text.

    Args:
        value: a string, or a number.
        name, place: what it is called in an error, and where it stands.

    Raises:
        DataError: it is something else, or holds a surrogate, which JSON can escape and UTF-8 can't encode.
    """
    if value is None:
        raise DataError(f"{place} has no {name!r}")
    if isinstance(value, list | dict):
        raise DataError(f"{place} has a {type(value).__name__} as its {name!r}; it must be text")
    found = str(value)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} has half a character in its {name!r}; it must be Unicode text") from None
    return found


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{place} is no JSON object")
        yield Row(values, place)


def _csv_rows(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader([f"{line}\n" for line in lines(path)], delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        # A row begins on the line after those that are read.
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place} is malformed: {error}") from None
        if not fields:
            continue
        if names is None:
            names = [field.strip() for field in fields]
            if set(columns) <= set(names):
                continue
            if len(fields) != len(columns) or set(columns) & set(names):
                raise DataError(
                    f"{place} names the columns {', '.join(names)}; there must be {', '.join(columns)}, "
                    f"or {len(columns)} columns without names, in that order"
                )
            names = list(columns)
        if len(fields) != len(names):
            raise DataError(f"{place} has {len(fields)} fields; it must have {len(names)}: {', '.join(names)}")
        yield Row(dict(zip(names, fields, strict=True)), place)
