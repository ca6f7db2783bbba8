"""Contests: several ways to compute the same thing, in one process, on the same inputs; first right, then timed.

A speed is a ratio in one run. The contestants of a contest are called in turn, so that a machine whose speed drifts
slows all of them, and each is reported by its median with the 20th and 80th percentile. What fails the parity gate is
not timed. Beside every time stand its error, its floor and its memory.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.backends import host_linear, onednn

from .memory import memory

# The contestant that everything else is compared with has this name, or one that begins with it and a space.
OURS = "fastbert"
_FEWEST_ROUNDS = 5
_WARM_UP = 2
# A call of so many seconds on a processor needs no more warming up than the gate and the count of its memory.
_SLOW = 0.2


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to compute what a contest is about.

    ``call`` is timed; in a graph, unless it isn't ``capturable``. ``judged`` gives the tensors that the parity gate
    compares with the contest's ``exact``, under the same names; None for those that nothing can be compared with, as
    their dropout masks are their own.
    """

    call: Callable[[], object]
    judged: Callable[[], dict[str, Tensor]] | None = None
    capturable: bool = True


@dataclasses.dataclass(frozen=True)
class Contest:
    """Contestants, what their results are to be, and the least work that gives them.

    Attributes:
        contestants: by name.
        missing: of those that can't take part, the reason.
        exact: the float64 results by name.
        eager: what eager PyTorch makes of them in the contest's dtype; its error is the measure.
        flops, bytes: of products, and of memory traffic. The floor is the larger of their times at the ceilings.
        graphed: time replays of a CUDA graph, which have no host time; otherwise calls, until the device is done.
        floor: a contestant whose median is the floor instead: the products alone, say.
        pause: seconds to wait before each call that is timed.
    """

    contestants: dict[str, Contestant]
    missing: dict[str, str]
    exact: dict[str, Tensor]
    eager: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    flops: float = 0.0
    bytes: float = 0.0
    graphed: bool = False
    floor: str | None = None
    pause: float = 0.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile, and how many calls were timed."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The result nearest to what it may be off by: its name, its error and that bound, and whether all are within."""

    what: str
    error: float
    allowed: float
    passed: bool


def judge(
    actual: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype
) -> Judgement:
    """Compare results with the exact ones: twice the error of eager PyTorch and one rounding step are allowed."""
    found = []
    for name, truth in exact.items():
        error = _distance(actual[name], truth)
        rounding = torch.finfo(dtype).eps * float(truth.abs().max())
        found.append((name, error, 2.0 * _distance(eager[name], truth) + rounding))
    name, error, allowed = max(found, key=lambda one: _share(one[1], one[2]))
    return Judgement(name, error, allowed, error <= allowed)


def _share(error: float, allowed: float) -> float:
    """How near an error is to its bound; a NaN is beyond any."""
    if math.isnan(error) or (allowed == 0.0 and error > 0.0):
        return math.inf
    return error / allowed if allowed else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max())


def run(contest: Contest, seconds: float, chosen: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Judge and time the contestants (those ``chosen``); one row for each, in the order of ``contestants``.

    A row has ``contestant`` and either ``reason`` (why it took no part) or the error, and unless the gate was failed
    the times, the floor and the memory. ``samples`` holds all times in seconds.
    """
    names = [name for name in contest.contestants if chosen is None or name in chosen or name == contest.floor]
    rows = {name: _judged_row(name, contest) for name in names}
    racing = {name: contest.contestants[name].call for name in names if rows[name].get("passed") is not False}
    warm = set()
    for name, call in racing.items():
        start = time.perf_counter()
        rows[name]["memory"] = memory(call, contest.device)
        if time.perf_counter() - start > _SLOW and contest.device.type == "cpu":
            warm.add(name)
    captured = {name for name in racing if contest.graphed and contest.contestants[name].capturable}
    timed = (
        interleave(racing, seconds, contest.device, contest.graphed, warm, contest.pause, captured) if racing else {}
    )
    ceilings_ms = None
    if contest.flops or contest.bytes:
        found = ceilings(contest.device, contest.dtype)
        ceilings_ms = 1e3 * max(contest.flops / found["flops"], contest.bytes / found["bytes"])
        for row in rows.values():
            row |= {"flops": contest.flops, "bytes": contest.bytes}
    medians = {}
    for name, (samples, method) in timed.items():
        timing = summarise(samples)
        medians[name] = timing.median
        rows[name] |= {"milliseconds": dataclasses.asdict(timing), "timed": method, "samples": samples}
    floor = medians.get(contest.floor) if contest.floor else ceilings_ms
    for name, median in medians.items():
        rows[name] |= {"floor_milliseconds": floor, "share_of_floor": None if floor is None else floor / median}
    ours = next((name for name in medians if name == OURS or name.startswith(f"{OURS} ")), None)
    for name, median in medians.items():
        rows[name]["fastbert_is_faster_by"] = None if ours in (None, name) else median / medians[ours]
    missing = [{"contestant": name, "reason": reason} for name, reason in contest.missing.items()]
    return [*rows.values(), *missing]


def _judged_row(name: str, contest: Contest) -> dict[str, Any]:
    judged = contest.contestants[name].judged
    if judged is None:
        return {"contestant": name}
    return {"contestant": name, **dataclasses.asdict(judge(judged(), contest.exact, contest.eager, contest.dtype))}


def interleave(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    graphed: bool = False,
    warm: Container[str] = (),
    pause: float = 0.0,
    captured: Container[str] | None = None,
) -> dict[str, tuple[list[float], str]]:
    """Call the contestants in turn for about ``seconds``, those that aren't ``warm`` first some times uncounted.

    With ``graphed`` those that are ``captured``, by default all, are replayed from graphs.

    Returns for each the seconds of every call, and by what they were measured.
    """
    for name, call in calls.items():
        for _ in range(0 if name in warm else _WARM_UP):
            call()
    clocks = {name: _clock(call, device, graphed, captured is None or name in captured) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < _FEWEST_ROUNDS:
        for name, (clock, _) in clocks.items():
            time.sleep(pause)
            samples[name].append(clock())
    return {name: (samples[name], clocks[name][1]) for name in calls}


def _clock(
    call: Callable[[], object], device: torch.device, graphed: bool, captured: bool
) -> tuple[Callable[[], float], str]:
    """What measures one call in seconds, and how it does."""
    if device.type != "cuda":
        return lambda: _wall(call), "processor's clock"
    if not graphed:

        def until_done() -> float:
            torch.cuda.synchronize()
            return _wall(lambda: (call(), torch.cuda.synchronize()))

        return until_done, "processor's clock, until the device is done"
    # Larger than the second-level cache, so that a call finds there nothing of the one before.
    flushed = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    replay, method = call, "device events around a call"
    if captured:
        try:
            graph = torch.cuda.CUDAGraph()
            # On the stream where the forward of a backward ran: that is where the backward runs, too.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                call()
            replay, method = graph.replay, "device events around a graph's replay"
        except RuntimeError as error:
            torch.cuda.synchronize()
            method += f", since no graph could be captured ({str(error).splitlines()[0]})"
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events() -> float:
        flushed.zero_()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return by_events, method


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summarise(samples: Sequence[float]) -> Timing:
    """Of seconds, in milliseconds."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(1e3 * statistics.median(samples), 1e3 * fifths[0], 1e3 * fifths[3], len(samples))


_CEILINGS: dict[tuple[torch.device, torch.dtype], dict[str, float]] = {}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large product and bytes/s of a large copy (read and written), the best of those measured here."""
    if (device, dtype) not in _CEILINGS:
        _CEILINGS[device, dtype] = {"flops": _product_rate(device, dtype), "bytes": _copy_rate(device)}
    return _CEILINGS[device, dtype]


def measured_ceilings() -> dict[tuple[torch.device, torch.dtype], dict[str, float]]:
    """Those that have been needed so far."""
    return dict(_CEILINGS)


def products(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way there is to multiply ``[T, K]`` by a ``weight`` ``[N, K]``, prepared once."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"torch": lambda x: torch.nn.functional.linear(x, weight)}
    if weight.device.type == "cpu" and onednn.missing(weight.dtype) is None:
        packed = onednn.pack(weight)
        found["oneDNN"] = lambda x: onednn.linear(x, packed, None)
    if weight.device.type == "cpu" and host_linear.missing(weight.dtype) is None:
        own = host_linear.pack(weight)
        found["fastbert"] = lambda x: host_linear.linear(x, own, None)
    return found


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 2048
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls = {name: (lambda product=product: product(x)) for name, product in products(weight).items()}
    timed = interleave(calls, 1.0, device, graphed=True)
    return 2.0 * size**3 / min(1e-3 * summarise(samples).p20 for samples, _ in timed.values())


def _copy_rate(device: torch.device) -> float:
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    # In a graph a copy may be the copy engine's, which a kernel outruns.
    ways = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.bitwise_not(source, out=target)}
    timed = interleave(ways, 0.5, device, graphed=True)
    return 2.0 * source.numel() / min(1e-3 * summarise(samples).p20 for samples, _ in timed.values())
