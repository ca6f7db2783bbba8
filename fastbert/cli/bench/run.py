"""Run the suite: pytest on the folder ``benchmarks``, in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fastbert
from fastbert.cli import machine
from fastbert.cli.bench import results
from fastbert.cli.errors import Refusal
from fastbert.cli.options import Device
from fastbert.training.errors import install

_NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
# pytest's exit codes for "all passed", "some failed" and "nothing was collected".
_PASSED, _FAILED, _NOTHING = 0, 1, 5
_COLUMNS = {
    "contestant": 30,
    "ms (p20–p80)": 24,
    "of floor": 8,
    "fastbert is faster by": 21,
    "error / allowed": 17,
    "peak MB": 8,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments; see its ``--help``."""

    quick: bool
    filter: str | None
    device: Device | None
    threads: int | None
    out: Path


def suite() -> Path:
    """The folder of the suite: that of the checkout which this is an editable install of, or the wheel's."""
    package = Path(fastbert.__file__).parent
    folders = (package.parent / "benchmarks", package / "benchmarks")
    found = next((folder for folder in folders if (folder / "harness.py").exists()), None)
    if found is None:
        raise Refusal(f"the suite of benchmarks is in neither of {folders[0]} and {folders[1]}: install fastbert again")
    return found


def run(options: Options) -> bool:
    """Run, print the table, and write the results. Returns whether fastbert passed every parity gate.

    Raises:
        Refusal: pytest isn't installed, no case is left to run, or the suite broke.
    """
    if missing := [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise Refusal(f"the suite runs in pytest, and {', '.join(missing)} isn't installed: {install('bench')}")
    device = machine.choose_device(options.device, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(suite()),
            f"--device={device.type}",
            f"--results={file}",
            "--bar",
        ]
        command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"]
        command += ["-qq", "--no-header", "--benchmark-quiet", "--disable-warnings", "-rN"]
        command += ["--quick"] if options.quick else []
        command += ["-k", options.filter] if options.filter else []
        command += [f"--threads={options.threads}"] if options.threads else []
        # The progress bar is on stderr.
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if ended.returncode == _NOTHING:
            raise Refusal(f"--filter {options.filter!r} leaves nothing to run; it is an expression as of `pytest -k`")
        if not file.exists() or ended.returncode not in (_PASSED, _FAILED):
            raise Refusal(f"the suite broke:\n{ended.stdout}")
        data: dict[str, Any] = json.loads(file.read_text("utf-8"))
    data["partial"] = options.quick or options.filter is not None
    console = machine.console()
    show(console, data)
    name = data["name"] + "-quick" * options.quick + "-filtered" * (options.filter is not None)
    for path in results.write(data, options.out, name):
        console.print(f"written: {path}", soft_wrap=True)
    if ended.returncode == _FAILED:
        console.print(ended.stdout, soft_wrap=True)
    return ended.returncode == _PASSED


def show(console: Console, data: dict[str, Any]) -> None:
    """Print what was measured: a table of the times, and who took no part and why."""
    environment = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    console.print(f"{environment['device']}, {environment['threads']} threads; {versions}; {environment['commit']}")
    for found in data["ceilings"]:
        console.print(
            f"ceilings in {found['dtype']}: product {found['flops'] / 1e12:.2f} TFLOP/s, "
            f"copy {found['bytes'] / 1e9:.1f} GB/s"
        )
    for index, found in enumerate(results.contests(data["rows"]).values()):
        # A table for each contest, of equal widths, so that its name needs no column.
        table = Table(box=None, show_header=index == 0, pad_edge=False)
        for place, (heading, width) in enumerate(_COLUMNS.items()):
            table.add_column(heading, width=width, justify="left" if place == 0 else "right")
        rows = [row for row in found.values() if "reason" not in row]
        for row in rows:
            table.add_row(f"  {row['contestant']}", *_cells(row))
        if rows:
            console.print(results.title(rows[0]), style="bold", highlight=False)
            console.print(table)
    for reason, names in results.absent(data["rows"]).items():
        console.print(f"not run: {', '.join(names)}: {reason}", soft_wrap=True)


def _cells(row: results.Row) -> list[str]:
    error = f"{row['error']:.1e} / {row['allowed']:.1e}" if "error" in row else "not comparable"
    if "milliseconds" not in row:
        return ["fails parity", "", "", error, ""]
    share, factor, peak = row["share_of_floor"], row["fastbert_is_faster_by"], row["memory"]["peak"]
    return [
        results.spread(row["milliseconds"]),
        "" if share is None else f"{share:.0%}",
        "" if factor is None else f"{factor:.2f}×",
        error,
        "" if peak is None else f"{peak / 1e6:.1f}",
    ]
