"""Reading texts: what is refused, and what lines are."""

import pytest
from cli import tiny

from fastbert.cli import texts
from fastbert.training import standard_library


def _read(path):
    with texts.open_file(path) as file:
        return [line.text for line in texts.lines(path, file)]


@pytest.fixture(params=["compare", "embed"])
def refused(request, checkpoint, tmp_path):
    """The refusal of a command that is given a text file."""
    out = ["--out", tmp_path / "out.npy"] if request.param == "embed" else []

    def told(path):
        line = tiny.refusal(request.param, "--model", checkpoint, "--texts", path, *out)
        assert str(path) in line
        assert [left.name for left in tmp_path.iterdir() if left.name.startswith("out")] == []
        return line

    return told


def test_a_missing_file(refused, tmp_path):
    assert "No such file" in refused(tmp_path / "absent.txt")


def test_a_folder(refused, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "is a folder" in refused(folder)


def test_an_empty_file(refused, tmp_path):
    assert "is empty" in refused(tiny.write(tmp_path / "texts.txt", []))


def test_no_regular_file(refused):
    assert "not a regular file" in refused("/dev/null")


def test_a_file_that_can_not_be_opened(refused, tmp_path):
    """Not by its permissions: root may read everything."""
    assert "Not a directory" in refused(tiny.write(tmp_path / "texts.txt", ["the sum"]) / "inside")


def test_another_encoding_is_told_with_line_and_offset(refused, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("erste Zeile\nzweite Zeile\nGrüße\n".encode("latin-1"))
    told = refused(path)
    assert "not UTF-8" in told
    assert "line 3 " in told
    assert "0xfc" in told
    assert "offset 27 " in told


def test_a_file_without_line_ends(refused, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"the sum\n" + b"x" * (1 << 20) + b"y")
    assert "line 2 is longer than" in refused(path)


def test_a_file_of_blank_lines_holds_no_texts_to_compare(checkpoint, tmp_path):
    path = tiny.write(tmp_path / "texts.txt", ["", "  ", ""])
    assert "blank lines only" in tiny.refusal("compare", "--model", checkpoint, "--texts", path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (b"\n\n", ["", ""]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
        ("a\u2028b\x0bc\rd\n".encode(), ["a\u2028b\x0bc\rd"]),
    ],
    ids=["newline", "no last newline", "crlf", "blank", "byte order mark", "other separators"],
)
def test_lines(data, expected, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(data)
    assert _read(path) == expected


def test_the_longest_line_is_read(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"x" * ((1 << 20) - 1) + b"\nshort\n")
    assert [len(line) for line in _read(path)] == [(1 << 20) - 1, 5]


def test_first_texts_leaves_out_blank_lines_and_stops_at_the_limit(tmp_path):
    path = tiny.write(tmp_path / "texts.txt", ["", "one", "   ", "two", "three"])
    assert texts.first_texts(path, 2) == ["one", "two"]


def test_docstrings_are_different_texts_in_a_fixed_order():
    found = texts.docstrings(300)
    assert len(found) == len(set(found)) == 300
    assert all(text.strip() for text in found)
    assert texts.docstrings(50) == found[:50]


def test_docstrings_are_those_of_the_library(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text('"""Not the standard library."""')
    (tmp_path / "b.py").write_text(
        '"""Module b."""\nclass C:\n    """\n    Class.\n    """\n    def f(self):\n        "F."\n'
    )
    (tmp_path / "a.py").write_text('"""Module a."""\nasync def g():\n    "F."\ndef h():\n    pass\n')
    (tmp_path / "broken.py").write_text('"""Module."""\ndef (')
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    assert texts.docstrings(10) == ["Module a.", "F.", "Module b.", "Class."]
