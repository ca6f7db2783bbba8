"""``fastbert compare``: a checkpoint on Hugging Face and on fastbert, first the numbers, then the time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.bert import modeling_bert

import fastbert
from fastbert.cli import batches, checkpoint, machine, parity, recipe, texts
from fastbert.cli.errors import Refusal, reason
from fastbert.cli.options import Device, Dtype


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments; see its ``--help``."""

    model: str | None
    texts: Path | None
    dtype: Dtype
    device: Device | None
    batch_size: int
    max_length: int | None
    limit: int
    repeats: int
    threads: int | None
    json: Path | None
    allow_pickle: bool


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile of repeated measurements."""

    median: float
    p20: float
    p80: float


class Speed(NamedTuple):
    """Seconds of one pass over all batches, and how many times faster fastbert was in the same repeat."""

    hugging_face: Spread
    fastbert: Spread
    speedup: Spread


class Ran(NamedTuple):
    """A part of the model (``*`` in its path stands for all layers), how many it has, what computes it and why."""

    path: str
    part: str
    copies: int
    implementation: str
    reason: str


class Work(NamedTuple):
    """What both models are run on: all batches together."""

    source: str
    texts: int
    batches: int
    max_length: int
    valid_tokens: int
    padded_tokens: int

    @property
    def padding_ratio(self) -> float:
        """The fraction of positions that are padding."""
        return 1 - self.valid_tokens / self.padded_tokens


def run(options: Options) -> bool:
    """Compare, print, and write the JSON file if one is asked for. Returns whether parity holds.

    Raises:
        Refusal: a file, the checkpoint or the device can't be used.
    """
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise Refusal(f"--json {options.json}: the folder {options.json.parent} doesn't exist")
    if options.json is not None and options.json.is_dir():
        raise Refusal(f"--json {options.json} is a folder; it must be a file")
    if options.json is not None and options.texts is not None and _same(options.json, options.texts):
        raise Refusal(f"--json {options.json} is the file of the texts itself")
    device = machine.choose_device(options.device, options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    source = str(options.texts) if options.texts else "docstrings of the Python standard library"
    found = texts.first_texts(options.texts, options.limit) if options.texts else texts.docstrings(options.limit)
    bert = checkpoint.find(options.model, options.allow_pickle)
    tokenizer = checkpoint.load_tokenizer(bert)
    limit = checkpoint.length_limit(bert, tokenizer, options.max_length, recipe.read(bert.folder).max_length)
    ids = batches.tokenize(tokenizer, found, limit)
    padded = [
        batches.pad(ids[start : start + options.batch_size], tokenizer.pad_token_id).to(device)
        for start in range(0, len(ids), options.batch_size)
    ]
    work = Work(
        source, len(ids), len(padded), limit, sum(map(len, ids)), sum(batch.input_ids.numel() for batch in padded)
    )
    hugging_face = checkpoint.load_model(bert, modeling_bert.BertModel, dtype, device)
    fast = checkpoint.load_model(bert, fastbert.BertModel, dtype, device)
    float32 = None
    if dtype != torch.float32:
        float32 = checkpoint.load_model(bert, modeling_bert.BertModel, torch.float32, device)
    agreement = parity.measure(padded, hugging_face, fast, float32)
    if agreement is None:
        raise Refusal(f"the states that Hugging Face computes of {bert.name} aren't finite: nothing to compare with")
    del float32
    # The pass for parity has warmed up both.
    speed = _time(padded, hugging_face, fast, options.repeats, device) if agreement.passed else None
    ran = _what_ran(fast)
    console = machine.console()
    _print(console, options, bert, device, work, agreement, speed, ran, fast.route)
    if options.json is not None:
        figures = _figures(options, bert, device, work, agreement, speed, ran, fast.route)
        try:
            options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise Refusal(f"--json {options.json} can't be written: {reason(error)}") from None
    return agreement.passed


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _time(
    padded: Sequence[batches.Batch], hugging_face: nn.Module, fast: nn.Module, repeats: int, device: torch.device
) -> Speed:
    seconds: dict[nn.Module, list[float]] = {hugging_face: [], fast: []}
    for repeat in range(repeats):
        # Each goes first every other time: what the one leaves in caches and clocks is no advantage of the other.
        for model in (hugging_face, fast) if repeat % 2 == 0 else (fast, hugging_face):
            seconds[model].append(_pass(padded, model, device))
    ratios = [theirs / ours for theirs, ours in zip(seconds[hugging_face], seconds[fast], strict=True)]
    return Speed(_spread(seconds[hugging_face]), _spread(seconds[fast]), _spread(ratios))


@torch.inference_mode()
def _pass(padded: Sequence[batches.Batch], model: nn.Module, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for batch in padded:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])


def _what_ran(model: nn.Module) -> list[Ran]:
    """What ``fastbert.explain`` tells, with the same part of all layers in one row."""
    with contextlib.redirect_stdout(io.StringIO()):
        rows = fastbert.explain(model)
    counts = Counter(
        (_any_layer(row.path), row.part, row.implementation, row.reason) for row in rows if row.path != "model"
    )
    return [Ran(path, part, count, *rest) for (path, part, *rest), count in counts.items()]


def _any_layer(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path.removeprefix("model.").removeprefix("encoder."))


def _print(
    console: Console,
    options: Options,
    bert: checkpoint.Checkpoint,
    device: torch.device,
    work: Work,
    agreement: parity.Parity,
    speed: Speed | None,
    ran: Sequence[Ran],
    route: str | None,
) -> None:
    config, versions = bert.config, machine.versions()
    table = Table("", "Hugging Face (sdpa)", "fastbert", title=f"fastbert compare: {bert.name}")
    table.add_row(
        "largest difference on valid tokens",
        "the reference"
        if agreement.hugging_face_difference is None
        else f"{agreement.hugging_face_difference:.2e} (to its float32)",
        f"{agreement.difference:.2e}, may be {agreement.tolerance:.2e}",
    )
    table.add_row(
        "cosine of the sentence embeddings", "", f"min {agreement.cosine_min:.9f}, mean {agreement.cosine_mean:.9f}"
    )
    if agreement.neighbours_kept is not None:
        table.add_row("nearest neighbours kept", "", f"{agreement.neighbours_kept:.2%}")
    table.add_row("parity", "", "passed" if agreement.passed else "FAILED", end_section=True)
    if speed is not None:
        for unit, count in (("sentences/s", work.texts), ("valid tokens/s", work.valid_tokens)):
            table.add_row(unit, _rate(count, speed.hugging_face), _rate(count, speed.fastbert))
        ratio = speed.speedup
        table.add_row("speed-up", "1", f"{ratio.median:.2f} ({ratio.p20:.2f} to {ratio.p80:.2f})")
    else:
        table.add_row("speed-up", "", "not measured: the numbers disagree")
    console.print(table)
    lines = {
        "model": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, from {bert.folder}",
        "texts": f"{work.texts} in {work.batches} batches of up to {options.batch_size}, "
        f"cut to {work.max_length} tokens: {work.source}",
        "padding": f"{work.padding_ratio:.1%} of {work.padded_tokens} positions",
        "run in": f"{options.dtype} on {device.type} ({machine.device_name(device)}), "
        f"{torch.get_num_threads()} CPU threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "tolerance": agreement.rule,
        "times": f"medians of {options.repeats} passes each, in turn; in brackets the 20th and 80th percentile",
        "last layout": route or "none",
    }
    for name, text in lines.items():
        console.print(f"{name + ':':<13}{text}", highlight=False, soft_wrap=True)
    parts = Table("where", "part", "", "computed by", "why", title="what fastbert ran")
    for row in ran:
        parts.add_row(row.path, row.part, f"×{row.copies}", row.implementation, row.reason)
    console.print(parts)


def _rate(count: int, seconds: Spread) -> str:
    # The slowest passes give the lowest rates.
    return f"{count / seconds.median:,.0f} ({count / seconds.p80:,.0f} to {count / seconds.p20:,.0f})"


def _figures(
    options: Options,
    bert: checkpoint.Checkpoint,
    device: torch.device,
    work: Work,
    agreement: parity.Parity,
    speed: Speed | None,
    ran: Sequence[Ran],
    route: str | None,
) -> dict[str, Any]:
    arguments = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(options).items()
    }
    figures: dict[str, Any] = {
        "arguments": arguments,
        "versions": machine.versions(),
        "device": {
            "type": device.type,
            "name": machine.device_name(device),
            "cpu_threads": torch.get_num_threads(),
        },
        "model": {
            "name": bert.name,
            "folder": str(bert.folder),
            "layers": bert.config.num_hidden_layers,
            "hidden_size": bert.config.hidden_size,
        },
        "work": {**work._asdict(), "padding_ratio": work.padding_ratio},
        # JSON has no NaN.
        "parity": {k: None if v != v else v for k, v in agreement._asdict().items()},
        "speed": None,
        "last_layout": route,
        "ran": [row._asdict() for row in ran],
    }
    if speed is not None:
        figures["speed"] = {
            "speedup": speed.speedup._asdict(),
            **{
                name: {
                    "seconds": seconds._asdict(),
                    "sentences_per_second": work.texts / seconds.median,
                    "valid_tokens_per_second": work.valid_tokens / seconds.median,
                }
                for name, seconds in (("hugging_face", speed.hugging_face), ("fastbert", speed.fastbert))
            },
        }
    return figures
