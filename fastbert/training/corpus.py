"""A corpus as documents, each a list of sentences, as Devlin et al. (arXiv:1810.04805, appendix A.2) train on."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from fastbert.training import files, standard_library
from fastbert.training.errors import DataError

Document = list[str]

# After the marks that end a sentence: in Latin scripts with a space behind them, in Chinese and Japanese without.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])\s*")


def read(source: Path | None) -> list[Document]:
    """The documents of a corpus.

    Args:
        source: a text file, whose documents are separated by blank lines, or are its lines if none is blank; a
            folder, where each ``.txt`` file at any depth is one document; a folder written by
            ``datasets.Dataset.save_to_disk``, where each row's "text" is one (of the split "train", if it has splits);
            or None, for the docstrings of the Python standard library, where each module is one.

    Raises:
        DataError: it isn't there, can't be read, or holds no text.
    """
    if source is None:
        documents = _standard_library()
    elif source.is_file():
        documents = _text_file(source)
    elif source.is_dir():
        documents = _folder(source)
    else:
        raise DataError(f"{source} doesn't exist; a corpus is a text file, a folder of .txt files or a saved dataset")
    documents = [document for document in documents if document]
    if not documents:
        raise DataError(f"{source} holds no text")
    return documents


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, by the marks that end them."""
    found = (" ".join(sentence.split()) for sentence in _SENTENCE_END.split(paragraph))
    return [sentence for sentence in found if sentence]


def _standard_library() -> list[Document]:
    modules = itertools.groupby(standard_library.docstrings(), key=lambda docstring: docstring.module)
    return [[s for docstring in module for s in _of_paragraphs(docstring.text)] for _, module in modules]


def _text_file(path: Path) -> list[Document]:
    lines = files.lines(path)
    if all(line.strip() for line in lines):
        return [sentences(line) for line in lines]
    blocks = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    return [[s for line in block for s in sentences(line)] for filled, block in blocks if filled]


def _folder(folder: Path) -> list[Document]:
    dataset = files.saved_dataset(folder, "train")
    if dataset is not None:
        if "text" not in dataset.column_names:
            raise DataError(f"{folder} has no column 'text'; it has {', '.join(dataset.column_names)}")
        return [
            _of_paragraphs(files.text(row.values["text"], "text", row.place))
            for row in files.saved_rows(dataset.select_columns(["text"]), folder)
        ]
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise DataError(f"{folder} holds neither .txt files nor a saved dataset")
    return [_of_paragraphs("\n".join(files.lines(path))) for path in paths]


def _of_paragraphs(text: str) -> Document:
    return [s for paragraph in re.split(r"\n\s*\n", text) for s in sentences(paragraph)]
