"""Where a forward or a training step of BERT-base on a GPU spends its time: kernels by name, and the host.

    python -m benchmarks.gpu_breakdown FILE [WORK ...]

For each work: the wall time of a call when the host waits for the device after each, and the time that the host takes
to issue a call. Inference is called in turn with Hugging Face's model, as a host that comes from other work is slower.
Then, of all works again, by PyTorch's profiler, which slows every launch that comes after it: when the first kernel
begins, and for each kernel its launches and microseconds in a call; and what the host does, by function. All of it is
written to FILE, one JSON object a line.
"""

from __future__ import annotations

import argparse
import copy
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
_BATCHES = {
    batch.name: batch
    for batch in (shapes.full(64, 512), shapes.even(64, 512, 0.5), shapes.full(8, 128), shapes.full(1, 128))
}
WORKS = (
    "inference 64x512-50",
    "inference 64x512",
    "inference 8x128",
    "inference 1x128",
    "graph 64x512-50",
    "graph 1x128",
    "training 64x512-50",
    "training 64x512",
)
_CALLS = 5


OURS = "fastbert"


def _calls(work: str, model: Model, batch: Batch) -> dict[str, Callable[[], object]]:
    """The call of a work, by the name ``OURS``, and of inference Hugging Face's."""
    kind = work.split()[0]
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    if kind == "training":
        stock: Any = transformers.BertForSequenceClassification(model.config())
        made = fastbert.accelerate(stock.to(device, dtype), strict=True)
        return {OURS: bench_model.training_step(made, batch, model, device)}
    stock = transformers.BertModel(model.config()).eval().to(device, dtype)
    made = fastbert.accelerate(copy.deepcopy(stock), strict=True)
    inputs = {name: value.to(device) for name, value in batch.inputs(model.vocabulary).items()}
    if kind == "graph":
        made = fastbert.cuda_graphs(made, batch_sizes=(len(batch.lengths),), lengths=(batch.seqlen,))
    inference = torch.inference_mode()
    found = {OURS: inference(lambda: made(**inputs))}
    if kind == "inference":
        found["huggingface"] = inference(lambda: stock(**inputs))
    return found


def times(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Wall and host milliseconds of each call, made in turn."""
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(2 * _CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
            torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - start, host))
    return {
        name: {
            "wall_milliseconds": 1e3 * statistics.median(wall for wall, _ in found),
            "host_milliseconds": 1e3 * statistics.median(host for _, host in found),
        }
        for name, found in samples.items()
    }


def beginning(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of a call, of its kernels, and until the first of them begins."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(2):
            torch.cuda.synchronize()
            with torch.profiler.record_function(OURS):
                call()
                torch.cuda.synchronize()
    of_gpu = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() or [] if event.name != OURS or event.device_type != of_gpu]
    last = [event.time_range for event in events if event.name == OURS][-1]
    kernels = [
        event.time_range for event in events if event.device_type == of_gpu and event.time_range.start > last.start
    ]
    return {
        "call_microseconds": last.end - last.start,
        "kernels_microseconds": sum(kernel.end - kernel.start for kernel in kernels),
        "first_kernel_microseconds": min((kernel.start for kernel in kernels), default=last.end) - last.start,
    }


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
            for name, measured in times(_calls(work, _BASE, _BATCHES[work.split()[1]])).items():
                write({"work": work, "by": name, **measured})
                wall, host = measured["wall_milliseconds"], measured["host_milliseconds"]
                print(f"{work}, {name}: wall {wall:.2f} ms, host {host:.2f} ms", flush=True)
            torch.cuda.empty_cache()
        for work in args.works:
            call = _calls(work, _BASE, _BATCHES[work.split()[1]])[OURS]
            found = {**breakdown(call), **beginning(call)}
            write({"work": work, **found})
            begins = found["first_kernel_microseconds"]
            print(f"{work}: kernels {found['kernel_milliseconds']:.2f} ms, from {begins:.0f} us on", flush=True)
            for kernel in found["kernels"][:14]:
                print(f"  {kernel['microseconds']:9.1f} us {kernel['launches']:6.1f} x {kernel['kernel'][:90]}")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
