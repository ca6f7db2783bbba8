"""A corpus that is everywhere: the docstrings of this Python's standard library."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastbert.training.errors import DataError

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Docstring(NamedTuple):
    """A docstring and the dotted name of the module it is from: "email.mime.text"."""

    module: str
    text: str


def docstrings() -> Iterator[Docstring]:
    """The docstrings that aren't blank, in the order of the files and within each in that of ``ast.walk``.

    Raises:
        DataError: there are none, as where only compiled modules are installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in _sources(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for text in _docstrings_of(path):
            found = True
            yield Docstring(module, text)
    if not found:
        raise DataError(f"the standard library in {root} has no sources to take docstrings from")


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            # Old escapes in the library's own sources are none of the user's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield text
