"""Fixtures of the command-line tests."""

import pytest
from cli import tiny


@pytest.fixture(autouse=True, scope="module")
def _one_thread_in_module(one_thread_in_module):
    pass


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """And a command's --threads is undone."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random BERT; tests that change one make their own."""
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-bert")
