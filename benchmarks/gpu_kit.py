"""Compiled here for a GPU machine that has minutes: the extension, and a cache of Triton's kernels.

    python -m benchmarks.gpu_kit make FOLDER [--capability 90]    here: FOLDER/_C*.so and FOLDER/triton.tar.xz
    python -m benchmarks.gpu_kit unpack FOLDER CACHE              there: puts both to where they are found
    python -m benchmarks.gpu_kit check CACHE [--capability 90]    counts the kernels that would be compiled again

Making it needs no GPU, but the very Python and Triton of the machine that it is for: they are parts of the cache's
keys. There, ``TRITON_CACHE_DIR`` is set to CACHE. Kernels are compiled by Triton's own launcher under a driver that
stands for the GPU, so their keys are those of a launch. Code for launching them, which Triton has a C compiler make at
the first launch of each, is in the cache too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import kernels, shapes, tune
from .environment import ROOT

_MODULE = "_C*.so"
_ARCHIVE = "triton.tar.xz"

Job = tuple[str, tuple[Any, ...]]


class Stub:
    """What Triton asks a driver of before a launch; nothing is launched."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def build_extension(folder: Path, capability: int) -> Path:
    """``_C`` for this interpreter and one capability."""
    with tempfile.TemporaryDirectory() as site:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        command += [f"--target={site}", "-C", "cmake.define.FASTBERT_CUDA=ON"]
        command += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={capability}-real", str(ROOT)]
        subprocess.run(command, check=True)
        (built,) = Path(site).glob("fastbert/_C*.so")
        return Path(shutil.copy(built, folder))


def jobs() -> list[Job]:
    """What is launched: by the models, by the candidates of the rows that are tuned, and by the parity tests."""
    found: list[Job] = []
    for model, dtype in itertools.product(shapes.MODELS, ("bfloat16", "float32")):
        found += [("model", (model, dtype, op)) for op in kernels.calls_of(shapes.MODELS[model], torch.float32)]
    for index, target in enumerate(tune.targets()):
        if any(target.kernel == kernel and target.shape_class == shape_class for kernel, shape_class in tune.FEW):
            found += [("candidate", (index, place)) for place in range(len(target.candidates))]
    tests = importlib.import_module("gpu.test_device_parity")
    for name, function in inspect.getmembers(tests, inspect.isfunction):
        if name.startswith("test_") and "check(" in inspect.getsource(function):
            found += [("test", (name, place)) for place in range(len(_parameters(function)))]
    return found


def _parameters(function: Any) -> list[dict[str, Any]]:
    """The arguments that pytest would call a test with."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    sets = []
    for mark in marks:
        names, values = mark.args[:2]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        sets.append([dict(zip(names, value if len(names) > 1 else (value,), strict=True)) for value in values])
    return [{name: value for one in chosen for name, value in one.items()} for chosen in itertools.product(*sets)]


def _launch(job: Job) -> None:
    """Make the calls of a job."""
    kind, arguments = job
    meta = torch.device("meta")
    if kind == "model":
        model, dtype, op = arguments
        for call in kernels.calls_of(shapes.MODELS[model], getattr(torch, dtype))[op]:
            call(meta)()
    elif kind == "candidate":
        index, place = arguments
        target = tune.targets()[index]
        with tune.with_options(target, target.candidates[place]):
            for call in target.calls:
                call(meta)()
    else:
        name, place = arguments
        tests = importlib.import_module("gpu.test_device_parity")
        function = getattr(tests, name)
        with mock.patch.object(tests, "check", _launch_problem):
            function(**_parameters(function)[place])


def _launch_problem(make: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Forward and backward of a parity test's problem by every implementation in Triton; the numbers are left as is."""
    from fastbert.backends import select

    problem = make(*args, **kwargs)
    leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
    table, first = select.table(problem.op), next(iter(problem.tensors.values()))
    request = select.Request("cuda", first.dtype, problem.dropout_p, 16)
    able = [row.implementation for row in table.explain(request) if not row.reasons]
    names = [name for name in able if name in ("triton", "cublas_triton", "persistent")]
    with mock.patch.object(select.Table, "choose", lambda self, impl, request: impl):
        for name in names:
            output = problem.actual(**leaves, impl=name)
            torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output), allow_unused=True)


def _work(folder: str, capability: int, check: bool, part: list[Job]) -> tuple[set[str], set[str], list[str]]:
    """(hashes of kernels compiled, of those found in the cache, jobs that failed)."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastbert.backends import select, triton_utils
    from fastbert.ops.linear_gelu import by_shape

    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    knobs.cache.dir = folder
    knobs.compilation.store_binary_only = True
    driver.set_active(Stub(capability))
    compiled: set[str] = set()
    kept: set[str] = set()

    def listen(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        (kept if cache_hit else compiled).add(str(metadata["hash"]))
        if not check:
            _make_launcher(src, metadata)

    knobs.compilation.listener = listen
    original = JITFunction.run
    failed = []
    with (
        mock.patch.object(JITFunction, "run", lambda self, *a, warmup, **k: original(self, *a, warmup=True, **k)),
        mock.patch.object(triton_utils, "capability", return_value=capability),
        mock.patch.object(by_shape, "capability", return_value=capability),
        mock.patch.object(select, "_capability", return_value=capability),
    ):
        for job in part:
            try:
                _launch(job)
            except Exception as error:
                failed.append(f"{job}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return compiled, kept, failed


def _make_launcher(src: Any, metadata: dict[str, Any]) -> None:
    """What Triton's driver would have compiled, put where it looks for it; from Triton 3.8 on it compiles nothing."""
    from triton.backends.nvidia import driver as nvidia

    if not hasattr(nvidia, "make_launcher"):
        return
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    constants = {((src.fn.arg_names.index(i),) if isinstance(i, str) else i): v for i, v in src.constants.items()}
    code = nvidia.make_launcher(constants, dict(src.signature), metadata.get("tensordesc_meta"))
    _put_module(code, "__triton_launcher", get_cache_manager, platform_key())
    _put_module(Path(nvidia.dirname, "driver.c").read_text("utf-8"), "cuda_utils", get_cache_manager, platform_key())


def _put_module(code: str, name: str, manager: Any, platform: str) -> None:
    from triton.backends.nvidia import driver as nvidia

    cache = manager(hashlib.sha256((code + platform).encode()).hexdigest())
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(file) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library, target = Path(folder, "code.c"), Path(folder, "libcuda.so.1"), Path(folder, "module.so")
        source.write_text(code, encoding="utf-8")
        # The driver's library is not here; that it will be needed is all that the linker has to note.
        shared = ["gcc", "-shared", "-fPIC"]
        subprocess.run([*shared, "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", library], check=True)
        includes = [f"-I{path}" for path in (*nvidia.include_dirs, sysconfig.get_paths()["include"])]
        command = [*shared, "-O3", "-Wno-psabi", str(source), "-o", str(target), *includes, f"-L{folder}"]
        subprocess.run([*command, "-Wl,--no-as-needed", "-l:libcuda.so.1"], check=True)
        cache.put(target.read_bytes(), file, binary=True)


def fill(folder: Path, capability: int, check: bool = False) -> tuple[int, int, list[str]]:
    """Compile every job's kernels; (kernels compiled, kernels that were there, jobs that failed)."""
    sys.path.insert(0, str(ROOT / "tests"))
    work = functools.partial(_work, str(folder), capability, check)
    everything = jobs()
    at_once = os.cpu_count() or 1
    parts = [everything[start::at_once] for start in range(at_once)]
    compiled: set[str] = set()
    kept: set[str] = set()
    failed: list[str] = []
    with multiprocessing.get_context("spawn").Pool(at_once) as pool:
        for one, other, errors in pool.imap_unordered(work, parts):
            compiled |= one
            kept |= other
            failed += errors
    return len(compiled), len(kept - compiled), failed


def pack(cache: Path, archive: Path) -> None:
    """An archive of a cache, without the intermediate forms of the kernels."""
    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(cache.rglob("*")):
            if path.suffix in (".json", ".cubin", ".so"):
                tar.add(path, path.relative_to(cache))


def unpack(archive: Path, cache: Path) -> None:
    """Make the cache of an archive. A kernel's files are listed by their paths, which become those of ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    cache = cache.resolve()
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    for path in cache.rglob("__grp__*"):
        group = json.loads(path.read_text("utf-8"))
        files = {name: path.parent / name for name in group["child_paths"]}
        group["child_paths"] = {name: str(file) for name, file in files.items() if file.exists()}
        path.write_text(json.dumps(group), encoding="utf-8")


def _make(folder: Path, capability: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    print(f"built: {build_extension(folder, capability)}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        compiled, _, failed = fill(Path(cache), capability)
        pack(Path(cache), folder / _ARCHIVE)
    for line in failed:
        print("failed:", line)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"{compiled} kernels compiled; {size:.1f} MiB in {folder}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "unpack", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument("--capability", type=int, default=90, choices=kernels.CAPABILITIES)
    args = parser.parse_args()
    if args.what == "make":
        return _make(args.folder, args.capability)
    if args.what == "unpack":
        (module,) = args.folder.glob(_MODULE)
        shutil.copy(module, ROOT / "fastbert")
        unpack(args.folder / _ARCHIVE, args.cache or Path.home() / ".triton" / "cache")
        return 0
    compiled, kept, failed = fill(args.folder.resolve(), args.capability, check=True)
    for line in failed:
        print("failed:", line)
    print(f"{compiled} kernels would be compiled, {kept} are there")
    return 1 if failed or compiled else 0


if __name__ == "__main__":
    sys.exit(main())
