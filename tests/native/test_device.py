"""The source of the CUDA kernels, as it stands, compiled for the host and run there, under the sanitizers of GCC.

``device/cuda_runtime_api.h`` takes the place of CUDA's: each thread of a block is a fiber. What is compared with the
oracle is in ``device/cases.py``, which runs in a process that the address sanitizer has been loaded into first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native import compilers

ROOT = Path(__file__).resolve().parents[2]
DEVICE = Path(__file__).parent / "device"
SOURCES = ("bias_dropout_residual", "bias_dropout_residual_layer_norm")
OPTIONS = (
    *("-std=c++17", "-O0", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"),
    *("-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
    *("-include", "cuda_runtime_api.h"),
)


def build(folder: Path, everything: bool, csrc: Path = ROOT / "csrc") -> Path:
    """The kernels and their caller as a library."""
    compiler = shutil.which("g++")
    if compiler is None:
        compilers.missing("there is no g++, whose sanitizers watch the kernels", everything)
    sources = [csrc / name / "device.cu" for name in SOURCES] + [DEVICE / "kernels.cpp"]
    objects = [folder / f"{number}.o" for number in range(len(sources))]
    command = [compiler, *OPTIONS, f"-I{DEVICE}", f"-I{csrc}", "-x", "c++", "-c"]
    running = [
        subprocess.Popen([*command, source, "-o", target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for source, target in zip(sources, objects, strict=True)
    ]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert "warning" not in output
    library = folder / "device.so"
    subprocess.run([compiler, *OPTIONS[-4:-2], "-shared", *objects, "-o", library], check=True)
    return library


def run(library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``device/cases.py`` with the address sanitizer; memory that it hands out holds NaN."""
    loaded = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255",
        "FASTBERT_DEVICE_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(loaded),
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [sys.executable, "-m", "pytest", "-qsx", "-p", "no:cacheprovider", "--triton", str(DEVICE / "cases.py")]
    command += options
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.fixture(scope="module")
def library(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("device"), request.config.getoption("--everything"))


@pytest.mark.parametrize("everything", [False, True])
def test_without_gcc(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(tuple(compilers.OUTCOMES.values()), match=r"there is no g\+\+, whose sanitizers") as ended:
        build(tmp_path, everything)
    assert ended.type is compilers.OUTCOMES[everything]


@pytest.mark.slow
def test_parity_on_the_host(library):
    result = run(library)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


# What is wrong in a copy of the sources, the cases that see it, and what is said then.
FAULTS = {
    "a barrier is missing": ("common/column_sums.cuh", "  __syncthreads();\n", "", "test_parity", "is off by"),
    "a barrier of several warps is missing": (
        *("bias_dropout_residual_layer_norm/device.cu", "  __syncthreads();\n#pragma unroll\n  for (int i = 0;"),
        *("#pragma unroll\n  for (int i = 0;", "test_parity", "is off by"),
    ),
    "a shuffle takes another lane": (
        *("bias_dropout_residual_layer_norm/device.cu", "values[i], half);", "values[i], half - 1);"),
        *("test_parity", "is off by"),
    ),
    "a store is not masked": (
        *("common/vector.cuh", "if (i < count) to[i] =", "if (i <= count) to[i] ="),
        *("test_parity", "AddressSanitizer: heap-buffer-overflow"),
    ),
    "two programs write to one place": (
        *("bias_dropout_residual/device.cu", "args.scratch[blockIdx.x * args.cols +", "args.scratch[0 * args.cols +"),
        *("test_parity", "is off by"),
    ),
    "an access is not aligned": (
        *("bias_dropout_residual/device.cu", "aligned(args.x) && aligned(args.residual) && aligned(args.out);"),
        *("true;", "test_unaligned_rows", "misaligned address"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path, request):
    if not request.config.getoption("--everything"):
        pytest.skip("`make sanitize` plants faults in the CUDA kernels; it compiles them for each")
    file, old, new, cases, report = FAULTS[fault]
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (csrc / file).read_text("utf-8")
    assert text.count(old) == 1
    (csrc / file).write_text(text.replace(old, new), encoding="utf-8")
    result = run(build(tmp_path, True, csrc), "-k", cases)
    assert result.returncode != 0
    assert report in result.stdout, result.stdout[-3000:]
