"""The host kernels under the sanitizers of GCC: addresses, undefined behaviour and, in ``make sanitize``, races.

``host_kernels.cpp`` calls each kernel with memory of exactly the size that it is told. Its OpenMP is ``parallel.cpp``
and its tiles of AMX are ``tiles.h``, so that the sanitizers see what these do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import cmake
import ninja
import pybind11
import pytest
from native import compilers

ROOT = Path(__file__).resolve().parents[2]
ADDRESS, THREAD = "address,undefined", "thread"
KERNELS = ("attention", "callers at once", "encoder_layer", "linear")
# Memory that a kernel takes holds NaN at first, so that a result shows whether it was read before it was written.
OPTIONS = {
    "ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CXX", "CMAKE", "LD_"))}
    return subprocess.run(
        [str(part) for part in command],
        env=environment | OPTIONS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def build(folder: Path, sanitizers: str, everything: bool) -> Path:
    """``host_kernels`` with these sanitizers."""
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    defines = {
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "FASTBERT_CUDA": "OFF",
        "FASTBERT_SANITIZE": sanitizers,
        "Python_EXECUTABLE": sys.executable,
        "SKBUILD_PROJECT_NAME": "fastbert",
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    configured = run(program, "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    if "takes GCC and its OpenMP" in configured.stdout:
        compilers.missing(f"the sanitizers' tests take GCC and its OpenMP: {configured.stdout}", everything)
    assert configured.returncode == 0, configured.stdout
    result = run(program, "--build", folder, "--target", "host_kernels")
    assert result.returncode == 0, result.stdout
    assert "warning" not in result.stdout
    return folder / "host_kernels"


@pytest.fixture(scope="session")
def programs(request, tmp_path_factory):
    """``host_kernels`` by the sanitizers that it is built with: those of addresses, or all in ``make sanitize``."""
    everything = request.config.getoption("--everything")
    return {
        sanitizers: build(tmp_path_factory.mktemp(sanitizers.split(",")[0]), sanitizers, everything)
        for sanitizers in ((ADDRESS, THREAD) if everything else (ADDRESS,))
    }


@pytest.mark.parametrize("everything", [False, True])
def test_without_gcc(everything, tmp_path, monkeypatch):
    told = "CMake Error: FASTBERT_SANITIZE is 'thread', which takes GCC and its OpenMP"
    monkeypatch.setattr(sys.modules[__name__], "run", lambda *command: subprocess.CompletedProcess(command, 1, told))
    with pytest.raises(tuple(compilers.OUTCOMES.values()), match=told) as ended:
        build(tmp_path, THREAD, everything)
    assert ended.type is compilers.OUTCOMES[everything]


def program_for(programs: dict[str, Path], sanitizers: str) -> Path:
    if sanitizers not in programs:
        pytest.skip("`make sanitize` looks for races; it takes two minutes")
    return programs[sanitizers]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", [ADDRESS, THREAD])
def test_host_kernels(programs, sanitizers, request):
    program = program_for(programs, sanitizers)
    result = run(program) if request.config.getoption("--everything") else run(program, "--quick")
    assert result.returncode == 0, result.stdout
    counts = dict(line.rsplit(": ", 1) for line in result.stdout.splitlines())
    element_wise = {"bias_dropout_residual", "bias_dropout_residual_layer_norm"}
    assert element_wise | {"attention_dropout", "checksum"} < counts.keys()
    for instructions in ("AVX2", "AVX512", "AMX"):
        wanted = {f"{kernel}, {instructions}" for kernel in KERNELS if (kernel, instructions) != (KERNELS[1], "AMX")}
        if not wanted & counts.keys():
            warnings.warn(f"the kernels for {instructions} were not run: this processor can't", stacklevel=1)
        else:
            assert wanted <= counts.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "fault", "report"),
    [
        (ADDRESS, "read_past_the_end", "AddressSanitizer: use-after-poison"),
        (ADDRESS, "read_before_the_start", "AddressSanitizer: use-after-poison"),
        (ADDRESS, "masked_read_past_the_end", "AddressSanitizer: SEGV"),
        (ADDRESS, "masked_write_past_the_end", "written next to a buffer"),
        (ADDRESS, "write_to_an_input", "AddressSanitizer: SEGV"),
        (ADDRESS, "read_past_scratch", "AddressSanitizer: heap-buffer-overflow"),
        (ADDRESS, "tile_past_scratch", "AddressSanitizer: heap-buffer-overflow"),
        (ADDRESS, "misaligned", "load of misaligned address"),
        (ADDRESS, "shift", "shift exponent 32 is too large"),
        (ADDRESS, "overflow", "signed integer overflow"),
        (ADDRESS, "bounds", "index 4 out of bounds"),
        (ADDRESS, "allocation", "bytes were allocated inside of an OpenMP region"),
        (THREAD, "race", "ThreadSanitizer: data race"),
    ],
)
def test_faults_are_found(programs, sanitizers, fault, report):
    result = run(program_for(programs, sanitizers), fault)
    assert result.returncode != 0
    assert report in result.stdout
