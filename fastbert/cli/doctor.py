"""``fastbert doctor``: what there is on this machine, what is missing and what to do about it, and whether it works."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import typer
from packaging.version import Version
from rich.console import Console
from rich.table import Table

import fastbert  # registers the ops that select explains
from fastbert._version import DISTRIBUTION
from fastbert.backends import extension, host_linear, prepacked, select
from fastbert.cli import machine, selftest

_TESTED_VERSIONS = Path(fastbert.__file__).with_name("tested_versions.toml")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def run(as_json: bool) -> bool:
    """Print the findings, as tables or as JSON. Returns whether everything that should work here does."""
    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(machine.console(), found)
    healthy: bool = found["healthy"]
    return healthy


def examine() -> dict[str, Any]:
    """All findings, as JSON: ``problems`` should work here and don't, ``advice`` is about what could be better."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    checks = [check for device in devices for check in selftest.run(device)]
    problems = [problem for problem in (extension.missing(),) if problem]
    problems += _extension_on_devices()
    problems += [
        f"self-test of {check.what} in {check.dtype} on {check.device}: {check.failure}"
        for check in checks
        if check.failure
    ]
    loaded = extension.load()
    return {
        "healthy": not problems,
        "problems": problems,
        "advice": _advice(),
        "versions": machine.versions(),
        "tested_versions": tested_versions(),
        "devices": _devices(),
        "extension": {"build": loaded.build_info() if loaded else None, "missing": extension.missing()},
        "prepacked_linears": {_name(dtype): prepacked.missing(dtype) for dtype in selftest.DTYPES},
        "extension_linears": {_name(dtype): host_linear.missing(dtype) for dtype in selftest.DTYPES},
        "implementations": [
            {
                "device": device.type,
                "dtype": _name(dtype),
                "mode": mode,
                "op": row.op,
                "implementation": row.implementation,
                "chosen": row.chosen,
                "reasons": list(row.reasons),
            }
            for device in devices
            for dtype in selftest.DTYPES
            for mode, p in (("inference", 0.0), ("training", selftest.DROPOUT))
            for row in select.explain(select.Request(device.type, dtype, p, selftest.HEAD_SIZE))
        ],
        "self_test": [check._asdict() for check in checks],
    }


def tested_versions() -> dict[str, list[str]]:
    """The versions that fastbert's tests have passed with, by package, in order."""
    return tomllib.loads(_TESTED_VERSIONS.read_text(encoding="utf-8"))


def _devices() -> list[dict[str, Any]]:
    cpu = torch.device("cpu")
    found: list[dict[str, Any]] = [
        {
            "type": "cpu",
            "name": machine.device_name(cpu),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "type": "cuda",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _extension_on_devices() -> list[str]:
    """Why the CUDA kernels that were built can't run on a GPU that is here."""
    if not torch.cuda.is_available() or extension.missing_cuda():
        return []
    reasons = [extension.missing_on_device(index) for index in range(torch.cuda.device_count())]
    return [reason for reason in reasons if reason]


def _untested() -> list[str]:
    """Which installed packages are older or newer than any that the tests have passed with."""
    found = []
    for package, tested in tested_versions().items():
        installed = machine.versions()[package]
        if installed is None:
            continue
        # Without what marks a build or a preview: 2.13.0a0+git is taken for 2.13.0.
        version = Version(Version(installed).base_version)
        if Version(tested[0]) <= version <= Version(tested[-1]):
            continue
        relation = "older" if version < Version(tested[0]) else "newer"
        found.append(
            f"{package} {installed} is {relation} than any that fastbert was tested with ({_range(tested)}): if a call "
            f"fails or results differ, `pip install {package}=={tested[-1]}`, and report it"
        )
    return found


def _strangers() -> list[str]:
    """The other project's package, whose files are in the folder of ours."""
    try:
        version = metadata.version("fastbert")
    except metadata.PackageNotFoundError:
        return []
    return [
        f"the package fastbert {version} is installed; that name is another project's on PyPI, and its files go where "
        f"those of {DISTRIBUTION} are: `pip uninstall fastbert`, then `pip install --force-reinstall --no-deps .` in "
        "fastbert's source tree"
    ]


def _range(tested: Sequence[str]) -> str:
    return tested[0] if len(tested) == 1 else f"{tested[0]} to {tested[-1]}"


def _advice() -> list[str]:
    advice = _strangers() + _untested()
    if torch.cuda.is_available():
        if extension.missing() is None and (reason := extension.missing_cuda()):
            advice.append(reason)
        if machine.versions()["triton"] is None:
            advice.append("Triton is not installed, so GPUs do without its kernels: `pip install triton`")
    elif torch.version.cuda:
        advice.append(f"torch is built for CUDA {torch.version.cuda} and finds no GPU: everything runs on the CPU")
    elif _NVIDIA_DRIVER.exists():
        advice.append(
            f"there is an NVIDIA driver, and torch {torch.__version__} is built without CUDA: to use the GPU, install "
            "a CUDA build of torch, see https://pytorch.org/get-started/locally"
        )
    if reason := prepacked.missing(torch.float32):
        advice.append(f"inference on the CPU runs torch's own products, which are slower: {reason}")
    return advice


def _print(console: Console, found: dict[str, Any]) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    versions = found["versions"].items()
    line("versions:   " + ", ".join(f"{name} {version}" for name, version in versions if version))
    if absent := [name for name, version in versions if not version]:
        line(f"absent:     {', '.join(absent)}")
    tested = found["tested_versions"].items()
    line("tested:     " + ", ".join(f"{package} {_range(versions)}" for package, versions in tested))
    for device in found["devices"]:
        line("device:     " + ", ".join(f"{name} {value}" for name, value in device.items()))
    build = found["extension"]["build"]
    line("extension:  " + (", ".join(f"{k} {v}" for k, v in build.items()) if build else found["extension"]["missing"]))
    for dtype, missing in found["prepacked_linears"].items():
        by_onednn = found["extension_linears"][dtype]
        by = f"oneDNN's products, since {by_onednn}" if by_onednn else "the extension's products"
        line(f"linears:    {dtype} inference on the CPU has " + (missing or f"prepacked weights and {by}"))
    rows = found["implementations"]
    for device in dict.fromkeys(row["device"] for row in rows):
        table = Table(title=f"who computes an op on {device}, by dtype")
        for column in ("op", "implementation", "inference", "training", "why not otherwise"):
            table.add_column(column)
        of_device = [row for row in rows if row["device"] == device]
        for op, implementation in dict.fromkeys((row["op"], row["implementation"]) for row in of_device):
            mine = [row for row in of_device if (row["op"], row["implementation"]) == (op, implementation)]
            table.add_row(op, implementation, _chosen(mine, "inference"), _chosen(mine, "training"), _why_not(mine))
        console.print(table)
    checks = found["self_test"]
    passed = sum(check["failure"] is None for check in checks)
    line(f"self-test:  {passed} of {len(checks)} checks passed: every op forward and backward, and two small models")
    for text in found["advice"]:
        line(f"advice:     {text}")
    for text in found["problems"]:
        line(f"PROBLEM:    {text}")
    line("all is well" if found["healthy"] else "something that should work here doesn't: see above")


def _chosen(rows: Sequence[dict[str, Any]], mode: str) -> str:
    of_mode = [row for row in rows if row["mode"] == mode]
    chosen = [row["dtype"] for row in of_mode if row["chosen"]]
    return "all" if len(chosen) == len(of_mode) else ", ".join(chosen) or "–"


def _why_not(rows: Sequence[dict[str, Any]]) -> str:
    reasons = dict.fromkeys(reason for row in rows for reason in row["reasons"])
    if any(not row["chosen"] and not row["reasons"] for row in rows):
        reasons["another comes first"] = None
    return "; ".join(reasons)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
