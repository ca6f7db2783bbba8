"""What a corpus is read as, and what is refused."""

import datasets
import pytest

from fastbert.training import corpus
from fastbert.training.errors import DataError


def write(path, text):
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then he left.', ['He said "no.', "Then he left."]),
        ("wrapped\n  over lines. Next", ["wrapped over lines.", "Next"]),
        ("3.5 is no end", ["3.5 is no end"]),
        (
            "\u4eca\u5929\u5f88\u597d\u3002\u660e\u5929\u5462\uff1f\u4e5f\u597d",
            ["\u4eca\u5929\u5f88\u597d\u3002", "\u660e\u5929\u5462\uff1f", "\u4e5f\u597d"],
        ),
        ("  ", []),
    ],
)
def test_sentences(text, expected):
    assert corpus.sentences(text) == expected


def test_blank_lines_separate_documents(tmp_path):
    path = write(tmp_path / "a.txt", "One. Two.\nThree.\n\n\nFour.\r\n \nFive.")
    assert corpus.read(path) == [["One.", "Two.", "Three."], ["Four."], ["Five."]]


def test_without_blank_lines_each_line_is_a_document(tmp_path):
    assert corpus.read(write(tmp_path / "a.txt", "\ufeffOne. Two.\nThree.\n")) == [["One.", "Two."], ["Three."]]


def test_each_file_of_a_folder_is_a_document(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "b.txt", "Three.")
    write(tmp_path / "a.txt", "One\nline.\n\nTwo.")
    write(tmp_path / "c.md", "Not this one.")
    assert corpus.read(tmp_path) == [["One line.", "Two."], ["Three."]]


@pytest.mark.parametrize("splits", [False, True])
def test_saved_dataset(tmp_path, splits):
    dataset = datasets.Dataset.from_dict({"text": ["One. Two.", "Three."], "other": [1, 2]})
    (datasets.DatasetDict({"train": dataset}) if splits else dataset).save_to_disk(tmp_path / "saved")
    assert corpus.read(tmp_path / "saved") == [["One.", "Two."], ["Three."]]


def test_standard_library():
    documents = corpus.read(None)
    assert len(documents) > 300
    assert sum(map(len, documents)) > 10_000
    assert any("Secure hash" in sentence or "hash" in sentence for document in documents for sentence in document)


def test_refused(tmp_path):
    empty = write(tmp_path / "empty.txt", " \n\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"fine\nnot \xff fine\n")
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_dict({"words": ["a"]}).save_to_disk(tmp_path / "wordy")
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "dev")
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "null")
    datasets.Dataset.from_dict({"text": [["a"]]}).save_to_disk(tmp_path / "lists")
    for path, told in [
        (tmp_path / "null", "null, row 1 has no 'text'"),
        (tmp_path / "lists", "lists, row 0 has a list as its 'text'; it must be text"),
        (tmp_path / "absent", "doesn't exist; a corpus is a text file, a folder"),
        (empty, "holds no text"),
        (binary, "is not UTF-8: line 2 has byte 0xff"),
        (tmp_path / "folder", "holds neither .txt files nor a saved dataset"),
        (tmp_path / "wordy", "has no column 'text'; it has words"),
        (tmp_path / "dev", "has no split 'train'; it has 'dev'"),
    ]:
        with pytest.raises(DataError, match=told):
            corpus.read(path)
