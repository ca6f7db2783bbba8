"""Timing: several contestants in turn, in one process, on the same inputs.

A speed is a ratio in one run. Contestants are interleaved, so that a machine whose speed drifts slows all of them, and
each is reported by its median with the 20th and 80th percentile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile, and how many calls were timed."""

    median: float
    p20: float
    p80: float
    calls: int


def interleave(contestants: dict[str, Callable[[], object]], seconds: float, warmup: int = 2) -> dict[str, Timing]:
    """Call the contestants in turn for about ``seconds``, after ``warmup`` calls of each that don't count."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        for _ in range(warmup):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < 5:
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summarise(values) for name, values in samples.items()}


def _summarise(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5)
    return Timing(statistics.median(values), fifths[0], fifths[3], len(values))


def environment() -> dict[str, Any]:
    """What the figures depend on: processor, threads and versions."""
    packages = ("fastbert", "torch", "transformers", "triton", "openvino", "onnxruntime")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "load_average_at_start": os.getloadavg()[0],
    }


def write(device: str, name: str, data: dict[str, Any]) -> Path:
    """Write ``data`` as JSON to ``benchmarks/results/<device>/<name>.json``."""
    path = RESULTS / device / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return path


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
