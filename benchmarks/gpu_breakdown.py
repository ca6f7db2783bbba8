"""Where a forward or a training step of BERT-base on a GPU spends its time: kernels by name, and the host.

    python -m benchmarks.gpu_breakdown FILE [WORK ...]

For each work: the wall time of a call when the host waits for the device after each, and the time that the host takes
to issue a call. Then, of all works again, for each kernel its launches and microseconds in a call, by PyTorch's
profiler, which slows every launch that comes after it; and what the host does, by function. All of it is written to
FILE, one JSON object a line.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import fastbert

from . import bench_model, shapes
from .shapes import Batch, Model

_BASE = shapes.MODELS["BERT-base"]
_BATCHES = {batch.name: batch for batch in (shapes.full(64, 512), shapes.even(64, 512, 0.5), shapes.full(1, 128))}
WORKS = (
    "inference 64x512-50",
    "inference 64x512",
    "inference 1x128",
    "graph 1x128",
    "training 64x512-50",
    "training 64x512",
)
_CALLS = 5


def _call(work: str, model: Model, batch: Batch) -> Callable[[], object]:
    kind = work.split()[0]
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    if kind == "training":
        stock: Any = transformers.BertForSequenceClassification(model.config())
        made = fastbert.accelerate(stock.to(device, dtype), strict=True)
        return bench_model.training_step(made, batch, model, device)
    stock = transformers.BertModel(model.config()).eval()
    made = fastbert.accelerate(stock.to(device, dtype), strict=True)
    inputs = {name: value.to(device) for name, value in batch.inputs(model.vocabulary).items()}
    if kind == "graph":
        made = fastbert.cuda_graphs(made, batch_sizes=(len(batch.lengths),), lengths=(batch.seqlen,))
    return torch.inference_mode()(lambda: made(**inputs))


def times(call: Callable[[], object]) -> dict[str, Any]:
    """Wall and host milliseconds of a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    wall, host = [], []
    for _ in range(2 * _CALLS):
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
    return {"wall_milliseconds": 1e3 * statistics.median(wall), "host_milliseconds": 1e3 * statistics.median(host)}


def breakdown(call: Callable[[], object]) -> dict[str, Any]:
    """The kernels of a call, and the functions in which the host spends its time."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    kernels = [
        {"kernel": event.key, "launches": event.count / _CALLS, "microseconds": event.self_device_time_total / _CALLS}
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return {
        "kernel_milliseconds": sum(kernel["microseconds"] for kernel in kernels) / 1e3,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["microseconds"]),
        "functions": _functions(call),
    }


def _functions(call: Callable[[], object]) -> list[dict[str, Any]]:
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(_CALLS):
        call()
    profile.disable()
    torch.cuda.synchronize()
    stats: Any = pstats.Stats(profile)
    found = [
        {
            "function": f"{Path(file).parent.name}/{Path(file).name}:{line} {name}",
            "calls": calls / _CALLS,
            "own_microseconds": 1e6 * own / _CALLS,
            "microseconds": 1e6 * whole / _CALLS,
        }
        for (file, line, name), (_, calls, own, whole, _) in stats.stats.items()
    ]
    return sorted(found, key=lambda one: -one["own_microseconds"])[:60]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("works", nargs="*", metavar="WORK", default=WORKS)
    args = parser.parse_args()
    with args.file.open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for work in args.works:
            found = times(_call(work, _BASE, _BATCHES[work.split()[1]]))
            write({"work": work, **found})
            wall, host = found["wall_milliseconds"], found["host_milliseconds"]
            print(f"{work}: wall {wall:.2f} ms, host {host:.2f} ms", flush=True)
            torch.cuda.empty_cache()
        for work in args.works:
            found = breakdown(_call(work, _BASE, _BATCHES[work.split()[1]]))
            write({"work": work, **found})
            print(f"{work}: kernels {found['kernel_milliseconds']:.2f} ms", flush=True)
            for kernel in found["kernels"][:14]:
                print(f"  {kernel['microseconds']:9.1f} us {kernel['launches']:6.1f} x {kernel['kernel'][:90]}")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
