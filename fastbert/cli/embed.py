"""``fastbert embed``: a text file of any size to one embedding per line, in memory that doesn't grow with the file."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

import fastbert
from fastbert.cli import batches, checkpoint, machine, parquet, recipe, texts
from fastbert.cli.errors import INTERRUPTED, Refusal
from fastbert.cli.options import Device, Dtype, Pooling
from fastbert.cli.progress import PartialRows

_SUFFIXES = (".npy", ".parquet")
# Lines that are read, sorted by length and written together: what is in memory, and what a killed run loses.
WINDOW_LINES = 4096
_WINDOW_BYTES = 4 << 20
# A CPU gains nothing from more than these, and a GPU needs as many to be busy.
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}
# fastbert computes nothing for padding, but the states that it returns are padded.
_PADDED_PER_VALID = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments; see its ``--help``."""

    texts: Path
    out: Path
    model: str | None
    pooling: Pooling | None
    normalize: bool | None
    max_length: int | None
    tokens_per_batch: int | None
    dtype: Dtype
    device: Device | None
    threads: int | None
    restart: bool
    overwrite: bool
    allow_pickle: bool


class Choice(NamedTuple):
    """How the tokens' states become one vector, and the tokens after which a text is cut."""

    pooling: Pooling
    normalize: bool
    max_length: int


@dataclasses.dataclass
class Embedder:
    """Texts to embeddings.

    Args:
        choice: pooling, normalization and limit.
        model: a BERT.
        tokenizer: its tokenizer.
        tokens_per_batch: tokens, padding not counted, that go through the model together.
    """

    choice: Choice
    model: fastbert.BertModel
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int
    tokens: int = dataclasses.field(default=0, init=False)

    def __call__(self, sentences: Sequence[str]) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
        """Batches as they are done: the indices of N of the sentences, and their embeddings, float32 ``[N, H]``.

        Raises:
            Refusal: a batch needs more memory than the GPU has.
        """
        ids = batches.tokenize(self.tokenizer, sentences, self.choice.max_length)
        for members in by_length([len(row) for row in ids], self.tokens_per_batch):
            batch = batches.pad([ids[i] for i in members], self.tokenizer.pad_token_id)
            self.tokens += int(batch.attention_mask.sum())
            try:
                rows = self._embed(batch.to(self.model.device))
            except torch.OutOfMemoryError:
                told = f"--tokens-per-batch is {self.tokens_per_batch}, too much for this GPU's memory"
                raise Refusal(f"{told}; the same command with less goes on with the rows that are done") from None
            yield members, rows

    @torch.inference_mode()
    def _embed(self, batch: batches.Batch) -> npt.NDArray[np.float32]:
        states = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mean = self.choice.pooling == Pooling.mean
        pooled = batches.mean_pool(states, batch.attention_mask) if mean else states[:, 0].float()
        rows: npt.NDArray[np.float32] = (F.normalize(pooled, dim=1) if self.choice.normalize else pooled).cpu().numpy()
        return rows


def run(options: Options) -> None:
    """Embed the file, or go on where a stopped run left off.

    Raises:
        Refusal: a file, the checkpoint or the device can't be used; or there is no space left.
        typer.Exit: the user interrupted it.
    """
    _check_out(options)
    _check_absent(options)
    with texts.open_file(options.texts) as file:
        state = texts.state(file)
        scan = texts.scan(options.texts, file)
        bert = checkpoint.find(options.model, options.allow_pickle)
        width = bert.config.hidden_size
        embedder = make_embedder(options, bert)
        identity = {
            "text": scan.sha256,
            "model": checkpoint.fingerprint(bert),
            **embedder.choice._asdict(),
            "dtype": options.dtype,
        }
        with PartialRows(options.out, identity, scan.lines, width, options.restart) as rows:
            _check_space(options.out, rows, scan.lines * width * 4)
            before = rows.kept
            if before:
                typer.echo(f"going on after {before} of {scan.lines} rows", err=True)
            start = time.perf_counter()
            try:
                _embed_rest(options.texts, file, state, scan.lines, embedder, rows)
                seconds = time.perf_counter() - start
                _finish(options, rows, {"checkpoint": bert.name, **identity})
            except KeyboardInterrupt:
                kept = f"{rows.kept} of {scan.lines} rows are kept, and the same command goes on with them"
                typer.echo(f"stopped: {kept}", err=True)
                raise typer.Exit(INTERRUPTED) from None
    made = scan.lines - before
    typer.echo(
        f"{options.out}: {scan.lines} rows of {width} float32 numbers, {described(embedder.choice)}, "
        f"of {bert.name} in {options.dtype}\n"
        f"{made} rows in {seconds:.1f} s: {made / seconds:,.0f} texts/s, {embedder.tokens / seconds:,.0f} tokens/s"
    )


def described(choice: Choice) -> str:
    """The choice in words."""
    normalized = "normalized" if choice.normalize else "not normalized"
    return f"{choice.pooling} pooling, {normalized}, texts cut to {choice.max_length} tokens"


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of at most ``tokens`` tokens or of one text.

    Padded to its longest text, a batch has at most twice as many positions.
    """
    members: list[int] = []
    valid = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(members) + 1) * lengths[members[0]] if members else 0
        if members and (valid + lengths[index] > tokens or padded > _PADDED_PER_VALID * tokens):
            yield members
            members, valid = [], 0
        members.append(index)
        valid += lengths[index]
    if members:
        yield members


def _check_out(options: Options) -> None:
    out = options.out
    if out.suffix not in _SUFFIXES:
        raise Refusal(f"--out {out} ends in {out.suffix or 'no suffix'}; it may end in {' or '.join(_SUFFIXES)}")
    if not out.absolute().parent.is_dir():
        raise Refusal(f"--out {out}: the folder {out.absolute().parent} doesn't exist")
    if out.is_dir():
        raise Refusal(f"--out {out} is a folder; it must be a file")
    if out.exists() and not out.is_file():
        raise Refusal(f"--out {out} is no regular file; it would be replaced")
    if out.exists() and options.texts.exists() and out.samefile(options.texts):
        raise Refusal(f"--out {out} is the text file itself")


def _check_absent(options: Options) -> None:
    if options.out.exists() and not options.overwrite:
        raise Refusal(f"--out {options.out} exists already; --overwrite replaces it when the new one is whole")


def choose(options: Options, bert: checkpoint.Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Choice:
    """What is asked for, and the checkpoint's own where nothing is.

    Raises:
        Refusal: the checkpoint asks for something that isn't done here, or the limit is beyond its positions.
    """
    wanted = recipe.read(bert.folder)
    if options.pooling is None and wanted.unserved:
        raise Refusal(
            f"{bert.name} makes embeddings with {wanted.unserved}, which embed doesn't do; "
            "with --pooling it makes them without"
        )
    return Choice(
        pooling=options.pooling or wanted.pooling or Pooling.mean,
        normalize=bool(wanted.normalize) if options.normalize is None else options.normalize,
        max_length=checkpoint.length_limit(bert, tokenizer, options.max_length, wanted.max_length),
    )


def make_embedder(options: Options, bert: checkpoint.Checkpoint) -> Embedder:
    """The checkpoint on the chosen device.

    Raises:
        Refusal: the device or the checkpoint can't be used; or as :func:`choose`.
    """
    device = machine.choose_device(options.device, options.threads)
    tokenizer = checkpoint.load_tokenizer(bert)
    return Embedder(
        choice=choose(options, bert, tokenizer),
        model=checkpoint.load_model(bert, fastbert.BertModel, getattr(torch, options.dtype), device),
        tokenizer=tokenizer,
        tokens_per_batch=options.tokens_per_batch or _TOKENS_PER_BATCH[device.type],
    )


def _check_space(out: Path, rows: PartialRows, total: int) -> None:
    # Parquet is written of the rows when all of them are there.
    needed = rows.bytes_left + (total if out.suffix == ".parquet" else 0)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise Refusal(
            f"--out {out} needs {needed / 1e6:,.1f} MB of disk space, and {free / 1e6:,.1f} MB are free in "
            f"{out.absolute().parent}"
        )


def windows(lines: Iterable[texts.Line]) -> Iterator[list[texts.Line]]:
    """Lines that are embedded and written together."""
    window: list[texts.Line] = []
    size = 0
    for line in lines:
        window.append(line)
        size += len(line.raw)
        if len(window) == WINDOW_LINES or size >= _WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _embed_rest(
    path: Path, file: BinaryIO, state: texts.State, total: int, embedder: Embedder, rows: PartialRows
) -> None:
    """Embed those of the ``total`` lines that aren't done yet."""
    file.seek(rows.offset)
    with progress(total, rows.kept) as advance:
        for window in windows(texts.lines(path, file, rows.done + 1)):
            first = rows.done
            made, missing = rows.begin(len(window))
            whole: list[int] = []
            try:
                for members, embeddings in embedder([window[index].text for index in missing]):
                    found = [missing[member] for member in members]
                    made[found] = embeddings
                    whole += found
                    advance(len(found))
                rows.append(made, sum(len(line.raw) for line in window))
            except BaseException:
                rows.keep(first, made, whole)
                raise
            machine.release_memory()
            if texts.state(file) != state:
                raise Refusal(f"--texts {path} was changed while it was read; --restart begins again")


def _finish(options: Options, rows: PartialRows, about: dict[str, Any]) -> None:
    out, finished = options.out, rows.path
    try:
        if out.suffix == ".parquet":
            finished = out.with_name(f"{out.name}.new")
            parquet.write(finished, rows.blocks(parquet.rows_per_group(rows.width)), rows.width, about)
        # It may have come while this ran.
        _check_absent(options)
        rows.finish(finished, out)
    except OSError as error:
        raise rows.refusal(error) from None
    finally:
        if finished != rows.path:
            finished.unlink(missing_ok=True)


@contextlib.contextmanager
def progress(total: int, completed: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; gives the function that moves it on by a number of rows."""
    console = Console(stderr=True)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=completed)
        yield lambda size: bar.advance(task, size)
