"""Builds of the source tree, and fresh virtual environments to install them in."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "lock.txt"
TRITON = ROOT / "requirements" / "triton.txt"


class BuildError(Exception):
    """A build failed; the message is all that it printed."""


def find_nvcc() -> str | None:
    """The nvcc that a build finds, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CUDA"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        raise BuildError(result.stdout)
    return result.stdout


def build_sdist(directory: Path) -> Path:
    """Build the source distribution of the source tree in ``directory``."""
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", directory, ROOT, cwd=directory)
    (sdist,) = directory.glob("*.tar.gz")
    return sdist


def build_wheel(
    source: Path,
    directory: Path,
    *,
    isolated: bool = False,
    objects: Path | None = None,
    env: dict[str, str] | None = None,
    **defines: str,
) -> Path:
    """Build a wheel of ``source`` (a tree or an sdist) in ``directory``, with CMake's ``defines``.

    Builds of the same tree with the same ``objects`` compile what differs between them.
    """
    options = ["--build-constraint", str(LOCK)] if isolated else ["--no-build-isolation"]
    if objects:
        options += ["-C", f"build-dir={objects}"]
    for name, value in defines.items():
        options += ["-C", f"cmake.define.{name}={value}"]
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--verbose", "--wheel-dir", str(directory)]
    _run(*pip, *options, source, cwd=directory, env=env)
    (wheel,) = directory.glob("*.whl")
    return wheel


class Environment:
    """A new virtual environment with ``wheel`` installed, which finds everything else where this Python finds it.

    The other packages are on its path, but their .pth files are not read: an editable fastbert stays out of sight.
    """

    def __init__(self, directory: Path, wheel: Path) -> None:
        self.directory = directory
        _run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent)
        self._python = directory / "bin" / "python"
        (self.site_packages,) = directory.glob("lib/python*/site-packages")
        (self.site_packages / "others.pth").write_text("\n".join(site.getsitepackages()))
        pip = [sys.executable, "-m", "pip", "--python", str(self._python), "install", "--no-deps", "--no-index"]
        _run(*pip, wheel, cwd=directory)

    @property
    def package(self) -> Path:
        """The folder of the installed package."""
        return self.site_packages / "fastbert"

    def run(self, script: str, *arguments: str | Path) -> Any:
        """What ``script`` prints, read as JSON; it runs outside the source tree."""
        command = [self._python, "-I", "-c", script, *arguments]
        output = _run(*command, cwd=self.directory, env={"CUDA_VISIBLE_DEVICES": ""})
        return json.loads(output.splitlines()[-1])
