"""What figures depend on, and where they are kept."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: the device, its driver and clocks, threads, versions and commit."""
    packages = (
        *("fastbert", "torch", "transformers", "triton", "flash-attn", "liger-kernel", "onnxruntime", "openvino"),
        "pytest-benchmark",
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "kind": device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def slug(facts: dict[str, Any]) -> str:
    """A file's name for an environment: the device, and on a processor how many threads."""
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@.*", " ", facts["device"].lower())
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\bavx2\b|\bavx512f\b|\bavx512_bf16\b", " ", name)).strip("-")
    return name if facts["kind"] == "cuda" else f"{name}-{facts['threads']}-threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, with what tells two of the same name apart."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
    )
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "")]
    return f"{fields.get('model name', platform.machine())} ({', '.join(features)})"


def _gpu(device: torch.device) -> dict[str, str]:
    """Driver and clocks, as nvidia-smi gives them."""
    wanted = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "persistence_mode")
    command = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(zip(wanted, map(str.strip, found.split(",")), strict=True))
    return {}


def _commit() -> str | None:
    """That of the checkout, marked where files differ from it; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
