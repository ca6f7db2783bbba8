"""What each target of the Makefile would install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import ROOT


def dry_run(target: str, first_on_path: Path | None = None) -> list[str]:
    """The commands that ``make`` would run in a fresh tree."""
    path = os.environ["PATH"] if first_on_path is None else f"{first_on_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    make = shutil.which("make")
    assert make
    result = subprocess.run(
        [make, "--dry-run", "--always-make", "--directory", str(ROOT), target],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench"])
def test_make_installs_with_the_lock(target):
    installs = [line for line in dry_run(target) if "pip install" in line]
    assert installs
    for line in installs:
        assert "--constraint requirements/lock.txt" in line
        # The pip that a new environment comes with may not know the other option.
        assert "--build-constraint requirements/lock.txt" in line or line.endswith("--upgrade pip")


def nvidia_smi(folder: Path, exit_code: int) -> Path:
    """``folder`` with an nvidia-smi that succeeds or fails, as where there is a GPU or there is none."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    program.chmod(0o755)
    return folder


def package_install(target: str, first_on_path: Path) -> str:
    (line,) = (line for line in dry_run(target, first_on_path) if "--editable" in line)
    return line


def test_the_demo_installs_what_it_needs(tmp_path):
    line = package_install("demo", nvidia_smi(tmp_path, 1))
    assert line.endswith('--editable ".[demo]"')


def test_the_demo_compiles_cuda_code_only_for_a_gpu(tmp_path):
    line = package_install("demo", nvidia_smi(tmp_path, 1))
    assert "-C cmake.define.FASTBERT_CUDA=OFF" in line
    line = package_install("demo", nvidia_smi(tmp_path, 0))
    assert "FASTBERT_CUDA" not in line
    assert "-C cmake.define.CMAKE_CUDA_ARCHITECTURES=native" in line


@pytest.mark.parametrize("target", ["test", "bench"])
def test_triton_comes_with_torch_or_else_from_its_pin(target):
    lines = dry_run(target)
    torch = next(index for index, line in enumerate(lines) if line.endswith("requirements/lock.txt torch"))
    assert lines[torch + 1].startswith(".venv/bin/python -m pip show torch | grep -q '^Requires:.*triton' || ")
    assert lines[torch + 1].endswith("--requirement requirements/triton.txt")
    assert torch + 1 < next(index for index, line in enumerate(lines) if "--editable" in line)


@pytest.mark.parametrize("exit_code", [0, 1])
def test_tests_have_the_cuda_code_of_every_gpu(tmp_path, exit_code):
    assert "cmake.define" not in package_install("test", nvidia_smi(tmp_path, exit_code))
