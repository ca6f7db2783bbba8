"""The lock file pins all that ``make test`` installs."""

import re
import tomllib

from builds import LOCK, ROOT, TRITON
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The first builds for one torch and one CUDA only; torch's builds with CUDA pin the other themselves.
NOT_LOCKED = {"flash-attn", "triton"}


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    """Versions by canonical name; a line that is no plain pin fails."""
    found = {}
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)", line)
            assert pin, f"{line!r} isn't NAME==VERSION, as it may be on every machine"
            found[pin[1]] = pin[2]
    return found


def direct_requirements() -> list[Requirement]:
    """What the package, its extras, its build and the Makefile ask for by name."""
    project = settings()["project"]
    groups = [project["dependencies"], settings()["build-system"]["requires"], ["pip"]]
    groups += project["optional-dependencies"].values()
    found = [Requirement(text) for group in groups for text in group]
    return [r for r in found if canonicalize_name(r.name) not in NOT_LOCKED]


def test_every_direct_requirement_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not pinned: `make lock`"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} isn't {requirement}"


def test_tools_of_the_build_are_pinned():
    assert {"cmake", "ninja", "pybind11", "scikit-build-core", "pip"} <= pins().keys()


def test_what_torch_brings_for_a_gpu_is_not_pinned():
    """It is torch that pins it, otherwise for each build: a pin of ours would make pip refuse the others."""
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_triton_is_pinned_for_a_torch_that_brings_none():
    (line,) = (line for line in TRITON.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    pin = Requirement(line)
    (wanted,) = map(Requirement, settings()["project"]["optional-dependencies"]["gpu"])
    (version,) = pin.specifier
    assert (pin.name, version.operator, pin.marker) == ("triton", "==", wanted.marker)
    assert version.version in wanted.specifier
