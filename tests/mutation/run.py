"""Which changes of the code no test would see: mutants of models/, backends/ and each op's api, and their survivors.

    make mutants ONLY="models/packing ops/unpad" ARGS="--budget 30 --share 0.2"

A first run of the tests notes which of them reach which lines (twenty minutes on two cores; kept in ``--out``). Then
each mutant meets tests that reach its line, up to ``--budget`` seconds of them, those with ``--triton`` too: first what
has killed others nearby, then the quickest. A killed mutant takes a third of a second. Results are kept: a run goes on
where the last one ended, and a larger budget tries survivors again. They are printed with their lines.

``--tests tests/models/test_packing.py`` has the survivors meet all tests of a file, new ones too. After a change of the
code begin anew, with another ``--out``: lines have moved.

A mutant of what importing a module does is run in a process that imports it anew. Tests of the commands, of builds and
of native code see no mutant: they run in processes of their own.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.machinery
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutation import operators

ROOT = operators.ROOT
LEFT_OUT = ("cli", "mutation", "native", "packaging")
# As in the Makefile.
PASSES = {
    "host": ["tests", *(f"--ignore=tests/{folder}" for folder in LEFT_OUT)],
    "triton": [
        "--triton",
        "tests/ops",
        *(f"tests/models/test_{name}.py" for name in ("kernels", "encoder_inference", "model_inference")),
    ],
}
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}


def files(only: list[str]) -> list[str]:
    """Paths of the files to mutate, relative to the root."""
    folder = ROOT / "fastbert"
    found = [*folder.glob("models/*.py"), *folder.glob("backends/*.py"), *folder.glob("ops/*/api.py")]
    names = sorted(str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py")
    return [name for name in names if not only or any(part in name for part in only)]


def run_pytest(options: list[str], **environment: str) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "mutation.plugin", "-p", "no:cacheprovider", "-q", *options]
    return subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **environment}, check=False).returncode


def reach(folder: Path, options: list[str]) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
    """Tests by file and line, and the seconds that each takes; measured unless ``folder`` has it."""
    import coverage

    if not folder.exists():
        folder.mkdir(parents=True)
        parallel = ["--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile"]
        if run_pytest([*parallel, *options], MUTATION_COVERAGE=str(folder)):
            raise SystemExit(f"Tests fail without a mutant, see above. Mend them, and remove {folder}.")
    durations: collections.Counter[str] = collections.Counter()
    for path in folder.glob("durations.*"):
        durations.update(json.loads(path.read_text()))
    lines: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for path in folder.glob("lines.*"):
        data = coverage.CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            for line, tests in data.contexts_by_lineno(file).items():
                lines[str(Path(file).relative_to(ROOT))][line] |= set(tests) - {""}
    return lines, dict(durations)


Kills = dict[str, list[tuple[int, str]]]


def job(
    mutant: operators.Mutant, lines: dict[int, set[str]], durations: dict[str, float], kills: Kills, budget: float
) -> dict[str, Any]:
    """What the plugin is to run."""
    first, last = mutant.statement
    reached = lines.values() if not mutant.in_function else (lines.get(line, set()) for line in range(first, last + 1))
    quick = sorted(set().union(*reached), key=lambda test: durations.get(test, 0.0))
    kinds: dict[str, str] = {}
    for test in quick:
        kinds.setdefault(_kind(test), test)
    # A test that has killed a neighbour is worth more, and a long one less.
    worth: collections.Counter[str] = collections.Counter()
    for line, test in kills.get(mutant.file, ()):
        nearness = 4 / (4 + abs(line - mutant.line))
        worth[test] += 3 * nearness
        worth[_kind(test)] += nearness
    value = {test: (worth[test] + worth[_kind(test)]) / (durations.get(test, 0.0) + 0.03) for test in quick}
    killers = sorted((test for test in quick if value[test]), key=lambda test: -value[test])
    chosen, seconds = [], 0.0
    for test in dict.fromkeys([*killers[: len(killers) // 2], *kinds.values(), *killers, *quick]):
        seconds += durations.get(test, 0.0) + 0.01
        if chosen and seconds > budget:
            break
        chosen.append(test)
    settings = {"budget": budget, "all": len(chosen) == len(quick), "limit": 3 * seconds + 60}
    return {"name": mutant.name, "file": mutant.file, "tests": chosen, **settings}


def _kind(test: str) -> str:
    return test.split("[")[0]


def results(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What was found of each mutant, by its name."""
    found = collections.defaultdict(list)
    if path.exists():
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            found[row["name"]].append(row)
    return found


def killers(known: dict[str, list[dict[str, Any]]]) -> Kills:
    """By file: the lines of killed mutants, and by which test."""
    found: Kills = collections.defaultdict(list)
    for name, rows in known.items():
        file, line, *_ = name.split(":")
        found[file] += [(int(line), row["by"]) for row in rows if row["verdict"] == "killed" and "::" in row["by"]]
    return found


def settled(rows: list[dict[str, Any]], name: str, budget: float) -> bool:
    """Whether a mutant is killed, or survived this pass with such a budget or all tests."""
    tried = [row for row in rows if row["pass"] == name]
    return any(row["verdict"] == "killed" for row in rows) or any(
        row["budget"] >= budget or row["all"] for row in tried
    )


def import_anew(jobs: list[dict[str, Any]], options: list[str], path: Path) -> None:
    """Runs mutants of what a module's import does: forks of a process that has imported all but fastbert."""
    named = sorted({test for job in jobs for test in job["tests"]})
    if run_pytest(["-p", "no:xdist", "--collect-only", *options, *named]):
        raise SystemExit("Tests have other names than when their reach was measured: begin anew, with another --out.")
    for name in ("torch", "transformers.masking_utils", "transformers.models.bert.modeling_bert"):
        importlib.import_module(name)
    from mutation import plugin

    assert not any(name.split(".")[0] == "fastbert" for name in sys.modules)
    mutants = {one.name: one for file in {job["file"] for job in jobs} for one in operators.mutants(file)}

    def child(job: dict[str, Any], answer: int) -> None:
        mutant, get_code = mutants[job["name"]], importlib.machinery.SourceFileLoader.get_code

        def mutated(self: Any, name: str) -> Any:
            return mutant.code() if Path(self.path) == ROOT / mutant.file else get_code(self, name)

        importlib.machinery.SourceFileLoader.get_code = mutated
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *job["tests"]])
        os.write(answer, b"tests that import it anew")
        os._exit(1 if code else 0)

    plugin.run_forks(jobs, child, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants", help="folder of what was found")
    parser.add_argument("--only", nargs="*", action="extend", default=[], help="parts of the paths of files to mutate")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of tests for each mutant")
    parser.add_argument(
        "--share", type=float, default=1.0, help="part of the mutants, chosen at random, same each time"
    )
    parser.add_argument("--tests", nargs="*", default=[], help="files whose tests all survivors are to meet")
    parser.add_argument("--import-anew", choices=PASSES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    out, kept = chosen.out.resolve(), chosen.out.resolve() / "results.jsonl"
    if chosen.import_anew:
        import_anew(json.loads((out / "jobs.json").read_text()), ["--triton"] * (chosen.import_anew == "triton"), kept)
        return
    found = [mutant for file in files(chosen.only) for mutant in operators.mutants(file)]
    random.Random(0).shuffle(found)
    found = found[: round(len(found) * chosen.share)]
    shared = {"MUTATION_JOBS": str(out / "jobs.json"), "MUTATION_RESULTS": str(kept)}
    if chosen.tests:
        known = results(kept)
        alive = [one for one in found if one.in_function and not settled(known[one.name], "", 0.0)]
        settings = {"tests": None, "pass": "chosen", "budget": 0.0, "all": False, "limit": 600}
        (out / "jobs.json").write_text(json.dumps([{"name": one.name, "file": one.file, **settings} for one in alive]))
        run_pytest(["-s", "-p", "no:xdist", *chosen.tests], **shared)
        report(found, results(kept), set())
        return
    unreached = {mutant.name for mutant in found}
    for name, options in PASSES.items():
        lines, durations = reach(out / name, options)
        known = results(kept)
        kills = killers(known)
        jobs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for mutant in found:
            if settled(known[mutant.name], name, chosen.budget):
                unreached.discard(mutant.name)
                continue
            one = job(mutant, lines[mutant.file], durations, kills, chosen.budget)
            if one["tests"]:
                unreached.discard(mutant.name)
                jobs[mutant.in_function].append({**one, "pass": name})
        for in_function, some in jobs.items():
            (out / "jobs.json").write_text(json.dumps(some))
            if some and in_function:
                run_pytest(["-s", "-p", "no:xdist", *options], **shared)
            elif some:
                anew = [sys.executable, "-m", "mutation.run", "--out", out, "--import-anew", name]
                subprocess.run(anew, cwd=ROOT, env=ENVIRONMENT, check=True)
    report(found, results(kept), unreached)


def report(found: list[operators.Mutant], known: dict[str, list[dict[str, Any]]], unreached: set[str]) -> None:
    """Prints every mutant that no test kills, and the score."""
    killed, tried, last = 0, 0, ""
    for mutant in sorted(found, key=lambda one: (one.file, one.number)):
        rows = known[mutant.name]
        tried += bool(rows)
        if any(row["verdict"] == "killed" for row in rows):
            killed += 1
            continue
        if not rows and mutant.name not in unreached:
            continue
        where = f"{mutant.file}:{mutant.line}: {mutant.text}"
        if where != last:
            print(where)
            last = where
        tried_all = any(row["all"] for row in rows)
        state = "" if tried_all else f"in {rows[-1]['budget']:.0f} s of tests" if rows else "no test reaches it"
        print(f"    column {mutant.column}: {mutant.change}  {state}")
    print(f"{killed} of {tried} mutants killed; {len(unreached)} more reached by no test; {len(found)} in all")


if __name__ == "__main__":
    main()
