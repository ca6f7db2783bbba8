"""The report's figures, drawn by matplotlib as SVG: the same bytes for the same data.

Each file holds a digest of the data that it was drawn from, so that one that is out of date can be told without being
drawn again, by a matplotlib that may be another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.cli.bench import results
from fastbert.cli.errors import Refusal
from fastbert.training.errors import install

# The captions, by the name of the file.
FIGURES = {
    "speedup": "How many times faster than Hugging Face's sdpa: each batch and model in inference and training",
    "padding": "Valid tokens a second against the share of padding, BERT-base in inference",
    "roofline": "FLOP/s against FLOPs per byte of each op's forward, below the ceilings of this machine",
    "error": "Errors against float64, each as a part of what is allowed",
}
_REFERENCE = "huggingface sdpa"
_FLOOR = "products alone"
_COLOURS = {"fastbert": "#c1440e", _REFERENCE: "#4c6a92", "openvino": "#7a9e7e", "onnxruntime": "#b08ea2"}
_OTHER = "#999999"
_MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbert",
}


def draw(data: dict[str, Any], folder: Path, check: bool) -> list[Path]:
    """Draw the figures that are out of date, or with ``check`` only tell which are.

    Raises:
        Refusal: matplotlib isn't installed, and there is something to draw.
    """
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    stale = [folder / f"{name}.svg" for name in FIGURES]
    stale = [path for path in stale if not path.exists() or digest.encode() not in path.read_bytes()]
    if stale and not check:
        if importlib.util.find_spec("matplotlib") is None:
            raise Refusal(f"the figures are drawn by matplotlib, and it isn't installed: {install('bench')}")
        folder.mkdir(parents=True, exist_ok=True)
        for path in stale:
            _save(path, _DRAWN[path.stem], data, digest)
    return stale


def _save(path: Path, fill: Callable[[Any, dict[str, Any]], None], data: dict[str, Any], digest: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        fill(figure.subplots(), data)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": f"of data with SHA-256 {digest}"})


def _speedup(axes: Any, data: dict[str, Any]) -> None:
    bars = []
    for contest in results.contests(data["rows"]).values():
        theirs = contest.get(_REFERENCE, {})
        if theirs.get("fastbert_is_faster_by"):
            bars.append(
                (
                    f"{theirs['work']}, {theirs['model']}, {theirs['batch']}",
                    theirs["dtype"],
                    theirs["fastbert_is_faster_by"],
                )
            )
    labels = list(dict.fromkeys(label for label, _, _ in bars))
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in bars))
    height = 0.8 / max(1, len(dtypes))
    for place, dtype in enumerate(dtypes):
        chosen = {label: factor for label, one, factor in bars if one == dtype}
        positions = [labels.index(label) + (place - (len(dtypes) - 1) / 2) * height for label in chosen]
        drawn = axes.barh(
            positions, list(chosen.values()), height, label=dtype, color=("#c1440e", "#e0a080", "#703010")[place]
        )
        axes.bar_label(drawn, fmt="%.2f×", padding=2, fontsize=7)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than Hugging Face's sdpa in the same run")
    axes.legend(frameon=False)


def _padding(axes: Any, data: dict[str, Any]) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row in results.timed(data["rows"]):
        if (row["work"], row["model"]) == ("inference", "BERT-base") and row["sequences"] > 1:
            rate = row["tokens"] / row["milliseconds"]["median"]
            lines.setdefault((row["contestant"], row["dtype"]), []).append((row["padding_ratio"], rate, row["batch"]))
    for (contestant, dtype), points in lines.items():
        points.sort()
        axes.plot(
            [100 * padding for padding, _, _ in points],
            [rate for _, rate, _ in points],
            marker=_MARKERS[dtype],
            color=_COLOURS.get(contestant, _OTHER),
            linestyle=":" if contestant == _FLOOR else "-",
            linewidth=1.2,
            markersize=4,
            label=f"{contestant}, {dtype}",
        )
    axes.set_xlabel("padding, % of the batch's positions")
    axes.set_ylabel("thousand valid tokens a second")
    axes.set_yscale("log")
    axes.figure.legend(loc="outside lower center", frameon=False, fontsize=7, ncols=4)


def _roofline(axes: Any, data: dict[str, Any]) -> None:
    points = []
    for row in results.timed(data["rows"]):
        if row["work"].endswith(" forward") and row.get("flops") and row.get("bytes"):
            rate = row["flops"] / row["milliseconds"]["median"] / 1e9
            points.append((row["flops"] / row["bytes"], rate, row))
    for intensity, rate, row in points:
        colour = _COLOURS["fastbert"] if results.is_ours(row["contestant"]) else _COLOURS[_REFERENCE]
        axes.plot(intensity, rate, _MARKERS[row["dtype"]], color=colour, markersize=4)
    for found in data["ceilings"]:
        ridge = found["flops"] / found["bytes"]
        low = min([intensity for intensity, _, _ in points], default=ridge / 10) / 2
        high = max([intensity for intensity, _, _ in points], default=ridge) * 4
        axes.plot(
            [low, ridge, max(high, 2 * ridge)],
            [low * found["bytes"] / 1e12, found["flops"] / 1e12, found["flops"] / 1e12],
            color="black",
            linewidth=0.9,
            linestyle="-" if found["dtype"] == "bfloat16" else "--",
            label=f"ceilings, {found['dtype']}",
        )
    for label, colour in (("fastbert", _COLOURS["fastbert"]), ("others", _COLOURS[_REFERENCE])):
        axes.plot([], [], "o", color=colour, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte of the least memory traffic")
    axes.set_ylabel("TFLOP/s")
    axes.legend(frameon=False)


def _error(axes: Any, data: dict[str, Any]) -> None:
    rows = [row for row in data["rows"] if row.get("allowed")]
    works = list(dict.fromkeys(row["work"] for row in rows))
    for row in rows:
        ours = results.is_ours(row["contestant"])
        axes.plot(
            row["error"] / row["allowed"],
            works.index(row["work"]) + (-0.15 if ours else 0.15),
            _MARKERS[row["dtype"]],
            color=_COLOURS["fastbert"] if ours else _COLOURS[_REFERENCE],
            markersize=3.5,
            alpha=0.7,
        )
    for label, colour in (("fastbert", _COLOURS["fastbert"]), ("others", _COLOURS[_REFERENCE])):
        axes.plot([], [], "o", color=colour, markersize=4, label=label)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(works)), works, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("error / allowed; beyond 1 there is no time")
    axes.legend(frameon=False)


_DRAWN: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "speedup": _speedup,
    "padding": _padding,
    "roofline": _roofline,
    "error": _error,
}
