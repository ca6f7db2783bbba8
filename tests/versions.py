"""Tests with the oldest supported and the newest released transformers, torch and Triton: ``make test-versions``.

    python tests/versions.py                         # every end of every package, each in an environment of its own
    python tests/versions.py --only transformers     # those whose name contains this; may be given several times

The oldest are the lower bounds in pyproject.toml, the newest what pip would install today. An environment holds what
differs, in front of the packages of the Python that runs this. What passes is added to fastbert/tested_versions.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-versions"
TESTED = ROOT / "fastbert" / "tested_versions.toml"
PACKAGES = ("torch", "transformers", "triton")
ENDS = ("oldest", "newest")

_HEAD = "# What fastbert's tests have passed with; `make test-versions` adds to it. `fastbert doctor` warns beyond.\n"
_MODELS = (
    "tests/models/test_routes.py",
    "tests/models/test_parity.py",
    "tests/models/test_decoders.py",
    "tests/hugging_face/test_common.py",
)
_KERNELS = ("tests/ops", "tests/models/test_kernels.py")


class UnavailableError(Exception):
    """pip can't say which version there is, or can't install it."""


class Run(NamedTuple):
    """One call of pytest: its arguments, and what the environment has besides."""

    arguments: tuple[str, ...]
    variables: Mapping[str, str]


# What is run at the ends of each package.
RUNS = {
    "torch": (Run((*_MODELS, "tests/ops"), {}),),
    "transformers": (Run(_MODELS, {}),),
    "triton": (Run(("tests/ops/test_compiled.py",), {}), Run(("--triton", *_KERNELS), {"OMP_NUM_THREADS": "1"})),
}


def oldest(package: str) -> str:
    """The lower bound of ``package`` in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["gpu"]])
    (bound,) = next(r.specifier for r in requirements if r.name == package)
    assert bound.operator == ">="
    return bound.version


def newest(package: str) -> str:
    """The version of ``package`` that pip would install in a fresh environment.

    Raises:
        UnavailableError: pip can't say.
    """
    options = ("--dry-run", "--ignore-installed", "--no-deps", "--report", "-")
    report = json.loads(_pip(f"look up the newest {package}", "install", *options, package))
    return report["install"][0]["metadata"]["version"]


class Environment:
    """A virtual environment with a version of one package; all else is where this Python finds it.

    It is kept from one time to the next.

    Raises:
        UnavailableError: pip can't install that version.
    """

    def __init__(self, package: str, version: str) -> None:
        folder = ENVIRONMENTS / f"{package}-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self._python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        # Unlike a plain path, addsitedir reads .pth files: an editable fastbert is found as well.
        others = "; ".join(f"site.addsitedir({path!r})" for path in site.getsitepackages())
        (packages / "others.pth").write_text(f"import site; {others}\n")
        requirement = f"{package}=={version}"
        _pip(f"install {requirement}", "--python", str(self._python), "install", requirement)

    def run(self, *arguments: str, **options: object) -> subprocess.CompletedProcess:
        """Run its Python with ``arguments`` in the source tree; ``options`` are those of ``subprocess.run``."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment.update(options.pop("variables", {}))
        return subprocess.run([str(self._python), *arguments], cwd=ROOT, env=environment, text=True, **options)

    def versions(self) -> dict[str, str]:
        """Versions of what is imported there, of PACKAGES, without a local part."""
        script = "import json, sys, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        found = json.loads(self.run("-c", script, *PACKAGES, stdout=subprocess.PIPE, check=True).stdout)
        return {package: Version(version).public for package, version in found.items()}


def _pip(purpose: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UnavailableError(f"pip can't {purpose}: {result.stderr.strip().rpartition(os.linesep)[2]}")
    return result.stdout


def combinations() -> Iterator[tuple[str, str, str]]:
    """(name, package, end) of each."""
    return ((f"{package}-{end}", package, end) for package in PACKAGES for end in ENDS)


def examine(package: str, end: str) -> dict[str, str]:
    """Run the tests with that end of ``package``. Returns the versions that they have passed with.

    Raises:
        UnavailableError: pip can't install that version.
        subprocess.CalledProcessError: a test fails.
    """
    environment = Environment(package, oldest(package) if end == "oldest" else newest(package))
    versions = environment.versions()
    print(f"== {package}, {end}: " + ", ".join(" ".join(pair) for pair in versions.items()), flush=True)
    for run in RUNS[package]:
        if "tests/hugging_face/test_common.py" in run.arguments:
            # Where it can't be had pytest would skip those tests; here that would pass for success.
            fetch = "import sys; sys.path.insert(0, 'tests'); from hugging_face import sdist; sdist.fetch()"
            environment.run("-c", fetch, check=True)
        environment.run(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", *run.arguments, variables=run.variables, check=True
        )
    # Triton's kernels run in its own runs only.
    return {name: version for name, version in versions.items() if name != "triton" or package == "triton"}


def record(versions: Mapping[str, str], path: Path = TESTED) -> None:
    """Add ``versions`` to those tested, and drop what is no longer supported."""
    tested = tomllib.loads(path.read_text(encoding="utf-8"))
    lines = []
    for package in PACKAGES:
        known = {*tested[package], *([versions[package]] if package in versions else [])}
        kept = sorted((v for v in known if Version(v) >= Version(oldest(package))), key=Version)
        lines.append(f"{package} = {json.dumps(kept)}\n")
    path.write_text(_HEAD + "".join(lines), encoding="utf-8")


def main() -> None:
    """Run what the command line asks for; exit with 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [name for name, _, _ in combinations()]
    parser.add_argument("--only", action="append", metavar="NAME", help=f"part of a name: {', '.join(names)}")
    wanted = parser.parse_args().only or [""]
    for part in wanted:
        if not any(part in name for name in names):
            parser.error(f"--only is {part!r}; it may be a part of {', '.join(names)}")
    failed = []
    for name, package, end in combinations():
        if any(part in name for part in wanted):
            try:
                record(examine(package, end))
            except (UnavailableError, subprocess.CalledProcessError) as error:
                failed.append(f"{name}: {error}")
    if failed:
        raise SystemExit("FAILED " + "\nFAILED ".join(failed))


if __name__ == "__main__":
    main()
