"""The suite as a plugin of pytest: a file's ``cases`` become tests, one for each contestant, and their rows results.

A file of the suite has ``cases(device)``, the contests, ``build(case)``, which prepares one, and a ``bench_`` function
that asks for the fixture ``contest``. The first contestant of a case runs the whole contest, since its contestants are
timed in turn; each of the others then reports its own row, and hands its times to pytest-benchmark where that is
installed. ``fastbert bench`` runs this with the options below; ``pytest benchmarks`` does, too.
"""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import harness
from .environment import environment, slug
from .suite import Case

_SUITE = pytest.StashKey["Suite"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    group.addoption("--device", choices=("cpu", "cuda"), help="where to run; by default on a GPU if there is one")
    group.addoption("--threads", type=int, help="CPU threads; by default torch's choice")
    group.addoption("--quick", action="store_true", help="the quick cases only, timed for half as long")
    group.addoption("--results", type=Path, metavar="FILE", help="write all rows to FILE, as JSON")
    group.addoption("--bar", action="store_true", help="a progress bar in place of pytest's own report")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[_SUITE] = Suite(torch.device(device), config.getoption("--quick"), config.getoption("--bar"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" not in metafunc.fixturenames:
        return
    suite = metafunc.config.stash[_SUITE]
    chosen = [case for case in metafunc.module.cases(suite.device.type) if case.quick or not suite.quick]
    pairs = [pytest.param((case, name), id=f"{case.name}-{name}") for case in chosen for name in case.contestants]
    metafunc.parametrize("contest", pairs, indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[_SUITE].expect(session.items)


def pytest_runtest_logfinish(nodeid: str) -> None:
    Suite.latest.advance()


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    return (report.outcome, "", "") if config.getoption("--bar") else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    suite = session.config.stash[_SUITE]
    suite.close()
    if file := session.config.getoption("--results"):
        file.write_text(json.dumps(suite.results(), indent=1) + "\n", encoding="utf-8")


class Suite:
    """One run: what is expected of it, the rows it has made, and its progress."""

    latest: Suite

    def __init__(self, device: torch.device, quick: bool, bar: bool) -> None:
        Suite.latest = self
        self.device = device
        self.quick = quick
        self._rows: list[dict[str, Any]] = []
        self._facts = environment(device)
        self._expected: dict[Case, list[str]] = {}
        self._current: tuple[Case, dict[str, dict[str, Any]]] | None = None
        self._bar = self._task = None
        if bar:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))

    def expect(self, items: list[pytest.Item]) -> None:
        """Take note of which contestants of which cases will be asked for."""
        for item in items:
            if (callspec := getattr(item, "callspec", None)) and "contest" in callspec.params:
                case, name = callspec.params["contest"]
                self._expected.setdefault(case, []).append(name)
        if self._bar is not None:
            self._task = self._bar.add_task("", total=len(items))
            self._bar.start()

    def row(self, case: Case, name: str, module: Any) -> dict[str, Any]:
        """The row of a contestant; runs the contest if it hasn't been."""
        if self._current is None or self._current[0] is not case:
            if self._bar is not None:
                self._bar.update(self._task, description=case.name)
            self._current = case, self._run(case, module)
        return self._current[1][name]

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def results(self) -> dict[str, Any]:
        """What is written: the environment, the ceilings and the rows."""
        return {
            "name": slug(self._facts),
            "environment": self._facts,
            "ceilings": [
                {"dtype": str(dtype).removeprefix("torch."), **found}
                for (_, dtype), found in harness.measured_ceilings().items()
            ],
            "rows": [{key: value for key, value in row.items() if key != "samples"} for row in self._rows],
        }

    def _run(self, case: Case, module: Any) -> dict[str, dict[str, Any]]:
        self._current = None
        gc.collect()
        torch.manual_seed(0)
        seconds = case.seconds / 2 if self.quick else case.seconds
        # Not the default stream: a backward pass runs on its forward's, and that one can't be captured.
        stream = torch.cuda.stream(torch.cuda.Stream()) if self.device.type == "cuda" else contextlib.nullcontext()
        with stream:
            rows = harness.run(module.build(case), seconds, self._expected[case])
        rows = [{**case.facts(), **row} for row in rows]
        self._rows += [row for row in rows if row["contestant"] in self._expected[case] or "milliseconds" in row]
        return {row["contestant"]: row for row in rows}


@pytest.fixture
def contest(request: pytest.FixtureRequest) -> None:
    """Run the contest that a test is of, and report the contestant's row."""
    case, name = request.param
    row = request.config.stash[_SUITE].row(case, name, request.module)
    if "reason" in row:
        pytest.skip(row["reason"])
    if row.get("passed") is False:
        told = f"{name}: {row['what']} is off by {row['error']:.3g}, which may be {row['allowed']:.3g}; it got no time"
        if name.startswith(harness.OURS):
            pytest.fail(told, pytrace=False)
        pytest.skip(told)
    if request.config.pluginmanager.hasplugin("benchmark"):
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = case.name
        benchmark.extra_info |= {key: value for key, value in row.items() if key != "samples"}
        if benchmark.enabled:
            # Its own loops time one function at a time.
            recorded = benchmark._make_stats(1)
            for seconds in row["samples"]:
                recorded.update(seconds)
