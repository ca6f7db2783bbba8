"""The report: BENCHMARKS.md, its figures, and the tables in other documents, all made from the files of results.

A document keeps a table between ``<!-- results: NAME -->`` and ``<!-- end -->``. NAME is that of a file of results, of
which the headlines are shown; or "kernels", what ``benchmarks.kernels`` read in the machine code; or "predicted", what
``benchmarks.predict`` makes of a GPU that nothing has been measured on; or "training", what ``benchmarks.training``
learnt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.cli import json_files
from fastbert.cli.bench import results
from fastbert.cli.errors import Refusal, reason
from fastbert.cli.json_files import FINITE, POSITIVE, TEXT, TRUTH, or_null

REPORT = "BENCHMARKS.md"
DOCUMENTS = ("README.md", "docs/performance.md", "docs/kernels.md", "docs/training.md")
_MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_REFERENCE = "huggingface sdpa"
_HEADLINE_PEERS = (_REFERENCE, "openvino")
_MODEL_WORK = ("inference", "fine-tuning step", "pretraining step")

_MACHINE = {"threads": FINITE, "device": TEXT}
_KERNELS = {
    "environment": {"versions": {"triton": TEXT}},
    "kernels": [
        {
            "capability": FINITE, "op": TEXT, "kernel": TEXT, "dtype": TEXT, "what": TEXT,
            "options": {"num_warps": FINITE}, "registers": FINITE, "stack": FINITE, "shared": FINITE,
            "occupancy": FINITE,
        }
    ],
    "extension": [
        {
            "capability": FINITE, "op": TEXT, "kernel": TEXT, "dtype": TEXT, "vector": TRUTH,
            "groups": or_null(FINITE), "registers": FINITE, "stack": FINITE,
        }
    ],
}  # fmt: skip
_PREDICTED = {
    "device": {"device": TEXT},
    "forwards": [
        {
            "model": TEXT, "batch": TEXT, "dtype": TEXT, "launches": FINITE, "milliseconds": POSITIVE,
            "share_of_products": FINITE, "kernels": [{"kernel": TEXT, "total": FINITE, "bound": TEXT}],
        }
    ],
}  # fmt: skip
_SCORES = {"*": FINITE}
_TRAINING = {
    "environment": _MACHINE,
    "runs": [{"command": TEXT, "seconds": FINITE, "scores": _SCORES, "baselines": {"*": _SCORES}}],
}

_INTRODUCTION = """\
# Benchmarks

Made by `fastbert bench report` from `benchmarks/results/*.json`; nothing here is typed by hand. `make bench` measures
this machine and makes it anew; `fastbert bench --compare OLD NEW` tells what changed between two files of results.

All contestants of a contest run in one process, in turn, on the same batch; a time is the median, with the 20th and
80th percentile. Errors are the largest differences from float64, beside what is allowed: twice eager PyTorch's and one
rounding step. What fails that gets no time. The floor of an inference is the time of the valid tokens' matrix products
alone, each with its own weights by the fastest way there is, measured as a contestant; that of other work is the time
of its FLOPs at the rate of a large product, or of its least memory traffic at the rate of a large copy, whichever is
longer. Peak is the memory that a call takes beyond what was held before it; kept is what autograd holds for the
backward pass.
"""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The whole results in a folder, by name; those of partial runs are left out.

    Raises:
        Refusal: there are none, or a file holds something else.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        data = json_files.read_object(path, str(path))
        if "rows" in data and not data.get("partial", False):
            found[path.stem] = results.read(path)
    if not found:
        raise Refusal(f"{folder} has no results of a whole run: `fastbert bench --out {folder}` makes them")
    return found


def run(folder: Path, out: Path, check: bool) -> bool:
    """Write the report and its figures into ``out``, and rewrite the marked tables of the documents there.

    With ``check`` nothing is written. Returns whether everything was up to date.

    Raises:
        Refusal: there are no results, or a file can't be written.
    """
    from fastbert.cli.bench import figures

    found = load(folder)
    stale = []
    texts = {out / REPORT: render_report(found)}
    for name in DOCUMENTS:
        if (out / name).exists():
            texts[out / name] = render(_document(out / name), folder)
    try:
        for path, text in texts.items():
            if not path.exists() or path.read_bytes() != text.encode():
                stale.append(path)
                if not check:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
        for name, data in found.items():
            stale += figures.draw(data, out / _figures_of(name), check)
    except OSError as error:
        raise Refusal(f"{out} can't be written: {reason(error)}") from None
    for path in stale:
        print(("out of date: " if check else "written: ") + str(path))
    return not stale


def _figures_of(name: str) -> Path:
    return Path("benchmarks") / "figures" / name


def _document(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise Refusal(f"{path} can't be read: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def render(text: str, folder: Path) -> str:
    """``text`` with each marked table made anew.

    Raises:
        Refusal: what a table is made of can't be read, or is something else.
    """
    special = {
        "kernels": (_kernels, _KERNELS),
        "predicted": (_predicted, _PREDICTED),
        "training": (_training, _TRAINING),
    }

    def replace(match: re.Match[str]) -> str:
        path = folder / f"{match[2]}.json"
        if match[2] in special:
            made, shape = special[match[2]]
            data = json_files.read_object(path, str(path))
            json_files.check(data, shape, str(path))
            # A score that is compared with something must be there.
            for number, run in enumerate(data["runs"] if match[2] == "training" else ()):
                wanted = dict.fromkeys(run["baselines"], FINITE)
                json_files.check(run["scores"], wanted, f"{path}, runs[{number}].scores")
            return match[1] + made(data) + match[3]
        return match[1] + _headlines(results.read(path)) + match[3]

    return _MARKED.sub(replace, text)


def render_report(found: dict[str, dict[str, Any]]) -> str:
    """BENCHMARKS.md."""
    from fastbert.cli.bench import figures

    parts = [_INTRODUCTION]
    for name, data in found.items():
        parts += [f"\n## {_device(data)}\n", f"\n{_conditions(data)}\n"]
        for figure in figures.FIGURES:
            parts.append(f"\n![{figures.FIGURES[figure]}]({_figures_of(name) / figure}.svg)\n")
        contests = results.contests(data["rows"])
        works = dict.fromkeys(key[0] for key in contests)
        for work in works:
            chosen = [rows for key, rows in contests.items() if key[0] == work]
            if work in _MODEL_WORK:
                parts += [f"\n### {work.capitalize()}\n\n", _contests(chosen)]
            else:
                parts += [f"\n<details><summary>{work}</summary>\n\n", _contests(chosen), "\n</details>\n"]
        absent = results.absent(data["rows"]).items()
        parts += ["\n### Who took no part\n\n", *(f"- {', '.join(names)}: {reason}\n" for reason, names in absent)]
    return "".join(parts)


def _device(data: dict[str, Any]) -> str:
    environment = data["environment"]
    if environment["kind"] == "cuda":
        return str(environment["device"])
    return f"{environment['threads']} threads of {environment['device']}"


def _conditions(data: dict[str, Any]) -> str:
    environment = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [f"{versions}; Python {environment['python']}; commit {environment['commit']}."]
    if environment["gpu"]:
        lines.append("; ".join(f"{name} {value}" for name, value in environment["gpu"].items()) + ".")
    for found in data["ceilings"]:
        lines.append(
            f"In {found['dtype']} a large product runs at {found['flops'] / 1e12:.2f} TFLOP/s and a large copy at "
            f"{found['bytes'] / 1e9:.0f} GB/s."
        )
    return "\n".join(lines)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = list(header)
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _contests(chosen: Iterable[dict[str, results.Row]]) -> str:
    header = ("model", "batch", "padding", "dtype", "contestant", "ms (p20–p80)", "of floor", "fastbert is faster by")
    rows = [cells for contest in chosen for cells in _contest_rows(contest)]
    return _table((*header, "error / allowed", "peak MB", "kept MB"), rows)


def _contest_rows(contest: dict[str, results.Row]) -> Iterator[list[str]]:
    for row in contest.values():
        if "reason" in row:
            continue
        dtype = row["dtype"] + (f", p={row['dropout_p']:g}" if row["dropout_p"] else "")
        cells = [row["model"], row["batch"], f"{row['padding_ratio']:.0%}", dtype, row["contestant"]]
        error = f"{row['error']:.1e} / {row['allowed']:.1e}" if "error" in row else "–"
        if "milliseconds" not in row:
            yield [*cells, "fails parity", "–", "–", error, "–", "–"]
            continue
        share, factor, memory = row["share_of_floor"], row["fastbert_is_faster_by"], row["memory"]
        cells += [
            results.spread(row["milliseconds"]),
            "–" if share is None else f"{share:.0%}",
            "–" if factor is None else f"{factor:.2f}×",
            error,
            *("–" if memory[name] is None else f"{memory[name] / 1e6:.1f}" for name in ("peak", "kept")),
        ]
        yield cells


def _headlines(data: dict[str, Any]) -> str:
    """BERT-base against Hugging Face and OpenVINO, or those of them that were measured."""
    versions = {name: version for name, version in data["environment"]["versions"].items() if version}
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "openvino") if name in versions)
    header = ["work", "batch", "padding", "dtype", "fastbert, ms", "of floor"]
    peers = [peer for peer in _HEADLINE_PEERS if any(row["contestant"] == peer for row in results.timed(data["rows"]))]
    for peer in peers:
        header += [f"{peer}, ms", "faster by"]
    rows = []
    for contest in results.contests(data["rows"]).values():
        ours = contest.get(results.OURS)
        if ours is None or ours["model"] != "BERT-base" or "milliseconds" not in ours:
            continue
        cells = [ours["work"], ours["batch"], f"{ours['padding_ratio']:.0%}", ours["dtype"]]
        cells += [results.spread(ours["milliseconds"]), f"{ours['share_of_floor']:.0%}"]
        for peer in peers:
            row = contest.get(peer, {})
            if "milliseconds" in row:
                cells += [results.spread(row["milliseconds"]), f"{row['fastbert_is_faster_by']:.2f}×"]
            else:
                cells += ["–", "–"]
        rows.append(cells)
    return f"BERT-base, random weights; {_device(data)}; {told}.\n\n{_table([*header], rows)}"


def _kernels(data: dict[str, Any]) -> str:
    """What the compilers made of the kernels: a table for each compute capability."""
    lines = [f"Triton {data['environment']['versions']['triton']}."]
    for capability in sorted({row["capability"] for row in data["kernels"]}):
        lines += ["", f"<details><summary>Compute capability {capability / 10}</summary>", ""]
        rows: list[list[object]] = []
        for row in data["kernels"]:
            if row["capability"] == capability:
                rows.append(
                    [
                        f"{row['op']}.{row['kernel']}", row["dtype"], row["what"], row["options"]["num_warps"],
                        row["registers"], row["stack"], f"{row['shared'] / 1024:.1f} KiB", f"{row['occupancy']:.0%}",
                    ]
                )  # fmt: skip
        for row in data["extension"]:
            if row["capability"] == capability:
                access = "16-byte accesses" if row["vector"] else "any alignment"
                groups = "" if row["groups"] is None else f", {8 * row['groups']} columns a thread"
                name = f"csrc {row['op']}.{row['kernel']}"
                rows.append([name, row["dtype"], access + groups, "", row["registers"], row["stack"], "", ""])
        header = ("kernel", "dtype", "of", "warps", "registers", "spilled bytes", "shared memory", "occupancy")
        lines += [_table(header, rows), "</details>"]
    return "\n".join(lines) + "\n"


def _predicted(data: dict[str, Any]) -> str:
    """Lower bounds of forwards on a GPU, with the three kinds of kernels that take longest."""
    header = ("model", "batch", "dtype", "launches", "predicted, ms", "products at the peak", "most of it")
    rows = []
    for forward in data["forwards"]:
        longest = sorted(forward["kernels"], key=lambda kernel: -float(kernel["total"]))[:3]
        told = ", ".join(f"{kernel['kernel']} {kernel['total'] / 1e3:.3f} ms ({kernel['bound']})" for kernel in longest)
        cells = [forward["model"], forward["batch"], forward["dtype"], forward["launches"]]
        rows.append([*cells, f"{forward['milliseconds']:.3f}", f"{forward['share_of_products']:.0%}", told])
    return f"Predicted for an {data['device']['device']}, not measured.\n\n{_table(header, rows)}"


def _training(data: dict[str, Any]) -> str:
    """The scores of training runs, beside what costs nothing."""
    header = ("command", "minutes", "score", "found", "beside")
    rows: list[list[object]] = []
    for run in data["runs"]:
        cells = [f"`{run['command']}`", f"{run['seconds'] / 60:.1f}"]
        for name, baselines in run["baselines"].items():
            told = ", ".join(f"{baseline} {value:.3f}" for baseline, value in baselines.items())
            rows.append([*cells, name.replace("_", " "), f"{run['scores'][name]:.3f}", told])
            cells = ["", ""]
    environment = data["environment"]
    return f"{environment['threads']} threads of {environment['device']}.\n\n{_table(header, rows)}"
