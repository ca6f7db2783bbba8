"""What the compilers make of the kernels, without a GPU: registers, spills, shared memory, instructions.

    python -m benchmarks.kernels

Every Triton kernel is compiled ahead of time at each configuration that BERT-base, BERT-large and MiniLM launch, for
compute capabilities 80, 90 and 100, and the machine code is read; so is that of the extension, which must have been
built with CUDA. The launches are those of the ops themselves, called on tensors without memory and recorded in place of
being run. Writes ``results/kernels.json`` and, from it, the table of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastbert.backends import extension
from fastbert.cli.bench import report

from . import calls, shapes
from .calls import Call
from .environment import RESULTS, ROOT, environment

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# The longest sequences: one for each regime of attention.
MAX_SEQLENS = (32, 64, 128, 512)


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor and, in ``shared_block``, of one block of threads; shared memory in bytes.

    From the CUDA C++ programming guide, "Technical Specifications per Compute Capability".
    """

    shared: int
    shared_block: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65_536


LIMITS = {
    80: Limits(shared=164 * 1024, shared_block=163 * 1024),
    90: Limits(shared=228 * 1024, shared_block=227 * 1024),
    100: Limits(shared=228 * 1024, shared_block=227 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One compilation: a kernel, the types of its arguments, what is known of their values, and its options."""

    op: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def dtype(self) -> str:
        """Triton's name of the dtype of its first pointer or descriptor to floating-point numbers, or else of any."""
        found = (
            re.match(rf"(?:\*|tensordesc<)({dtypes})\b", kind)
            for dtypes in ("fp32|fp16|bf16", r"\w+")
            for _, kind in self.signature
        )
        return next(match[1] for match in found if match is not None)

    def describe(self) -> str:
        """The constants that aren't evident from others, in a few words."""
        words = []
        for name, value in self.constants:
            if value is True:
                words.append(name)
            elif name not in ("BLOCK_D", "PRECISION") and value is not None and value is not False:
                words.append(f"{name}={value}")
        return ", ".join(words)


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs, and its instructions by name (``LDG.128``, ``HMMA`` ...)."""

    launch: Launch
    capability: int
    registers: int
    stack: int
    shared: int
    warps: int
    instructions: dict[str, int]

    @property
    def blocks(self) -> int:
        """How many blocks of threads fit on a multiprocessor at once."""
        limits = LIMITS[self.capability]
        # Registers are handed out to warps in units of 256.
        registers = math.ceil(self.registers * 32 / 256) * 256 * self.warps
        shared = self.shared + 1024  # what the system keeps for itself of each block
        return min(limits.blocks, limits.warps // self.warps, limits.registers // registers, limits.shared // shared)

    @property
    def occupancy(self) -> float:
        """The share of the multiprocessor's warps that fit at once."""
        return self.blocks * self.warps / LIMITS[self.capability].warps


def launches(op: str, made: Iterable[Call], capability: int) -> list[Launch]:
    """The distinct launches that calls of an op make on a device of ``capability``."""
    from triton.runtime.jit import JITFunction

    from fastbert.backends import triton_utils

    found: dict[Launch, None] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[launch_of(op, kernel, args, kwargs)] = None

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_utils, "capability", return_value=capability),
    ):
        for call in made:
            call(torch.device("meta"))()
    return list(found)


def launch_of(op: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As Triton's own launcher: None and the number 1 become constants, multiples of 16 are remembered as such."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        kind = "constexpr"
        if isinstance(value, Tensor):
            kind = f"*{_POINTERS[value.dtype]}"
            aligned = value.storage_offset() * value.itemsize % 16 == 0
            if aligned and not parameter.do_not_specialize_on_alignment:
                divisible.append(index)
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            kind = f"tensordesc<{_POINTERS[value.base.dtype]}[{block}]>"
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind = "fp32"
        elif isinstance(value, int) and not parameter.is_constexpr and (parameter.do_not_specialize or value != 1):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(index)
        if kind == "constexpr":
            constants.append((parameter.name, value))
        signature.append((parameter.name, kind))
    module, name = kernel.fn.__module__, kernel.fn.__name__
    return Launch(op, module, name, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(values.items())))


_POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _kernel(launch: Launch) -> Any:
    return getattr(importlib.import_module(launch.module), launch.kernel)


def key_of(launch: Launch, capability: int) -> str:
    """Of what a report depends on: the launch, the capability, the kernel's source with all it calls, and Triton."""
    import triton

    facts = (launch, capability, _kernel(launch).cache_key, triton.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def source_of(kernel: Any, launch: Launch) -> Any:
    """What Triton's compiler takes: a kernel and what is known of its arguments."""
    from triton.compiler import ASTSource

    names = [name for name, _ in launch.signature]
    return ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible},
    )


def compile_launch(launch: Launch, capability: int) -> Report:
    """Compile, and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(_kernel(launch), launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Report(
        launch,
        capability,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=_instructions(code),
    )


def _tool(name: str, *args: str) -> str:
    """What one of the CUDA tools that Triton brings along prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> dict[str, int]:
    """Accesses to global memory by width (LDGSTS copies to shared memory), by TMA and to the stack, and products.

    WARPGROUP are the starts of products by HGMMA and the waits for them.
    """
    counts: Counter[str] = Counter()
    names = "LDG|STG|LDGSTS|LDL|STL|UTMALDG|UTMASTG|HMMA|HGMMA|WARPGROUP|UTCHMMA|FFMA2?"
    for name in re.findall(rf"\b(?:{names})\b(?:\.\w+)*", code):
        stem, *modifiers = name.split(".")
        if stem in ("LDG", "STG", "LDGSTS"):
            width = next((m for m in modifiers if m in ("64", "128", "256", "U8", "U16", "S8", "S16")), "32")
            stem = f"{stem}.{width}"
        counts[stem] += 1
    return dict(counts)


def calls_of(shape: shapes.Model, dtype: torch.dtype, capability: int = CAPABILITIES[-1]) -> dict[str, list[Call]]:
    """The calls that a model makes, by op; linear-GELU with many rows and with few, by each kernel there is."""
    hidden, directions, dropouts = shape.hidden, (False, True), (0.0, 0.1)
    size = shape.head_size
    return {
        "attention": [
            functools.partial(calls.attention, shape.heads, size, dtype, max_seqlen, p, backward)
            for max_seqlen in MAX_SEQLENS
            for p in dropouts
            for backward in directions
        ],
        "layer_norm": [functools.partial(calls.layer_norm, hidden, dtype, backward) for backward in directions],
        "bias_gelu": [
            functools.partial(
                calls.bias_gelu, shape.intermediate, dtype, approximate, backward, with_output=with_output
            )
            for approximate in ("none", "tanh")
            for backward, with_output in ((False, False), (True, False), (True, True))
        ],
        "linear_gelu": [
            functools.partial(calls.linear_gelu, shape.intermediate, hidden, dtype, tokens, needs_hidden, route=route)
            for route in ("triton", "persistent")
            if route == "triton" or (capability >= 90 and dtype != torch.float32)
            for tokens in (calls.TOKENS, 100)
            for needs_hidden in (False, True)
        ],
        "embedding_layer_norm": [
            functools.partial(calls.embedding, hidden, dtype, p, backward) for p in dropouts for backward in directions
        ],
        "unpad": [
            functools.partial(calls.unpad, mask, seqlen, with_ids)
            for mask in (torch.int64, torch.bool)
            for seqlen in (128, 512)
            for with_ids in (False, True)
        ],
    }


def all_launches(capability: int) -> list[Launch]:
    """Those of every op, at the shapes of the models."""
    found: dict[Launch, None] = {}
    for shape in shapes.MODELS.values():
        for dtype in DTYPES:
            for op, made in calls_of(shape, dtype, capability).items():
                found |= dict.fromkeys(launches(op, made, capability))
    return list(found)


def _compile(job: tuple[Launch, int]) -> Report:
    return compile_launch(*job)


def reports(jobs: list[tuple[Launch, int]]) -> list[Report]:
    """Compile launches for capabilities, on all cores."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return pool.map(_compile, jobs, chunksize=1)


@dataclass(frozen=True)
class ExtensionReport:
    """What a kernel of ``csrc/`` needs. ``vector``: its rows allow 16-byte accesses; ``groups``: of 8 for a thread."""

    op: str
    kernel: str
    dtype: str
    vector: bool
    groups: int | None
    capability: int
    registers: int
    stack: int
    instructions: dict[str, int]


def extension_reports(library: Path, capability: int) -> list[ExtensionReport]:
    """Read the kernels of a built ``fastbert._C``; none where it was built without CUDA or not for ``capability``."""
    architecture = f"sm_{capability}"
    usage = _tool("cuobjdump", "--dump-resource-usage", "--gpu-architecture", architecture, str(library))
    code = _tool("cuobjdump", "--dump-sass", "--gpu-architecture", architecture, str(library))
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\t\tFunction : |\Z)", code, flags=re.DOTALL))
    found = []
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        # As the compiler mangles fastbert::<op>::(anonymous)::<kernel><dtype, vector, groups>.
        parts = re.match(r"_ZN8fastbert\d+([a-z_]+?)\d+_GLOBAL__N__.*?\d\d([a-z_]+_kernel)I(.*?)EEv", name)
        assert parts is not None, name
        arguments = parts[3] + "E"
        groups = re.search(r"Li(\d+)E", arguments)
        found.append(
            ExtensionReport(
                op=parts[1],
                kernel=parts[2],
                dtype={"Half": "fp16", "BFloat16": "bf16"}.get(
                    "".join(re.findall(r"Half|BFloat16", arguments)), "fp32"
                ),
                vector="Lb1E" in arguments,
                groups=int(groups[1]) if groups else None,
                capability=capability,
                registers=int(registers),
                stack=int(stack),
                instructions=_instructions(functions[name]),
            )
        )
    return found


def known_reports(jobs: Iterable[tuple[Launch, int]]) -> dict[tuple[Launch, int], Report]:
    """Those that ``results/kernels.json`` has, made of the same sources by the same Triton."""
    rows = {row["key"]: row for row in json.loads((RESULTS / "kernels.json").read_text("utf-8"))["kernels"]}
    found = {}
    for launch, capability in jobs:
        row = rows.get(key_of(launch, capability))
        if row is not None:
            numbers = {name: row[name] for name in ("registers", "stack", "shared", "warps", "instructions")}
            found[launch, capability] = Report(launch, capability, **numbers)
    return found


def _row(report: Report) -> dict[str, Any]:
    launch = report.launch
    return {
        "key": key_of(launch, report.capability),
        "op": launch.op,
        "kernel": launch.kernel,
        "dtype": launch.dtype,
        "what": launch.describe(),
        "options": dict(launch.options),
        "capability": report.capability,
        "registers": report.registers,
        "stack": report.stack,
        "shared": report.shared,
        "warps": report.warps,
        "occupancy": report.occupancy,
        "instructions": report.instructions,
    }


def main() -> None:
    """Compile everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    jobs = [(launch, capability) for capability in CAPABILITIES for launch in all_launches(capability)]
    print(f"compiling {len(jobs)} kernels", flush=True)
    rows = [_row(report) for report in reports(jobs)]
    if reason := extension.missing_cuda():
        raise SystemExit(f"the CUDA kernels of the extension can't be read: {reason}")
    library = Path(str(extension.module().__file__))
    extension_rows = [
        dataclasses.asdict(report) for capability in CAPABILITIES for report in extension_reports(library, capability)
    ]
    data = {"environment": environment(torch.device("cpu")), "kernels": rows, "extension": extension_rows}
    (RESULTS / "kernels.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    report.run(RESULTS, ROOT, check=False)


if __name__ == "__main__":
    main()
