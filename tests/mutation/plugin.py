"""A plugin of pytest for ``mutation.run``: notes which tests reach which lines, or runs mutants in forks.

With MUTATION_COVERAGE, a folder: each process writes there the lines that each test reached, by coverage.py, and how
long the tests took. With MUTATION_JOBS, a file: the process collects the tests once and then forks for every mutant;
the child puts the mutated code into the functions that are there and runs its tests until one fails.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from mutation import operators

COVERAGE = os.environ.get("MUTATION_COVERAGE")
JOBS = os.environ.get("MUTATION_JOBS")
PACKAGE = str(operators.ROOT / "fastbert")

_durations: collections.Counter[str] = collections.Counter()
_failures: list[str] = []
_coverage: Any = None
_set_num_threads = torch.set_num_threads


def pytest_configure(config: pytest.Config) -> None:
    global _coverage
    if COVERAGE:
        import coverage

        folders = [f"{PACKAGE}/{part}" for part in ("models", "backends", "ops")]
        _coverage = coverage.Coverage(data_file=f"{COVERAGE}/lines.{os.getpid()}", source=folders, config_file=False)
        _coverage.start()
    if JOBS:
        # A process that had threads can't fork; the children may have them.
        torch.set_num_threads = lambda count: None
        _set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if _coverage:
        _coverage.switch_context(item.nodeid)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _durations[report.nodeid] += report.duration
    if report.failed:
        _failures.append(report.nodeid)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _coverage:
        _coverage.stop()
        _coverage.save()
        Path(f"{COVERAGE}/durations.{os.getpid()}").write_text(json.dumps(_durations))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if not JOBS:
        return None
    jobs = json.loads(Path(JOBS).read_text())
    items = {item.nodeid: item for item in session.items}
    mutants = {one.name: one for file in {job["file"] for job in jobs} for one in operators.mutants(file)}
    functions: dict[str, list[FunctionType]] = collections.defaultdict(list)
    gc.collect()
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename.startswith(PACKAGE):
            functions[one.__code__.co_filename].append(one)
    gc.freeze()  # or a child's first collection would copy all memory

    def child(job: dict[str, Any], answer: int) -> None:
        torch.set_num_threads = _set_num_threads
        if "--triton" not in sys.argv:
            torch.set_num_threads(2)  # as tests/conftest.py says
        if job["name"] and not apply(mutants[job["name"]], functions):
            os.write(answer, b"unapplied")
            os._exit(2)
        named = items if job["tests"] is None else job["tests"]
        todo = [items[name] for name in named if name in items]
        for item, following in zip(todo, [*todo[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if _failures:
                os.write(answer, _failures[0].encode())
                os._exit(1)
        os._exit(0)

    run_forks(jobs, child, os.environ["MUTATION_RESULTS"])
    return True


def apply(mutant: operators.Mutant, functions: dict[str, list[FunctionType]]) -> bool:
    """Gives the functions that exist the mutant's code; returns whether there was one to give it to."""
    before, after = _by_place(operators.original(mutant.file)), _by_place(mutant.code())
    changed = {}
    for place, codes in before.items():
        others = after.get(place, [])
        if len(codes) == len(others):
            changed.update({(*place, a.co_code): b for a, b in zip(codes, others, strict=True) if a != b})
    given = False
    for function in functions[str(operators.ROOT / mutant.file)]:
        code = function.__code__
        new = changed.get((code.co_qualname, code.co_firstlineno, code.co_code))
        if new and len(new.co_freevars) == len(code.co_freevars):
            function.__code__ = new
            given = True
    return given


def _by_place(code: CodeType) -> dict[tuple[str, int], list[CodeType]]:
    found: dict[tuple[str, int], list[CodeType]] = collections.defaultdict(list)
    pending = [code]
    while pending:
        for one in pending.pop().co_consts:
            if isinstance(one, CodeType):
                found[one.co_qualname, one.co_firstlineno].append(one)
                pending.append(one)
    return found


def run_forks(jobs: list[dict[str, Any]], child: Any, results: str) -> None:
    """Runs ``child(job, pipe)`` in a fork for every job, as many at once as there are cores.

    Appends a line to ``results`` for each: ``killed`` if it ended with 1 (the pipe tells the test) or by itself in any
    other way, or took too long; ``survived`` if with 0; ``unapplied`` if with 2.
    """
    queue = collections.deque(jobs)
    running: dict[int, tuple[dict[str, Any], int, float, str]] = {}
    begun = time.monotonic()
    with open(results, "a", encoding="utf-8") as lines:
        while queue or running:
            while queue and len(running) < (os.cpu_count() or 1):
                job = queue.popleft()
                reader, writer = os.pipe()
                pid = os.fork()
                if not pid:
                    os.setpgid(0, 0)
                    nothing = os.open(os.devnull, os.O_RDWR)
                    for stream in range(3):
                        os.dup2(nothing, stream)
                    try:
                        child(job, writer)
                    except BaseException as error:  # whatever a mutant does, the child must not go on as its parent
                        os.write(writer, repr(error)[:500].encode())
                        os._exit(1)
                os.close(writer)
                running[pid] = (job, reader, time.monotonic(), "")
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid not in running:
                for late, (job, reader, start, _) in list(running.items()):
                    if time.monotonic() - start > job["limit"]:
                        running[late] = (job, reader, start, "took too long")
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(late, signal.SIGKILL)
                time.sleep(0.02)
                continue
            job, reader, start, late_reason = running.pop(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it has started
            with os.fdopen(reader, "rb") as pipe:
                said = os.read(pipe.fileno(), 4000).decode()
            code = os.waitstatus_to_exitcode(status)
            verdict = {0: "survived", 2: "unapplied"}.get(code, "killed")
            why = late_reason or said or (f"ended with {code}" if code else "")
            seconds = round(time.monotonic() - start, 1)
            row = {"name": job["name"], "verdict": verdict, "by": why, "seconds": seconds}
            lines.write(json.dumps({**row, **{key: job[key] for key in ("pass", "budget", "all")}}) + "\n")
            lines.flush()
            if len(queue) % 100 == 0:
                print(f"{len(queue)} left after {time.monotonic() - begun:.0f} s", flush=True)
