"""JSON files that a user names, or that a folder of theirs holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastbert.cli.errors import Refusal, first_line, reason


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
