"""Whether the files of a checkpoint are as they were written."""

import zipfile

import pytest
import torch

from fastbert.training import resume


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "optimizer.pt"
    torch.save({"state": {0: torch.arange(50.0)}}, path)
    return path


def test_an_archive_of_torch(archive):
    assert resume._is_sound_archive(archive)


@pytest.mark.parametrize("place", [0, 100, 199])
def test_a_flipped_byte(archive, place):
    content = bytearray(archive.read_bytes())
    content[content.index(torch.arange(50.0).numpy().tobytes()) + place] ^= 0x01
    archive.write_bytes(content)
    assert not resume._is_sound_archive(archive)


def test_an_archive_that_torch_does_not_know(archive):
    """Its checksums are right."""
    with zipfile.ZipFile(archive, "w") as other:
        other.writestr("archive/data.pkl", b"not a pickle")
    assert not resume._is_sound_archive(archive)
