"""Find the launch configurations of the Triton kernels and write them to fastbert/backends/launch.toml.

    python -m benchmarks.tune                                          on a GPU
    python -m benchmarks.tune --capability 80 --capability 90 ...      without one

A configuration has to compile without spills and within the shared memory of a block, at every shape of its class and
with dropout on and off; where several programs are to stay on a multiprocessor, they have to fit. On a GPU, those that
do are timed, and the fastest is taken. Without one, an entry for the very capability stays if it is valid; otherwise
the first valid candidate takes its place. ``--target``, which may be given several times, restricts the search to one
row, such as "attention_forward: 16 bits, D <= 64, long", or to the rows of a kernel. On a GPU, which route of
linear-GELU is the fastest is measured, too, and written to fastbert/ops/linear_gelu/by_shape.toml. Both files are
written as soon as something is known.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastbert.backends import launch, select, triton_utils
from fastbert.ops.linear_gelu import by_shape

from . import calls, kernels, shapes
from .calls import Call

TABLE = Path(launch.__file__).with_suffix(".toml")
HEADER = "# kernel, shape class, lowest compute capability -> options; see launch.py.\n"
HEADS = 12
# Where an inference and a fine-tuning step spend their time: what is tuned when there are minutes.
FEW = (
    ("attention_forward", "16 bits, D <= 64, long"),
    ("attention_forward", "16 bits, D <= 64, long, dropout"),
    ("attention_backward_dq", "16 bits, D <= 64, long"),
    ("attention_backward_dq", "16 bits, D <= 64, long, dropout"),
    ("attention_backward_dkv", "16 bits, D <= 64, long"),
    ("attention_backward_dkv", "16 bits, D <= 64, long, dropout"),
    ("attention_forward", "16 bits, D <= 64, S <= 128"),
    ("attention_backward", "16 bits, D <= 64, S <= 128"),
    ("linear_gelu_persistent", "16 bits"),
    ("attention_forward", "32 bits, D <= 64, long"),
    ("attention_forward", "32 bits, D <= 64, long, dropout"),
    ("attention_backward_dq", "32 bits, D <= 64, long"),
    ("attention_backward_dq", "32 bits, D <= 64, long, dropout"),
    ("attention_backward_dkv", "32 bits, D <= 64, long"),
    ("attention_backward_dkv", "32 bits, D <= 64, long, dropout"),
)

Options = dict[str, int]


@dataclass(frozen=True)
class Target:
    """One row of the table: its candidates, best guess first, and calls of its op that launch it.

    A call takes a device, makes its tensors there, and returns what is to be timed. Below the capability ``lowest`` the
    kernel doesn't run.
    """

    kernel: str
    shape_class: str
    op: str
    function: str
    candidates: tuple[Options, ...]
    calls: tuple[Call, ...]
    lowest: int = 0


def _tiles(names: tuple[str, ...], *values: tuple[int, ...]) -> tuple[Options, ...]:
    return tuple(dict(zip(names, value, strict=True)) for value in values)


_WHOLE = functools.partial(_tiles, ("num_warps", "num_stages"))
_ATTENTION = functools.partial(_tiles, ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
# With the most registers of a thread: with 128, eight warps fit twice; with 168, four warps fit three times.
_CAPPED = functools.partial(_tiles, ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg"))
_LINEAR = functools.partial(_tiles, ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"))
_PERSISTENT = functools.partial(
    _tiles, ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "PARTS", "PROGRAMS", "DELAY", "num_warps", "num_stages")
)
_ROWS = functools.partial(_tiles, ("ROWS", "num_warps"))
_BLOCKS = functools.partial(_tiles, ("ROWS", "COLUMNS", "num_warps"))
# Of kernels whose programs go on to further rows: also the stages that loads run ahead, and programs a multiprocessor.
_LOOP = functools.partial(_tiles, ("ROWS", "num_warps", "STAGES", "PROGRAMS"))
_GATHER_LOOP = functools.partial(_tiles, ("ROWS", "num_warps", "PROGRAMS"))
_BLOCK_LOOP = functools.partial(_tiles, ("ROWS", "COLUMNS", "num_warps", "STAGES", "PROGRAMS"))

_FORWARD_LONG = {
    16: _CAPPED((128, 64, 8, 3, 128), (64, 64, 4, 3, 168), (128, 64, 8, 2, 128), (64, 64, 4, 3, 128)) + _ATTENTION(
        (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 2), (128, 32, 4, 3),
        (128, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)
    ),
    # Not (64, 16, 8, 2): of what Triton 3.6 makes of it for 9.0, an H200 says that it accesses illegal memory.
    32: _ATTENTION((64, 64, 4, 1), (64, 32, 4, 3), (64, 32, 4, 2), (64, 16, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2),
                   (32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
}  # fmt: skip
# The block that stays is [BLOCK_M] queries for dq and [BLOCK_N] keys for dk and dv.
_BACKWARD_LONG = {
    16: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2),
         (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    # From 64 on wgmma can be used, which takes split operands from shared memory, not from registers.
    32: ((128, 32, 8, 1), (128, 16, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 4, 2), (64, 16, 4, 1),
         (32, 32, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2), (32, 16, 4, 2), (16, 32, 8, 2), (16, 32, 4, 2),
         (16, 16, 4, 2), (16, 16, 8, 2)),
}  # fmt: skip
_DTYPES = {16: torch.bfloat16, 32: torch.float32}


def _attention_targets() -> Iterator[Target]:
    for bits, size in itertools.product(_DTYPES, (32, 64, 128)):

        def of(
            max_seqlen: int,
            backward: bool,
            dropouts: tuple[float, ...] = (0.1, 0.0),
            bits: int = bits,
            size: int = size,
        ) -> tuple[Call, ...]:
            return tuple(
                functools.partial(calls.attention, HEADS, size, _DTYPES[bits], max_seqlen, p, backward)
                for p in dropouts
            )

        name = f"{bits} bits, D <= {size}"
        for keys in (32, 64, 128) if bits == 16 else (32,):
            shape_class = f"{name}, S <= {keys}"
            # From 64 keys on wgmma can be used, which takes four warps at least.
            fewest = {32: 1, 64: 4, 128: 8}[keys] if bits == 16 else 4
            forward = _WHOLE(*((fewest * factor, 1) for factor in (1, 2, 4) if fewest * factor <= 16))
            fewest = max(2, fewest)
            backward = _WHOLE(*((fewest * factor, 1) for factor in (1, 2, 4) if fewest * factor <= 16))
            yield Target("attention_forward", shape_class, "attention", "forward_kernel", forward, of(keys, False))
            yield Target(
                "attention_backward", shape_class, "attention", "backward_short_kernel", backward, of(keys, True)
            )
        for shape_class, p in ((f"{name}, long", 0.0), (f"{name}, long, dropout", 0.1)):
            tiles, calls_of = _FORWARD_LONG[bits], functools.partial(of, 512, dropouts=(p,))
            yield Target("attention_forward", shape_class, "attention", "forward_kernel", tiles, calls_of(False))
            dq = _ATTENTION(*_BACKWARD_LONG[bits])
            if bits == 16:
                dq = _CAPPED((128, 64, 8, 3, 128)) + dq
            dkv = _ATTENTION(*((other, stays, warps, stages) for stays, other, warps, stages in _BACKWARD_LONG[bits]))
            yield Target("attention_backward_dq", shape_class, "attention", "backward_dq_kernel", dq, calls_of(True))
            yield Target("attention_backward_dkv", shape_class, "attention", "backward_dkv_kernel", dkv, calls_of(True))


def _row_targets() -> Iterator[Target]:
    forward_rows = {
        384: _ROWS((2, 1), (1, 1), (4, 4), (8, 4), (4, 2)),
        768: _ROWS((1, 1), (2, 1), (4, 4), (2, 4), (1, 2)),
        1024: _ROWS((1, 2), (1, 1), (2, 2), (1, 4), (2, 4)),
        2048: _ROWS((1, 4), (1, 2), (1, 8)),
        4096: _ROWS((1, 8), (1, 4), (1, 16)),
        8192: _ROWS((1, 16), (1, 8), (1, 32)),
    }
    backward_rows = {
        384: _LOOP((2, 1, 1, 10), (2, 1, 3, 8), (4, 4, 1, 4), (8, 4, 1, 3), (1, 1, 1, 16), (1, 1, 3, 12)),
        768: _LOOP((1, 1, 3, 8), (1, 1, 1, 12), (1, 1, 1, 8), (1, 1, 4, 6), (2, 4, 1, 4), (4, 4, 1, 2), (1, 2, 1, 10)),
        1024: _LOOP((1, 2, 3, 6), (1, 2, 1, 10), (1, 2, 1, 6), (1, 1, 1, 10), (1, 1, 3, 8), (1, 4, 1, 5)),
        2048: _LOOP((1, 4, 3, 4), (1, 4, 1, 5), (1, 8, 1, 4), (1, 2, 1, 5)),
        4096: _LOOP((1, 8, 3, 2), (1, 8, 1, 2), (1, 16, 1, 2), (1, 4, 1, 2)),
        8192: _LOOP((1, 16, 3, 1), (1, 16, 1, 1), (1, 32, 1, 1)),
    }
    gather_rows = {
        384: _GATHER_LOOP((2, 1, 8), (4, 4, 4), (8, 4, 2), (1, 1, 16)),
        768: _GATHER_LOOP((1, 1, 8), (1, 1, 12), (2, 4, 4), (4, 4, 2), (1, 2, 8)),
        1024: _GATHER_LOOP((1, 2, 6), (1, 2, 8), (1, 4, 5), (2, 4, 4)),
        2048: _GATHER_LOOP((1, 4, 4), (1, 8, 4), (1, 2, 4)),
        4096: _GATHER_LOOP((1, 8, 2), (1, 16, 2), (1, 4, 2)),
        8192: _GATHER_LOOP((1, 16, 1), (1, 8, 1), (1, 32, 1)),
    }
    dtypes = tuple(_DTYPES.values())
    for hidden, rows in forward_rows.items():
        name = launch.row_class(hidden)
        for backward, direction in ((False, "forward"), (True, "backward")):
            function = f"{direction}_kernel"
            norm = tuple(functools.partial(calls.layer_norm, hidden, dtype, backward) for dtype in dtypes)
            candidates = backward_rows[hidden] if backward else rows
            yield Target(f"layer_norm_{direction}", name, "layer_norm", function, candidates, norm)
            embedding = tuple(
                functools.partial(calls.embedding, hidden, dtype, p, backward) for dtype in dtypes for p in (0.1, 0.0)
            )
            candidates = gather_rows[hidden] if backward else rows
            yield Target(f"embedding_{direction}", name, "embedding_layer_norm", function, candidates, embedding)
        tables = tuple(functools.partial(calls.embedding, hidden, dtype, 0.0, True) for dtype in dtypes)
        warps = max(1, hidden // 512)
        chunk = _ROWS(*((several, factor * warps) for factor in (1, 2) for several in (4, 8, 2)))
        yield Target("embedding_chunk", name, "embedding_layer_norm", "chunk_kernel", chunk, tables)
        segment = _ROWS((16, 8), (16, 16), (8, 8), (4, 8), (2, 8))
        yield Target("embedding_segment", name, "embedding_layer_norm", "segment_kernel", segment, tables)


def _product_targets() -> Iterator[Target]:
    for backward, direction in ((False, "forward"), (True, "backward")):
        gelu = tuple(
            functools.partial(calls.bias_gelu, columns, dtype, approximate, backward)
            for columns in (1536, 3072, 4096)
            for dtype in _DTYPES.values()
            for approximate in ("none", "tanh")
        )
        blocks = (
            _BLOCK_LOOP(
                (1, 1024, 4, 1, 8), (1, 1024, 4, 3, 8), (1, 512, 2, 1, 16), (2, 1024, 4, 3, 5), (2, 1024, 4, 1, 6),
                (2, 512, 2, 3, 10), (1, 1024, 4, 1, 10), (4, 1024, 4, 1, 4),
            )
            if backward
            else _BLOCKS(
                (2, 1024, 4), (4, 1024, 4), (1, 1024, 4), (2, 512, 2), (4, 512, 4), (2, 1024, 8), (1, 1024, 2)
            )
        )  # fmt: skip
        yield Target(f"bias_gelu_{direction}", "all", "bias_gelu", f"{direction}_kernel", blocks, gelu)
    large = {
        16: _LINEAR(
            (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3), (128, 64, 64, 4, 4),
            (128, 64, 32, 4, 4)
        ),
        32: _LINEAR(
            (128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 64, 16, 4, 3)
        ),
    }  # fmt: skip
    small = {
        16: _LINEAR((64, 64, 64, 4, 4), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (64, 32, 64, 4, 4), (32, 64, 64, 4, 4)),
        32: _LINEAR((64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (32, 32, 32, 4, 3), (64, 64, 16, 4, 3)),
    }
    for bits, dtype in _DTYPES.items():
        for name, candidates, tokens in (("large", large[bits], calls.TOKENS), ("small", small[bits], 64)):
            products = tuple(
                functools.partial(calls.linear_gelu, 4 * hidden, hidden, dtype, tokens, needs_hidden)
                for hidden in (384, 768, 1024)
                for needs_hidden in (True, False)
            )
            yield Target("linear_gelu", f"{bits} bits, {name}", "linear_gelu", "forward_kernel", candidates, products)
    # A step of 64 over k takes the tensor cores of compute capability 9.0 some 512 cycles for a block of 128 x 128.
    blocks = _PERSISTENT(
        (128, 128, 64, 8, 2, 2, 512, 4, 3), (128, 128, 64, 8, 2, 2, 0, 4, 3), (128, 128, 64, 8, 2, 2, 512, 8, 3),
        (128, 128, 64, 8, 4, 2, 512, 4, 3), (128, 128, 64, 16, 2, 2, 512, 4, 3), (128, 256, 64, 8, 4, 1, 0, 8, 4),
        (128, 256, 64, 8, 2, 1, 0, 8, 3),
    )  # fmt: skip
    products = tuple(
        functools.partial(
            calls.linear_gelu, 4 * hidden, hidden, torch.bfloat16, calls.TOKENS, needs_hidden, route="persistent"
        )
        for hidden in (384, 768, 1024)
        for needs_hidden in (True, False)
    )
    yield Target("linear_gelu_persistent", "16 bits", "linear_gelu", "persistent_kernel", blocks, products, lowest=90)


def targets() -> list[Target]:
    """Every row of the table."""
    return [*_attention_targets(), *_product_targets(), *_row_targets()]


def with_options(target: Target, options: Options) -> Any:
    """Make ``target`` launch with ``options``, in place of the table's."""
    original = launch.options

    def patched(kernel: str, shape_class: str) -> Options:
        if (kernel, shape_class) == (target.kernel, target.shape_class):
            return launch.fused(options)
        return original(kernel, shape_class)

    return mock.patch.object(launch, "options", patched)


def _valid(job: tuple[int, Options, int, int]) -> bool:
    """Whether the configuration compiles within the limits of the capability wherever its class is launched."""
    index, options, capability, spills = job
    target = targets()[index]
    with with_options(target, options):
        found = kernels.launches(target.op, target.calls, capability)
    for one in found:
        if one.kernel != target.function:
            continue
        report = kernels.compile_launch(one, capability)
        if report.stack > spills or report.shared > kernels.LIMITS[capability].shared_block:
            return False
        if report.blocks < options.get("PROGRAMS", 1):
            return False
    return True


def _seconds(target: Target, options: Options) -> float:
    """The sum of the medians of the target's calls on the present GPU."""
    from triton.testing import do_bench

    with with_options(target, options):
        return sum(do_bench(call(torch.device("cuda")), return_mode="median") for call in target.calls) / 1000.0


def _time_routes(dtype: torch.dtype, features: int, hidden: int, rows: int, training: bool) -> dict[str, float]:
    """Seconds of each route of linear-GELU on the present GPU."""
    from triton.testing import do_bench

    device = torch.device("cuda")
    rows_of_table = select.table("linear_gelu").explain(select.Request("cuda", dtype))
    routes = [row.implementation for row in rows_of_table if row.implementation in by_shape.ROUTES and not row.reasons]
    made = {route: calls.linear_gelu(features, hidden, dtype, rows, training, device, route) for route in routes}
    return {route: do_bench(call, warmup=10, rep=30, return_mode="median") / 1e3 for route, call in made.items()}


def measure_routes(
    path: Path, capability: int, seconds: Callable[[torch.dtype, int, int, int, bool], dict[str, float]] = _time_routes
) -> None:
    """Time the routes of linear-GELU at the models' shapes and write which was the fastest; keep other capabilities."""
    text = path.read_text(encoding="utf-8")
    entries = [entry for entry in tomllib.loads(text)["measured"] if entry["capability"] != capability]
    classes = [2**power for power in range(17) if by_shape.rows_class(2**power) == 2**power]
    for dtype, shape, training in itertools.product(reversed(kernels.DTYPES), shapes.MODELS.values(), (False, True)):
        N, K, name = shape.intermediate, shape.hidden, str(dtype).removeprefix("torch.")
        faster = {}
        for rows in classes:
            times = seconds(dtype, N, K, rows, training)
            faster[str(rows)] = min(times, key=lambda route: times[route])
            print(f"linear_gelu, {name}, {rows} x {K} -> {N}, training {training}: {times}", flush=True)
        entry = {"capability": capability, "dtype": name, "N": N, "K": K, "training": training, "faster": faster}
        entries.append(entry)
        _write_routes(path, text, entries)


def _write_routes(path: Path, text: str, entries: list[dict[str, Any]]) -> None:
    """Write ``entries`` below the comments of ``text``."""
    lines = [line for line in text.splitlines() if line.startswith("#")]
    for entry in entries:
        routes = ", ".join(f'{rows} = "{route}"' for rows, route in entry["faster"].items())
        lines += ["", "[[measured]]", f"capability = {entry['capability']}", f'dtype = "{entry["dtype"]}"']
        lines += [
            f"N = {entry['N']}",
            f"K = {entry['K']}",
            f"training = {str(entry['training']).lower()}",
            f"faster = {{ {routes} }}",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(table: dict[str, dict[str, dict[str, Options]]]) -> None:
    """Write the whole table, one line for each shape class."""
    lines = [HEADER]
    for kernel, classes in table.items():
        lines.append(f"\n[{kernel}]\n")
        for shape_class, entries in classes.items():
            parts = []
            for capability, options in sorted(entries.items(), key=lambda item: int(item[0])):
                inner = ", ".join(f"{name} = {value}" for name, value in options.items())
                parts.append(f"{capability} = {{ {inner} }}")
            lines.append(f'"{shape_class}" = {{ {", ".join(parts)} }}\n')
    TABLE.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", choices=kernels.CAPABILITIES)
    parser.add_argument("--target", action="append", default=[], metavar="KERNEL[: SHAPE CLASS]")
    parser.add_argument("--spills", type=int, default=0, help="the most bytes that a thread may spill")
    args = parser.parse_args()
    chosen = {
        name: [index for index, one in enumerate(targets()) if name in (one.kernel, f"{one.kernel}: {one.shape_class}")]
        for name in args.target
    }
    if unknown := [name for name, found in chosen.items() if not found]:
        parser.error(f"--target is {unknown[0]!r}; it must be a row of {TABLE.name}, or the kernel of some")
    indices = [index for found in chosen.values() for index in found] or range(len(targets()))
    measured = not args.capability
    if measured and not torch.cuda.is_available():
        parser.error("there is no CUDA device: name a --capability to choose by what compiles")
    capabilities = args.capability or [triton_utils.capability()]
    table = launch.table()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for index in indices:
            target = targets()[index]
            for capability in sorted(one for one in capabilities if one >= target.lowest):
                _choose(table, index, target, capability, measured, pool, args.spills)
                write(table)
    if measured and any(targets()[index].op == "linear_gelu" for index in indices):
        measure_routes(by_shape.MEASURED, capabilities[0])


def _choose(table: Any, index: int, target: Target, capability: int, measured: bool, pool: Any, spills: int) -> None:
    entries = table[target.kernel][target.shape_class]
    present = entries.get(str(capability))
    candidates = list(target.candidates)
    if present is not None:
        candidates = [present, *(x for x in candidates if x != present)]
    jobs = [(index, options, capability, spills) for options in candidates]
    if measured:
        valid = [x for x, fits in zip(candidates, pool.map(_valid, jobs), strict=True) if fits]
        times = {i: _seconds(target, options) for i, options in enumerate(valid)}
        best = valid[min(times, key=lambda i: times[i])] if valid else None
        note = ", ".join(f"{valid[i]}: {1e6 * seconds:.1f} us" for i, seconds in times.items())
    else:
        best, at_once = None, os.cpu_count() or 1
        for start in range(0, len(jobs), at_once):
            fits = pool.map(_valid, jobs[start : start + at_once])
            if any(fits):
                best = candidates[start + fits.index(True)]
                break
        note = "stays" if best == present else f"was {present}"
    print(f"{target.kernel}, {target.shape_class}, {capability}: {best} ({note})", flush=True)
    if best is None:
        return
    lower = [key for key in map(int, entries) if key < capability]
    if lower and entries[str(max(lower))] == best:
        entries.pop(str(capability), None)
    else:
        entries[str(capability)] = best


if __name__ == "__main__":
    main()
