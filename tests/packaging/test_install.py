"""Builds of every kind, installed in fresh environments and imported outside the source tree."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import ROOT, BuildError, Environment, build_sdist, build_wheel, find_nvcc
from packaging.utils import canonicalize_name

import fastbert
from fastbert._version import DISTRIBUTION

pytestmark = pytest.mark.slow

# Prints what the installed package is, after its extension and its oracle have computed the same thing.
EXAMINE = """
import importlib.metadata, json, pathlib
import torch
import fastbert
from fastbert._version import DISTRIBUTION
from fastbert.backends import extension

x, residual, bias = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
seed = torch.tensor(7)
outputs = [
    fastbert.ops.bias_dropout_residual(x, bias, residual, p=0.3, seed=seed, impl=impl) for impl in ("cpu", "reference")
]
build = extension.module().build_info()
scripts = importlib.metadata.entry_points(group="console_scripts", name="fastbert")
print(json.dumps({
    "file": fastbert.__file__,
    "extension": extension.module().__file__,
    "versions": [fastbert.__version__, importlib.metadata.version(DISTRIBUTION), build["version"]],
    "typed": pathlib.Path(fastbert.__file__).with_name("py.typed").exists(),
    "scripts": [script.value for script in scripts],
    "agrees": torch.equal(*outputs),
    "build": build,
    "missing_cuda": extension.missing_cuda(),
}))
"""

# Prints what the suite of benchmarks makes of one op.
BENCH = """
import json, pathlib
from typer.testing import CliRunner
from fastbert.cli import app
from fastbert.cli.bench import run

result = CliRunner().invoke(app, ["bench", "--quick", "--filter", "bias_gelu-forward", "--out", "out"])
written = sorted(map(str, pathlib.Path("out").glob("*")))
print(json.dumps({
    "suite": str(run.suite()), "exit_code": result.exit_code, "output": result.output, "written": written
}))
"""

# Prints what is left of packages whose extension can't be used, by the folders that they are in. Each is imported by a
# process of its own, which has torch and what fastbert needs of transformers from this one.
EXAMINE_BROKEN = """
import importlib, json, os, sys
import torch
import transformers.modeling_utils
import transformers.models.bert.modeling_bert

def report():
    import fastbert
    from fastbert.backends import extension

    x = torch.ones(2, 8)
    try:
        fastbert.ops.bias_dropout_residual(x, None, x, impl="cpu")
        refusal = None
    except fastbert.UnsupportedError as error:
        refusal = str(error)
    return {
        "file": fastbert.__file__,
        "loaded": extension.load() is not None,
        "missing": extension.missing(),
        "missing_cuda": extension.missing_cuda(),
        "output": fastbert.ops.bias_dropout_residual(x, None, x).tolist(),
        "refusal": refusal,
    }

assert not [name for name in sys.modules if name.startswith("fastbert")]
reports = {}
for folder in sys.argv[1:]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
            found = report()
        except BaseException as error:
            found = {"crash": repr(error)}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = file.read()
    _, status = os.waitpid(child, 0)
    reports[folder] = json.loads(found) if found else {"crash": f"ended with status {status}"}
print(json.dumps(reports))
"""


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def tree(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="session")
def broken_nvcc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = tmp_path_factory.mktemp("broken") / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture(scope="session")
def auto_wheel(tree: Path, broken_nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist where nvcc is broken."""
    env = {"CUDACXX": str(broken_nvcc)}
    return build_wheel(tree, tmp_path_factory.mktemp("auto_wheel"), objects=tree.parent / "objects", env=env)


@pytest.fixture(scope="session")
def host_wheel(tree: Path, auto_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without CUDA kernels, built from the sdist; after the other, which makes objects for both."""
    folder = tmp_path_factory.mktemp("host_wheel")
    return build_wheel(tree, folder, objects=tree.parent / "objects", FASTBERT_CUDA="OFF")


@pytest.fixture(scope="session")
def host_environment(host_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """``host_wheel`` installed; tests leave it as it is."""
    return Environment(tmp_path_factory.mktemp("host_environment") / "venv", host_wheel)


def examine(environment: Environment) -> dict:
    """What an installed wheel reports, after the checks that every wheel must pass."""
    report = environment.run(EXAMINE)
    assert Path(report["file"]).is_relative_to(environment.directory)
    assert Path(report["extension"]).is_relative_to(environment.directory)
    assert report["versions"] == [fastbert.__version__] * 3
    assert report["typed"]
    assert report["scripts"] == ["fastbert.cli:app"]
    assert report["agrees"]
    return report


def test_ordinary_isolated_build(tmp_path: Path) -> None:
    """``pip wheel .``: no torch to build with; with CUDA kernels where there is an nvcc, and no GPU to import them."""
    # Nothing runs the kernels here, so nvcc need not optimise them.
    cuda = {
        "FASTBERT_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": "90",
        "CMAKE_CUDA_FLAGS": "-Xcicc=-O1 -Xptxas=-O0",
    }
    defines = cuda if find_nvcc() else {}
    report = examine(Environment(tmp_path / "venv", build_wheel(ROOT, tmp_path, isolated=True, **defines)))
    assert report["build"]["cuda"] == bool(defines)
    assert report["build"]["cuda_architectures"] == defines.get("CMAKE_CUDA_ARCHITECTURES")
    assert (report["missing_cuda"] is None) == bool(defines)


def test_sdist_holds_what_a_build_and_the_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    sources = {
        "CHANGELOG.md",
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "PKG-INFO",
        "README.md",
        "fastbert/py.typed",
        "pyproject.toml",
        "requirements/lock.txt",
    }
    for folder in ("benchmarks", "csrc", "examples", "fastbert", "requirements", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".py"):
                sources.add(str(path.relative_to(ROOT)))
    assert sources <= {str(file) for file in files}

    tops = {Path(source).parts[0] for source in sources}
    assert {file.parts[0] for file in files} == tops
    assert not [file for file in files if {"figures", "results"} & set(file.parts)]
    assert not [file for file in files if "__pycache__" in file.parts or file.suffix in (".pyc", ".so")]


def test_wheel_from_sdist_without_cuda(host_environment: Environment) -> None:
    report = examine(host_environment)
    assert not report["build"]["cuda"]
    assert "FASTBERT_CUDA was OFF" in report["missing_cuda"]
    assert "FASTBERT_CUDA=ON" in report["missing_cuda"]


def test_wheel_holds_nothing_but_the_package(host_wheel: Path) -> None:
    with zipfile.ZipFile(host_wheel) as archive:
        names = archive.namelist()
    dist_info = f"{canonicalize_name(DISTRIBUTION).replace('-', '_')}-{fastbert.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"fastbert", dist_info}
    suffixes = {Path(name).suffix for name in names if name.startswith("fastbert/")}
    assert suffixes == {".py", ".so", ".toml", ".typed"}
    assert {"fastbert/backends/launch.toml", "fastbert/tested_versions.toml"} <= set(names)
    assert f"{dist_info}/licenses/LICENSE" in names


def test_the_suite_of_benchmarks_runs_from_a_wheel(host_environment: Environment) -> None:
    report = host_environment.run(BENCH)
    assert Path(report["suite"]).is_relative_to(host_environment.directory)
    assert report["exit_code"] == 0, report["output"]
    assert "fastbert is faster by" in report["output"]
    assert len(report["written"]) == 2


def test_cuda_auto_survives_a_broken_nvcc(auto_wheel: Path, broken_nvcc: Path, tmp_path: Path) -> None:
    report = examine(Environment(tmp_path / "venv", auto_wheel))
    assert not report["build"]["cuda"]
    assert f"the CUDA compiler {broken_nvcc} could not compile a test program" in report["missing_cuda"]


def without_nvcc() -> dict[str, str]:
    """A PATH on which there is no nvcc."""
    folders = os.environ["PATH"].split(os.pathsep)
    return {"PATH": os.pathsep.join(folder for folder in folders if shutil.which("nvcc", path=folder) is None)}


@pytest.mark.parametrize(
    ("env", "defines", "reason"),
    [
        (without_nvcc(), {"FASTBERT_NVCC": ""}, "no nvcc was found"),
        ({"CUDACXX": "/nowhere/nvcc"}, {}, "the CUDA compiler /nowhere/nvcc could not compile a test program"),
    ],
    ids=["absent", "broken"],
)
def test_cuda_on_without_nvcc_says_what_to_do(
    sdist: Path, tmp_path: Path, env: dict[str, str], defines: dict[str, str], reason: str
) -> None:
    with pytest.raises(BuildError) as caught:
        build_wheel(sdist, tmp_path, env=env, FASTBERT_CUDA="ON", **defines)
    message = " ".join(str(caught.value).split())
    assert f"FASTBERT_CUDA is ON, but {reason}. Install the CUDA toolkit" in message
    assert "FASTBERT_CUDA=OFF" in message


def test_unknown_cuda_option(sdist: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="FASTBERT_CUDA is 'MAYBE'; it may be AUTO, ON or OFF"):
        build_wheel(sdist, tmp_path, FASTBERT_CUDA="MAYBE")


def truncate(package: Path, extension: Path) -> None:
    extension.write_bytes(extension.read_bytes()[:5000])  # dlopen alone would crash


def truncate_header(package: Path, extension: Path) -> None:
    extension.write_bytes(extension.read_bytes()[:40])


def garble(package: Path, extension: Path) -> None:
    extension.write_text("not a shared library")


def remove(package: Path, extension: Path) -> None:
    extension.unlink()


def replace(package: Path, extension: Path) -> None:
    """Another module under the extension's name."""
    extension.unlink()
    (package / "_C.py").write_text("")


def outdate(package: Path, extension: Path) -> None:
    """The package moves on, and its extension stays what it was."""
    (package / "_version.py").write_text('__version__ = "9.9.9"\n')


DAMAGES = {
    truncate: "is cut off: it has 5000 bytes of at least",
    truncate_header: "could not be loaded (ImportError",
    garble: "could not be loaded (ImportError",
    remove: "could not be loaded (ModuleNotFoundError",
    replace: "could not be loaded (AttributeError",
    outdate: f"was built for fastbert {fastbert.__version__}, and this is 9.9.9",
}


@pytest.fixture(scope="module")
def damaged(
    host_environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> dict[Callable[[Path, Path], None], dict]:
    """What is left of the package, by what is done to it."""
    folders = {damage: tmp_path_factory.mktemp(damage.__name__) for damage in DAMAGES}
    for damage, folder in folders.items():
        package = shutil.copytree(
            host_environment.package, folder / "fastbert", ignore=shutil.ignore_patterns("__pycache__")
        )
        (extension,) = package.glob("_C.*")
        damage(package, extension)
    reports = host_environment.run(EXAMINE_BROKEN, *folders.values())
    return {damage: {"folder": folder, **reports[str(folder)]} for damage, folder in folders.items()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_extension(
    damaged: dict[Callable[[Path, Path], None], dict], damage: Callable[[Path, Path], None]
) -> None:
    """The import works, the reason can be read, the reference serves, and an explicit request is refused."""
    report = damaged[damage]
    assert "crash" not in report
    assert Path(report["file"]).is_relative_to(report["folder"])
    assert not report["loaded"]
    assert DAMAGES[damage] in report["missing"]
    assert "pip install --force-reinstall" in report["missing"]
    assert report["missing_cuda"] == report["missing"]
    assert report["output"] == [[2.0] * 8] * 2
    assert report["missing"] in report["refusal"]
