"""Hugging Face's common model tests, run on Hugging Face's BERT and on fastbert's: both must give the same outcomes."""

import os
import pathlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hugging_face import sdist

SUITE = pathlib.Path(__file__).with_name("suite.py")
SUITE_TIMEOUT = 1200


def start(package: str, folder: pathlib.Path) -> subprocess.Popen:
    """Start the suite for "stock" or "fastbert" in a copy of Hugging Face's tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # The models are tiny, and the two runs go side by side: more threads would only get into each other's way.
    environment |= {"FASTBERT_SUITE": package, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_bert.py"]
    return subprocess.Popen(
        [*command, f"--junitxml={package}.xml"],
        cwd=folder,
        env=environment,
        stdout=(folder / f"{package}.log").open("w"),
        stderr=subprocess.STDOUT,
    )


def outcomes(report: pathlib.Path) -> dict[str, str]:
    """Each test's outcome: "passed", "skipped", or what went wrong. A test with subtests is as bad as its worst."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [part for part in case if part.tag in ("failure", "error")]
        skipped = any(part.tag == "skipped" for part in case)
        outcome = wrong[0].get("message", "failed") if wrong else "skipped" if skipped else "passed"
        found[f"{case.get('classname')}.{case.get('name')}"] = outcome
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The outcomes of every test, for "stock" and for "fastbert"."""
    try:
        source = sdist.fetch()
    except sdist.UnavailableError as error:
        pytest.skip(f"HUGGING FACE'S OWN TESTS DID NOT RUN: {error}")
    folder = shutil.copytree(source, tmp_path_factory.mktemp("hugging_face") / "source")
    (folder / "tests" / "__init__.py").touch()
    shutil.copy(SUITE, folder / "tests" / "test_bert.py")
    runs = {package: start(package, folder) for package in ("stock", "fastbert")}
    try:
        for run in runs.values():
            run.wait(SUITE_TIMEOUT)
    finally:
        for run in runs.values():
            run.kill()
    for package in runs:
        if not (folder / f"{package}.xml").exists():
            pytest.fail(f"the suite of {package} broke off:\n{(folder / f'{package}.log').read_text()[-4000:]}")
    return {package: outcomes(folder / f"{package}.xml") for package in runs}


@pytest.mark.slow
def test_the_suite_ran(results):
    stock = results["stock"]
    assert results["fastbert"].keys() == stock.keys()
    assert sum(outcome == "passed" for outcome in stock.values()) > len(stock) / 2


@pytest.mark.slow
def test_nothing_fails(results):
    wrong = {name: outcome for name, outcome in results["fastbert"].items() if outcome not in ("passed", "skipped")}
    # What fails with Hugging Face's own classes here (for want of a network, say) is no fault of fastbert's.
    assert not {name: outcome for name, outcome in wrong.items() if results["stock"][name] in ("passed", "skipped")}


@pytest.mark.slow
def test_whatever_stock_passes_passes(results):
    passed = [name for name, outcome in results["stock"].items() if outcome == "passed"]
    assert {name for name in passed if results["fastbert"][name] != "passed"} == set()
