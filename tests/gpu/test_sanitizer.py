"""compute-sanitizer on a program that launches every kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_errors_case_45(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not on the PATH")
    program = [sys.executable, str(TESTS / "gpu" / "every_kernel.py")]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    # Within a block of PyTorch's allocator, an access past the end of a tensor would go unseen.
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = run.stdout + run.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this machine's device")
    # What the sanitizer has found comes before the traceback of what that led to.
    found = "\n".join(line for line in output.splitlines() if line.startswith("====="))
    assert run.returncode == 0, f"{found[:3000]}\n{output[-1000:]}"
    assert "every kernel has run" in output
