"""The contests of fifteen minutes on a GPU: those of the suite that say most, each row written as soon as it is known.

    python -m benchmarks.gpu_contests FILE [--first N] [--seconds S] [--only TEXT]

A contest that raises costs its own rows. One that breaks the device ends the process, with its number in the file;
``benchmarks.gpu`` starts another one with the next. Compiled peers are left out: they take half a minute each.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import harness, peers, shapes, suite
from .environment import ROOT, environment, slug
from .suite import Case

# In the order of what is wanted most, should the time be cut short.
_MODULES = (
    "attention",
    "linear_gelu",
    "model",
    "bias_dropout_residual_layer_norm",
    "layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "bias_dropout_residual",
    "unpad",
)
_COMPILED = (suite.COMPILED, peers.COMPILED, peers.REDUCED)


def contests(device: str) -> list[tuple[ModuleType, Case]]:
    """Cases of the suite with the module that builds each; forward and backward together are their sum, and left out.

    The quick ones first, which are of BERT-base in 16 bits; then by model.
    """
    found = []
    for name in _MODULES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        for case in module.cases(device):
            if not case.work.endswith(" both"):
                names = tuple(one for one in case.contestants if one not in _COMPILED)
                found.append((module, dataclasses.replace(case, contestants=names)))
    models = list(shapes.MODELS.values())
    return sorted(found, key=lambda one: (not one[1].quick, models.index(one[1].model)))


def run(
    made: list[tuple[ModuleType, Case]],
    write: Callable[[dict[str, Any]], None],
    device: torch.device,
    first: int = 0,
    seconds: float = float("inf"),
) -> None:
    """Run ``made`` from number ``first`` on, until ``seconds`` have passed; ``write`` is given every row.

    Raises:
        Exception: of a contest after which the device answers no more.
    """
    end = time.monotonic() + seconds
    told: set[torch.dtype] = set()
    for number, (module, case) in enumerate(made[first:], start=first):
        if time.monotonic() > end:
            write({"number": number, "left_out": case.name})
            continue
        write({"number": number, "begins": case.name})
        try:
            for row in _rows(module, case, device):
                write({"number": number, "row": row})
            for (_, dtype), ceilings in harness.measured_ceilings().items():
                if dtype not in told:
                    told.add(dtype)
                    write({"ceilings": {"dtype": str(dtype).removeprefix("torch."), **ceilings}})
        except Exception as error:
            write({"number": number, "failed": case.name, "error": _told(error)})
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises again where the device is broken


def _rows(module: ModuleType, case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    gc.collect()
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for row in harness.run(module.build(case), case.seconds, case.contestants):
        yield {**case.facts(), **{key: value for key, value in row.items() if key != "samples"}}


def _told(error: Exception) -> str:
    """The error and where it comes from."""
    return "".join(traceback.format_exception(error)[-4:])[-1500:].replace(f"{ROOT}/", "")


def results(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``fastbert bench`` would have written, of the lines of a file."""
    facts = next((line["environment"] for line in lines if "environment" in line), None)
    ceilings = {line["ceilings"]["dtype"]: line["ceilings"] for line in lines if "ceilings" in line}
    return {
        "name": None if facts is None else slug(facts),
        "environment": facts,
        "ceilings": list(ceilings.values()),
        "rows": [line["row"] for line in lines if "row" in line],
        "failed": [{"case": line["failed"], "error": line["error"]} for line in lines if "failed" in line],
        "left_out": [line["left_out"] for line in lines if "left_out" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", default="", help="contests whose names contain this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    made = [one for one in contests("cuda") if args.only in one[1].name]
    # Not the default stream: a backward pass runs on its forward's, and that one can't be captured.
    with args.file.open("a", encoding="utf-8") as file, torch.cuda.stream(torch.cuda.Stream()):

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            if "row" in line:
                _print(line["row"])
            elif "failed" in line:
                print(line["failed"], "FAILED:", line["error"].splitlines()[-1], flush=True)

        device = torch.device("cuda")
        if args.first == 0:
            write({"environment": environment(device)})
        run(made, write, device, args.first, args.seconds)


def _print(row: dict[str, Any]) -> None:
    if "reason" in row:
        return
    name = f"{row['work']} {row['model']} {row['batch']} {row['dtype']} p={row['dropout_p']:g}: {row['contestant']}"
    error = f"{row['error']:.1e}/{row['allowed']:.1e}" if "error" in row else "-"
    if "milliseconds" not in row:
        print(f"{name}: fails parity, {error}", flush=True)
        return
    share = row["share_of_floor"]
    told = "" if share is None else f" {share:.0%} of floor"
    print(f"{name}: {row['milliseconds']['median']:.4f} ms{told} {error}", flush=True)


if __name__ == "__main__":
    main()
