"""Fixtures of the command-line tests."""

import pytest
import torch
from cli import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small lose by more threads; and a command's --threads is undone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random BERT; tests that change one make their own."""
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-bert")
