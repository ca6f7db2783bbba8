"""What changed between two results: beyond the noise, in ratios within each run.

A machine's speed drifts from one run to the next, so times of two runs aren't compared as they are: fastbert's are
divided by those of a peer in the same contest of the same run, which drift along.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from fastbert.cli import machine
from fastbert.cli.bench import results
from fastbert.cli.errors import Refusal

# Of a normal distribution: p80 - p20 is 1.683 standard deviations, and the standard error of the median of n samples
# 1.2533 / sqrt(n) of one.
_MEDIAN_ERROR = 1.2533 / 1.683
_SIGMAS = 3.0
# Of a normal distribution: its standard deviation is 1.4826 times the median distance from the median.
_DEVIATION = 1.4826
_FEWEST_PEERS = 10


class Change(NamedTuple):
    """Of one contestant: new time over old time, each as a multiple of the peer's in its run, and what is noise."""

    contest: str
    contestant: str
    peer: str | None
    ratio: float
    noise: float

    @property
    def slower(self) -> bool:
        """Beyond the noise."""
        return self.ratio > 1.0 + self.noise

    @property
    def faster(self) -> bool:
        """Beyond the noise."""
        return self.ratio < 1.0 / (1.0 + self.noise)


def run(old: Path, new: Path, tolerance: float) -> bool:
    """Print what changed from ``old`` to ``new``. Returns whether nothing regressed.

    Raises:
        Refusal: a file can't be read, or the two are of different devices.
    """
    before, after = results.read(old), results.read(new)
    if before["name"] != after["name"]:
        raise Refusal(f"{old} is of {before['name']} and {new} of {after['name']}: these can't be compared")
    changes, lost = compare(before["rows"], after["rows"], tolerance)
    console = machine.console()
    for name in ("commit", "versions"):
        if before["environment"][name] != after["environment"][name]:
            console.print(f"{name}: {before['environment'][name]} -> {after['environment'][name]}", soft_wrap=True)
    beyond = [change for change in changes if change.slower or change.faster]
    if beyond:
        table = Table("contest", "contestant", "beside", "time, new / old", "noise", "")
        for change in sorted(beyond, key=lambda change: -change.ratio):
            verdict = "SLOWER" if change.slower else "faster"
            noise = f"±{change.noise:.0%}"
            table.add_row(
                change.contest, change.contestant, change.peer or "nothing", f"{change.ratio:.3f}", noise, verdict
            )
        console.print(table)
    for told in lost:
        console.print(told, soft_wrap=True)
    slower = sum(change.slower for change in beyond)
    console.print(
        f"{len(changes)} times of fastbert compared: {slower} slower, {len(beyond) - slower} faster, "
        f"{len(changes) - len(beyond)} within the noise"
    )
    if not changes and not lost:
        raise Refusal(f"{old} and {new} have no contest in common")
    return not slower and not lost


def compare(old: Iterable[results.Row], new: Iterable[results.Row], tolerance: float) -> tuple[list[Change], list[str]]:
    """The changes of all that has a time in both, and in words what had one and has none now.

    Noise is three standard errors of the ratio of the medians, and beside it what differs between any two processes:
    ``tolerance``, or three standard deviations of the peers' own changes, if there are some and that is more. A contest
    that the new results don't have at all isn't lost: it wasn't run.
    """
    changes, lost = [], []
    earlier, after = results.contests(old), results.contests(new)
    between = max(tolerance, _SIGMAS * _peers_deviation(earlier, after))
    for key, before in earlier.items():
        now = after.get(key, {})
        ours = [row for row in results.timed(before.values()) if results.is_ours(row["contestant"])]
        for row in ours:
            name = row["contestant"]
            if name not in now:
                continue
            title = results.title(row)
            if "milliseconds" not in now[name]:
                reason = now[name].get("reason") or f"{now[name]['what']} is off by {now[name]['error']:.3g}"
                lost.append(f"LOST: {title}: {name} had a time and has none: {reason}")
                continue
            peer = next((p for p in before if not results.is_ours(p) and _timed_in(p, before, now)), None)
            pairs = [(before[name], now[name])] + ([(before[peer], now[peer])] if peer else [])
            medians = [b["milliseconds"]["median"] / a["milliseconds"]["median"] for a, b in pairs]
            ratio = medians[0] / (medians[1] if peer else 1.0)
            errors = [_relative_error(one) for pair in pairs for one in pair]
            noise = between + _SIGMAS * math.sqrt(sum(error**2 for error in errors))
            changes.append(Change(title, name, peer, ratio, noise))
    return changes, lost


def _peers_deviation(
    earlier: dict[results.Key, dict[str, results.Row]], after: dict[results.Key, dict[str, results.Row]]
) -> float:
    """The standard deviation, robustly, by which times of peers changed: their code is the same in both."""
    changes = [
        math.log(after[key][name]["milliseconds"]["median"] / row["milliseconds"]["median"])
        for key, before in earlier.items()
        for name, row in before.items()
        if not results.is_ours(name) and _timed_in(name, before, after.get(key, {}))
    ]
    if len(changes) < _FEWEST_PEERS:
        return 0.0
    middle = statistics.median(changes)
    return _DEVIATION * statistics.median(abs(change - middle) for change in changes)


def _timed_in(name: str, *contests: dict[str, results.Row]) -> bool:
    return all("milliseconds" in contest.get(name, {}) for contest in contests)


def _relative_error(row: results.Row) -> float:
    """The standard error of the median, as a part of it."""
    timing = row["milliseconds"]
    spread: float = (timing["p80"] - timing["p20"]) / timing["median"]
    return _MEDIAN_ERROR * spread / math.sqrt(timing["rounds"])
