"""Fixtures that all tests share."""

import dataclasses
import json
import os
from pathlib import Path

import parity
import pytest
import torch

from fastbert.backends import select


def pytest_addoption(parser):
    parser.addoption("--parity-json", metavar="FOLDER", help="write the errors of parity checks on a GPU, by worker")


def pytest_sessionfinish(session):
    if folder := session.config.getoption("--parity-json"):
        records = [dataclasses.asdict(record) for record in parity.RECORDS if record.device == "cuda"]
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        (Path(folder) / f"{worker}.json").write_text(json.dumps(records), encoding="utf-8")


def pytest_collection_modifyitems(items):
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and there is none"
    if next(select.needs_triton(select.Request("cpu", torch.float32)), None) is None:
        reasons["many_programs"] = "Triton's interpreter runs one program after the other, and these are too many"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Tiny models spend their time waking threads; where threads matter, a test sets their number itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_allocator():
    """torch.empty and its kin return NaN, also inside PyTorch's own kernels."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_dynamo():
    """No compiled code from other tests, and none left for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
