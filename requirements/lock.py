"""Renew lock.txt and triton.txt: pins of all that ``make`` installs, at the newest versions that go together.

    python requirements/lock.py torch===2.13.0

Arguments are requirements that hold a package at a version. ``===`` keeps a local build of torch, such as
2.13.0+cpu, from being chosen: its requirements aren't those of the build that most machines install.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCK = Path(__file__).with_name("lock.txt")

TRITON = Path(__file__).with_name("triton.txt")

# torch's builds with CUDA pin these themselves.
_TORCH_PINS = ("cuda-", "nvidia-", "triton")
# flash-attn builds for one torch and one CUDA only.
_EXTRAS_LEFT_OUT = ("flash",)

_HEAD = """\
# Pins of all that `make` installs, its isolated builds included; `make lock` renews them.
# For pip's --constraint and --build-constraint. pyproject.toml says which versions are supported.
"""
_TRITON_HEAD = "# For a torch that brings no Triton of its own; `make lock` renews it.\n"


def requirements(settings: dict[str, Any]) -> list[str]:
    """What the package, its extras and its build ask for, and what installs and builds it."""
    project = settings["project"]
    extras = project["optional-dependencies"]
    chosen = [extras[name] for name in extras if name not in _EXTRAS_LEFT_OUT]
    groups = [project["dependencies"], *chosen, settings["build-system"]["requires"], ["pip"]]
    return sorted({requirement for group in groups for requirement in group})


def resolve(wanted: list[str]) -> dict[str, str]:
    """Versions by name of ``wanted`` and all that they need, as pip would install them here.

    Raises:
        SystemExit: pip can't; the message is pip's own.
    """
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    result = subprocess.run([*pip, *wanted], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"pip can't resolve {', '.join(wanted)}: see above. No file was changed.")
    metadata = [item["metadata"] for item in json.loads(result.stdout)["install"]]
    return {canonicalize_name(one["name"]): Version(one["version"]).public for one in metadata}


def main() -> None:
    """Write both files."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    here = ".".join(map(str, sys.version_info[:2]))
    if settings["project"]["requires-python"] != f">={here}":
        raise SystemExit(
            f"this is Python {here}; pins that fit every supported Python are found with the oldest: "
            f"requires-python is {settings['project']['requires-python']}"
        )
    pins = resolve([*requirements(settings), *sys.argv[1:]])
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items()) if not name.startswith(_TORCH_PINS)]
    (triton,) = settings["project"]["optional-dependencies"]["gpu"]
    version = resolve([triton])["triton"]
    LOCK.write_text(_HEAD + "".join(lines), encoding="utf-8")
    TRITON.write_text(f"{_TRITON_HEAD}triton=={version};{triton.partition(';')[2]}\n", encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)} pins {len(lines)} packages, {TRITON.relative_to(ROOT)} one")


if __name__ == "__main__":
    main()
