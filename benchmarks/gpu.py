"""What fifteen minutes of a GPU are for, in steps that each write what they find as they go.

    make gpu                                                  builds the extension first
    python -m benchmarks.gpu [--out FOLDER] [STEP ...]        with an extension that is built

=========  =======================================================================================
parity     the tests that need a GPU, shared out over processes; a test that fails costs nothing else
time       the contests of ``gpu_contests``; a kernel that fails its parity there gets no time
tune       the launch configurations that matter most (``tune``); copies of the tables into FOLDER
breakdown  where whole models spend their time, by kernel and by function of the host (``gpu_breakdown``)
profile    counters of the kernels of ``gpu_profile``, where Nsight Compute is installed
sanitize   compute-sanitizer on every kernel
large      tensors of more than 2**31 elements, alone on the card
=========  =======================================================================================

Without a STEP: parity and time. ``--seconds`` bounds each step; what it has found by then is in FOLDER, from which each
run makes ``benchmarks/results/<device>.json``, in the form that the report reads. On a machine without a GPU all tests
are skipped, nothing is measured, and that is no failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from . import gpu_contests
from .environment import RESULTS, ROOT, environment, slug
from .tune import FEW

STEPS = ("parity", "time", "tune", "breakdown", "profile", "sanitize", "large")
# Folders whose tests need nothing but torch, Triton, transformers and pytest.
TESTS = (
    "tests/gpu",
    "tests/ops",
    "tests/models/test_kernels.py",
    "tests/models/test_encoder_inference.py",
    "tests/models/test_model_inference.py",
)
# These need the card for themselves, or minutes.
APART = "MoreThan2To31 or beyond_2_to_the_31"
SANITIZED = "test_sanitizer"
# Compiling the kernels takes most of the time, and that is the processor's work.
WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))


def _run(command: list[str], seconds: float, log: Path, **environment: str) -> int | None:
    """The exit code of a command, whose output goes to ``log``; None where it was stopped after ``seconds``."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                check=False,
                timeout=seconds,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def _pytest(out: Path, name: str, seconds: float, chosen: str, workers: int) -> None:
    """Run tests; each outcome and each parity check is in ``out / name`` when the test has ended."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu", "-q", "-k", chosen, "-p", "no:cacheprovider"]
    command += [f"--parity-json={folder}", "--durations=10"]
    if importlib.util.find_spec("pytest_timeout"):
        command.append("--timeout=100")
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += [f"--numprocesses={workers}", "--dist=worksteal"]
    start = time.monotonic()
    code = _run(command, seconds, out / f"{name}.log", OMP_NUM_THREADS="1")
    counts, told = _outcomes(folder)
    stopped = f", stopped after {seconds:.0f} s" if code is None else ""
    print(f"{name}: {dict(counts)} in {time.monotonic() - start:.0f} s{stopped}", flush=True)
    for line in told[:40]:
        print(f"  {line}", flush=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; the last may have been cut off."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _outcomes(folder: Path) -> tuple[Counter[str], list[str]]:
    """Counts by outcome, and a line for each test that failed."""
    outcomes = _lines(folder / "outcomes.jsonl")
    told = [f"{one['test']}: {one['reason']}" for one in outcomes if one["outcome"] == "failed"]
    return Counter(one["outcome"] for one in outcomes), told


def nearest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def parity(out: Path, seconds: float) -> None:
    _pytest(out, "parity", seconds, f"not ({APART}) and not {SANITIZED}", WORKERS)


def large(out: Path, seconds: float) -> None:
    _pytest(out, "large", seconds, APART, 1)


def sanitize(out: Path, seconds: float) -> None:
    _pytest(out, "sanitize", seconds, SANITIZED, 2)


def timings(out: Path, seconds: float, name: str = "time", only: str = "") -> None:
    """Run the contests; where one breaks the device, go on with the next in another process."""
    file, end = out / f"{name}.jsonl", time.monotonic() + seconds
    file.unlink(missing_ok=True)
    first = 0
    while (left := end - time.monotonic()) > 15.0:
        command = [sys.executable, "-m", "benchmarks.gpu_contests", str(file), "--first", str(first)]
        # The contest that is under way when the time is up takes some seconds more.
        code = _run([*command, "--seconds", str(left - 12.0), "--only", only], left, out / f"{name}.log")
        lines = _lines(file)
        begun = max((line["number"] for line in lines if "begins" in line), default=None)
        if code in (0, None) or begun is None:
            break
        first = begun + 1
        if not any(line.get("number") == begun and "failed" in line for line in lines):
            case = next(line["begins"] for line in lines if line.get("number") == begun and "begins" in line)
            with file.open("a", encoding="utf-8") as target:
                target.write(json.dumps({"number": begun, "failed": case, "error": f"exit code {code}"}) + "\n")
    found = gpu_contests.results(_lines(file))
    print(f"{name}: {len(found['rows'])} rows, {len(found['failed'])} failed, {len(found['left_out'])} left out")
    for failed in found["failed"]:
        print(f"  {failed['case']}: {failed['error'].splitlines()[-1]}", flush=True)


def tune(out: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    targets = [f"--target={kernel}: {shape_class}" for kernel, shape_class in FEW]
    code = _run([sys.executable, "-m", "benchmarks.tune", *targets], end - time.monotonic(), out / "tune.log")
    for table in ("fastbert/backends/launch.toml", "fastbert/ops/linear_gelu/by_shape.toml"):
        shutil.copy(ROOT / table, out)
    print(f"tune: {'stopped' if code is None else f'exit code {code}'}", flush=True)


def breakdown(out: Path, seconds: float) -> None:
    file, log = out / "breakdown.jsonl", out / "breakdown.log"
    file.unlink(missing_ok=True)
    code = _run([sys.executable, "-m", "benchmarks.gpu_breakdown", str(file)], seconds, log)
    print(f"breakdown: {'stopped' if code is None else f'exit code {code}'}", flush=True)


def profile(out: Path, seconds: float) -> None:
    if shutil.which("ncu") is None:
        print("profile: Nsight Compute (ncu) is not on the PATH")
        return
    end = time.monotonic() + seconds
    from . import gpu_profile

    for name in gpu_profile.CALLS:
        if (left := end - time.monotonic()) < 10.0:
            print(f"profile: no time left for {name}")
            continue
        command = ["ncu", "--clock-control", "none", *gpu_profile.OPTIONS, sys.executable, "-m"]
        code = _run([*command, "benchmarks.gpu_profile", name], left, out / "profile.txt")
        print(f"profile: {name}: exit code {code}", flush=True)


def write(out: Path, results: Path) -> Path | None:
    """Put what the steps have found into the file that is kept; None where there is nothing and no GPU."""
    data = gpu_contests.results(_lines(out / "time.jsonl"))
    if data["environment"] is None:
        if not torch.cuda.is_available():
            return None
        data["environment"] = environment(torch.device("cuda"))
        data["name"] = slug(data["environment"])
    outcomes = [line for name in ("parity", "large", "sanitize") for line in _lines(out / name / "outcomes.jsonl")]
    records = [record for path in sorted(out.glob("*/checks-*.jsonl")) for record in _lines(path)]
    data["partial"] = False
    data["parity"] = {
        "counts": Counter(one["outcome"] for one in outcomes),
        "failed": [one for one in outcomes if one["outcome"] == "failed"],
        "skipped": Counter(one["reason"] for one in outcomes if one["outcome"] == "skipped"),
        "checks": len(records),
        "nearest": nearest(records),
    }
    path = results / f"{data['name']}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> int:
    """Run the steps; the exit code is 1 if a test or a contest failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", default="", help="of time: contests whose names contain this")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"STEP is {', '.join(sorted(unknown))}; it may be {', '.join(STEPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(device or "no GPU: nothing will be measured", flush=True)
    steps = {
        "parity": parity,
        "tune": tune,
        "breakdown": breakdown,
        "profile": profile,
        "sanitize": sanitize,
        "large": large,
    }
    for name in args.steps or ("parity", "time"):
        if device is None and name != "parity":
            print(f"{name}: needs a CUDA device")
        elif name == "time":
            timings(args.out, args.seconds, only=args.only)
        else:
            steps[name](args.out, args.seconds)
    path = write(args.out, RESULTS)
    if path is None:
        return 0
    print(f"written: {path}", flush=True)
    data = json.loads(path.read_text("utf-8"))
    return 1 if data["failed"] or data["parity"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
