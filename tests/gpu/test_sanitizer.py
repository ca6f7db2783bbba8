"""compute-sanitizer on a program that launches every kernel."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
_RACE = re.compile(
    r"Race reported between (\w+) access at (\S+) in (\S+):\d+\n=+ +and (\w+) access at (\S+) in \S+:\d+"
)


def faults(output: str) -> list[str]:
    """What a sanitizer has found, without writes to shared memory that Triton makes on purpose.

    Where a tensor has fewer elements than a block has threads, some of them hold the same one, and each writes it when
    a layout is changed: the same instruction, address and value.
    """
    lines = [line for line in output.splitlines() if line.startswith("=====")]
    found = [line for line in lines if re.search(r"Error: |Invalid |Uninitialized |Program hit |Barrier error", line)]
    for first, place, file, second, other in _RACE.findall("\n".join(lines)):
        if first == second == "Write" and place == other and file.endswith(".py"):
            found.remove(next(line for line in found if f"access at {place} in" in line))
    return found


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
        [sanitizer, "--tool", tool, *program], env=environment, capture_output=True, text=True, timeout=240
    )
    output = run.stdout + run.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert faults(output) == []
    assert run.returncode == 0, output[-1000:]
    assert "every kernel has run" in output


INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at forward_kernel+0x1130 in triton.py:60
========= ERROR SUMMARY: 1 error
"""
RACE = """========= Error: Race reported between {0} access at {1} in {2}:262
=========     and {3} access at {4} in {2}:293 [71 hazards]
=========
every kernel has run
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("========= COMPUTE-SANITIZER\nevery kernel has run\n========= ERROR SUMMARY: 0 errors\n", 0),
        (INVALID, 1),
        (RACE.format("Write", "dq+0x10", "triton.py", "Write", "dq+0x10"), 0),
        (RACE.format("Write", "dq+0x10", "triton.py", "Write", "dq+0x20"), 1),
        (RACE.format("Write", "dq+0x10", "triton.py", "Read", "dq+0x10"), 1),
        (RACE.format("Write", "f+0x10", "device.cu", "Write", "f+0x10"), 1),
        (INVALID + RACE.format("Write", "dq+0x10", "triton.py", "Write", "dq+0x10"), 1),
    ],
)
def test_what_counts_as_a_fault(output, expected):
    assert len(faults(output)) == expected
