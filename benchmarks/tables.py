"""Regenerate the tables of results in the documentation from ``benchmarks/results/*.json``.

    python -m benchmarks.tables           rewrite them
    python -m benchmarks.tables --check   exit 1 if one is out of date

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``, where NAME is that of a file of results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/performance.md", "docs/kernels.md")
_MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(data: dict[str, Any]) -> str:
    """The Markdown table of one file of results."""
    return _kernels(data) if "kernels" in data else _speeds(data)


def _kernels(data: dict[str, Any]) -> str:
    """Those of ``benchmarks.kernels``: one for each compute capability."""
    lines = [f"Triton {data['environment']['versions']['triton']}."]
    for capability in sorted({row["capability"] for row in data["kernels"]}):
        lines += [
            "",
            f"<details><summary>Compute capability {capability / 10}</summary>",
            "",
            "| kernel | dtype | of | warps | registers | spilled bytes | shared memory | occupancy |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in data["kernels"]:
            if row["capability"] == capability:
                cells = [
                    f"{row['op']}.{row['kernel']}", row["dtype"], row["what"], row["options"]["num_warps"],
                    row["registers"], row["stack"], f"{row['shared'] / 1024:.1f} KiB", f"{row['occupancy']:.0%}",
                ]  # fmt: skip
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        for row in data["extension"]:
            if row["capability"] == capability:
                access = "16-byte accesses" if row["vector"] else "any alignment"
                groups = "" if row["groups"] is None else f", {8 * row['groups']} columns a thread"
                cells = [f"csrc {row['op']}.{row['kernel']}", row["dtype"], access + groups, "", row["registers"]]
                lines.append("| " + " | ".join(map(str, [*cells, row["stack"], "", ""])) + " |")
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _speeds(data: dict[str, Any]) -> str:
    """Those of ``benchmarks.model``."""
    environment = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"{data['model']}; {environment['threads']} threads of {environment['processor']}; {versions}.",
        "",
        "| batch × sequence | valid tokens | dtype | fastbert | Hugging Face sdpa | faster by | OpenVINO | faster by "
        "| error, fastbert / Hugging Face |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [f"{row['batch']} × {row['seqlen']}", f"{row['valid']:.0%}", row["dtype"], _time(row, "fastbert")]
        for peer in ("huggingface", "openvino"):
            speedup = row["speedup"].get(peer)
            cells += [_time(row, peer), f"{speedup:.2f}×" if speedup else "–"]
        cells.append(f"{row['error']['fastbert']:.1e} / {row['error']['huggingface']:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _time(row: dict[str, Any], name: str) -> str:
    timing = row["milliseconds"].get(name)
    if timing is None:
        return "–"
    return f"{timing['median']:.1f} ms ({timing['p20']:.1f}–{timing['p80']:.1f})"


def render(text: str) -> str:
    """``text`` with each marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        data = json.loads((harness.RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + table(data) + match[3]

    return _MARKED.sub(replace, text)


def main() -> int:
    """Rewrite the documents, or with --check tell which are out of date."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if render(text) != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(render(text), encoding="utf-8")
    if stale:
        print("out of date:" if "--check" in sys.argv else "rewritten:", ", ".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
