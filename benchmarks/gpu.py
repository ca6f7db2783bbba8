"""Run every test that needs a GPU, print a summary, keep the results; then measure.

    make gpu                     builds the extension first
    python -m benchmarks.gpu     with an extension that is built

The tests are shared out over several processes where pytest-xdist is installed. Writes ``results/gpu.json``: the device
and versions, the counts, and for each quantity and dtype of a test the parity check nearest to its bound. If all of
them pass, the suite of benchmarks follows, which writes a file of results for the device. On a machine without a GPU
all of the tests are skipped; nothing is measured or written, and that is no failure.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .environment import RESULTS, ROOT, environment

SECONDS = 450
# Compiling the kernels takes most of the time, and that is the processor's work.
WORKERS = min(8, (os.cpu_count() or 1) // 2)


def _nearest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all checks of a quantity in a dtype, the one with the largest share of what was allowed."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for record in records:
        test = record["test"].rpartition("::")[2].partition("[")[0]
        share = record["error"] / record["allowed"] if record["allowed"] else float(record["error"] > 0)
        key = (test, record["what"], record["dtype"])
        checks = found[key]["checks"] + 1 if key in found else 1
        if key not in found or share > found[key]["share"]:
            found[key] = {**record, "share": share}
        found[key]["checks"] = checks
    return [found[key] for key in sorted(found)]


def _outcomes(report: Path) -> tuple[Counter[str], list[str], Counter[str]]:
    """Counts by outcome, the names of what failed, and how often each reason for skipping was given."""
    counts: Counter[str] = Counter()
    failed, skipped = [], Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        ended = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        counts["passed" if ended is None else ended.tag] += 1
        if ended is None:
            continue
        if ended.tag == "skipped":
            skipped[str(ended.get("message"))] += 1
        else:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failed, skipped


def main() -> int:
    """Run them; the exit code is 1 if one failed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    with tempfile.TemporaryDirectory() as folder:
        report, parity = Path(folder) / "report.xml", Path(folder) / "parity"
        parity.mkdir()
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--durations=10"]
        if WORKERS > 1 and importlib.util.find_spec("xdist"):
            command += [f"--numprocesses={WORKERS}", "--dist=worksteal"]
        start = time.perf_counter()
        try:
            subprocess.run(
                [*command, f"--junit-xml={report}", f"--parity-json={parity}"], cwd=ROOT, check=False, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"\nthe tests took more than {SECONDS} s and were stopped; nothing has been written")
            return 1
        seconds = time.perf_counter() - start
        counts, failed, skipped = _outcomes(report)
        records = [record for path in sorted(parity.iterdir()) for record in json.loads(path.read_text("utf-8"))]
    print(f"\n{device or 'no GPU'}: {', '.join(f'{number} {outcome}' for outcome, number in counts.items())}")
    for reason, number in skipped.items():
        print(f"skipped {number}: {reason}")
    for name in failed:
        print("failed:", name)
    if device is None:
        print("nothing has been tested: that takes a CUDA device")
        return 1 if failed else 0
    nearest = _nearest(records)
    closest = max(nearest, key=lambda record: record["share"], default=None)
    if closest is not None:
        print(
            f"{len(records)} parity checks; the nearest to its bound is off by {closest['error']:.3g} of "
            f"{closest['allowed']:.3g}: {closest['what']} in {closest['test']}"
        )
    data = {
        "device": device,
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "environment": environment(torch.device("cuda")),
        "seconds": round(seconds),
        "counts": counts,
        "failed": failed,
        "skipped": skipped,
        "parity": nearest,
    }
    path = RESULTS / "gpu.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(ROOT)}", flush=True)
    if failed:
        print("nothing has been measured: the tests come first")
        return 1
    bench = [sys.executable, "-m", "fastbert", "bench", "--device", "cuda", "--out", str(RESULTS)]
    return subprocess.run(bench, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
