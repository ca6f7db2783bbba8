"""A file of results: what a run of the suite measured on one device, with all that it depends on.

It is JSON: ``name`` (of the device, for files), ``environment``, ``partial`` (whether cases were left out),
``ceilings`` by dtype, and ``rows``: one for each contestant of each contest. A row's work, model, batch, dtype and
dropout say which contest; it holds either ``reason``, why the contestant took no part, or its error against the float64
oracle with the bound, and unless it failed that gate its ``milliseconds`` (median, p20, p80, rounds), its floor and its
memory in bytes. The same rows, flat, are beside it as CSV.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.cli import json_files
from fastbert.cli.errors import Refusal, reason
from fastbert.cli.json_files import ANYTHING, FINITE, NUMBER, OBJECT, POSITIVE, TEXT, one_of, or_null

Row = dict[str, Any]
Key = tuple[Any, ...]

OURS = "fastbert"
_CONTEST = ("work", "model", "batch", "dtype", "dropout_p")

_WHO = {
    "work": TEXT,
    "model": TEXT,
    "batch": TEXT,
    "dtype": one_of(("float32", "bfloat16", "float16")),
    "dropout_p": FINITE,
    "contestant": TEXT,
}
# An error may be infinite, or no number.
_GATE = {"what": TEXT, "error": NUMBER, "allowed": NUMBER}
_TIMED = {
    "sequences": FINITE,
    "tokens": POSITIVE,
    "padding_ratio": FINITE,
    "milliseconds": {"median": POSITIVE, "p20": POSITIVE, "p80": POSITIVE, "rounds": POSITIVE},
    "memory": {"peak": or_null(FINITE), "kept": or_null(FINITE)},
    "share_of_floor": or_null(FINITE),
    "fastbert_is_faster_by": or_null(FINITE),
    "flops?": or_null(FINITE),
    "bytes?": or_null(FINITE),
}
_ENVIRONMENT = {
    "device": TEXT,
    "kind": TEXT,
    "threads": FINITE,
    "gpu": or_null(OBJECT),
    "python": TEXT,
    "versions": {"*": or_null(TEXT)},
    "commit": TEXT,
}
_RESULTS = {
    "name": TEXT,
    "environment": _ENVIRONMENT,
    "ceilings": [{"dtype": TEXT, "flops": POSITIVE, "bytes": POSITIVE}],
    "rows": [ANYTHING],
}


def read(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        Refusal: it can't be read, or holds something else.
    """
    data = json_files.read_object(path, str(path))
    if not {"name", "environment", "rows"} <= data.keys():
        raise Refusal(f"{path} holds no results of `fastbert bench`")
    json_files.check(data, _RESULTS, str(path))
    for number, row in enumerate(data["rows"]):
        name = f"{path}, rows[{number}]"
        json_files.check(row, _WHO, name)
        absent, timed = "reason" in row, "milliseconds" in row
        json_files.check(row, {"reason": TEXT} if absent else {"padding_ratio": FINITE}, name)
        if timed:
            json_files.check(row, _TIMED, name)
        # A contestant that is compared with nothing has a time and no error.
        if "error" in row or "allowed" in row or not (absent or timed):
            json_files.check(row, _GATE, name)
    return data


def write(data: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write ``name.json`` and ``name.csv``.

    Raises:
        Refusal: the folder can't be made, or a file not written.
    """
    paths = [folder / f"{name}.json", folder / f"{name}.csv"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        flat = [dict(_flat(row)) for row in data["rows"]]
        with paths[1].open("w", encoding="utf-8", newline="") as file:
            columns = dict.fromkeys(name for row in flat for name in row)
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise Refusal(f"{folder} can't be written: {reason(error)}") from None
    return paths


def contest(row: Row) -> Key:
    """What was measured."""
    return tuple(row[name] for name in _CONTEST)


def contests(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """The rows of each contest by contestant."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(contest(row), {})[row["contestant"]] = row
    return found


def title(row: Row) -> str:
    """A contest in words."""
    dropout = f", p={row['dropout_p']:g}" if row["dropout_p"] else ""
    return f"{row['work']}, {row['model']}, {row['batch']}, {row['dtype']}{dropout}"


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those that have a time."""
    return [row for row in rows if "milliseconds" in row]


def absent(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Who took no part, by the reason."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if "reason" in row:
            found.setdefault(row["reason"], set()).add(row["contestant"])
    return {reason: sorted(names) for reason, names in sorted(found.items())}


def is_ours(contestant: str) -> bool:
    """Whether it is fastbert's, as a whole or one of its implementations."""
    return contestant.split(" ")[0] == OURS


def spread(timing: dict[str, float]) -> str:
    """A time for people: the median, and in brackets p20 to p80."""
    digits = 1 if timing["median"] >= 10 else 3
    return f"{timing['median']:.{digits}f} ({timing['p20']:.{digits}f}–{timing['p80']:.{digits}f})"


def _flat(row: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict) and name == "lengths":
            yield f"{prefix}{name}", " ".join(f"<={upper}:{count}" for upper, count in value.items())
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}_")
        else:
            yield f"{prefix}{name}", value
