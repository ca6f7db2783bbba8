"""Fixtures that all tests share."""

import dataclasses
import gc
import json
import os
from pathlib import Path

import parity
import pytest
import torch


def pytest_addoption(parser):
    help = "write the outcomes of tests, and the errors of parity checks on a GPU, as each test ends"
    parser.addoption("--parity-json", metavar="FOLDER", help=help)
    help = "no short cuts: all sizes, all kernels compiled, faults planted, races looked for; `make sanitize`"
    parser.addoption("--everything", action="store_true", help=help)
    help = "run Triton's kernels on the CPU, as its compiler makes them for a GPU, with bounds and races checked"
    parser.addoption("--triton", action="store_true", help=help)


def pytest_configure(config):
    if folder := config.getoption("--parity-json"):
        config.pluginmanager.register(Kept(Path(folder)))
    if config.getoption("--triton"):
        from triton_ir import launches  # imports Triton

        launches.install()
    else:
        # The kernels of the host divide their work, also where OMP_NUM_THREADS=1 holds for processes that tests start.
        torch.set_num_threads(2)


class Kept:
    """Appends to files of lines: a run that is stopped has written what it knew."""

    def __init__(self, folder):
        self.folder = folder
        self.worker = os.environ.get("PYTEST_XDIST_WORKER")
        self.written = 0

    def append(self, name, lines):
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def pytest_runtest_logreport(self, report):
        """With several processes, in the one that hears of all of them."""
        if self.worker is None and (report.when == "call" or report.outcome != "passed"):
            reason = ""
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = (str(report.longrepr) if crash is None else crash.message).strip()[:500]
            elif report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.append("outcomes.jsonl", [{**line, "reason": reason}])

    def pytest_runtest_logfinish(self):
        new = parity.RECORDS[self.written :]
        self.written = len(parity.RECORDS)
        self.append(
            f"checks-{self.worker or 'main'}.jsonl",
            [dataclasses.asdict(record) for record in new if record.device == "cuda"],
        )


def pytest_report_header():
    return None if torch.cuda.is_available() else "no CUDA device: tests marked `gpu` are left out"


def pytest_collection_modifyitems(config, items):
    options = config.option
    if not (torch.cuda.is_available() or options.collectonly or options.markexpr):
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if config.getoption("--triton"):
        others = [item for item in items if not item.get_closest_marker("triton")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("triton")]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    # Several processes take a file each, in this order: none is left with a slow one at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    # What is imported by now stays: looking through it for garbage took a fifth of the tests' time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _one_thread():
    """Tiny models spend their time waking threads; where threads matter, a test sets their number itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


one_thread = pytest.fixture(_one_thread, name="one_thread")
one_thread_in_module = pytest.fixture(_one_thread, name="one_thread_in_module", scope="module")


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
