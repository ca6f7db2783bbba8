"""Embeddings as a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

COLUMN = "embedding"
_ROW_GROUP_BYTES = 16 << 20


def rows_per_group(width: int) -> int:
    """Rows of ``width`` float32 numbers that make one row group: what is held in memory at a time."""
    return max(1, _ROW_GROUP_BYTES // (4 * width))


def write(path: Path, blocks: Iterator[npt.NDArray[np.float32]], width: int, about: dict[str, Any]) -> None:
    """Write blocks of rows ``[N, width]``, each as one row group, to a column of fixed-size lists.

    ``about`` is kept in the file's metadata, as JSON under the key ``fastbert``.

    Raises:
        OSError: writing fails.
    """
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([pa.field(COLUMN, kind, nullable=False)], metadata={"fastbert": json.dumps(about)})
    # Embeddings hardly repeat: dictionaries and compression cost time and save nothing.
    settings: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, **settings) as writer:
        for block in blocks:
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)
            writer.write_batch(pa.record_batch([column], schema=schema))


def is_sound(path: Path, rows: int, width: int) -> bool:
    """Whether a file of ``write`` holds so many rows of ``width`` numbers, as they were written."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            found = sum(len(batch) for batch in file.iter_batches(columns=[COLUMN]))
            kind = file.schema_arrow.field(COLUMN).type
    except (OSError, ValueError, KeyError):
        return False
    return found == rows and kind == pa.list_(pa.float32(), width)
