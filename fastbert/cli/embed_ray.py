"""``fastbert embed --engine ray``: the same embeddings by the machines of a Ray cluster, as a folder of Parquet files.

The texts are cut into windows, and each window becomes a file of its own, named by its first row and put in place when
it is whole. So a window that Ray gives out again, because the machine that had it was lost, makes the same file again:
no row can be missing or there twice. Nor is one made again that a stopped run has left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import typer
from ray._private import auto_init_hook, ray_constants, services

from fastbert.cli import checkpoint, embed, machine, parquet, texts
from fastbert.cli.embed import Options
from fastbert.cli.errors import INTERRUPTED, Refusal, first_line, reason
from fastbert.cli.options import Device

_IDENTITY = "fastbert.json"
_FINISHED = "finished"
_COLUMN = "text"
# The name of the threads in which Ray Data reads ahead.
_READER = "iter_threaded"


class Window(NamedTuple):
    """Rows that are embedded together: the first one, how many, and where they begin in the file.

    That is a byte of a text file, or the number of a row group of a Parquet file.
    """

    row: int
    rows: int
    place: int


class Worker:
    """Embeds windows on one device; an actor of Ray Data holds one.

    Args:
        given: a reference to the command's options and what is kept in each file. The texts, the checkpoint and the
            output folder have the same paths on all machines.
    """

    def __init__(self, given: ray.ObjectRef[tuple[Options, dict[str, Any]]]) -> None:
        self._options, self._about = ray.get(given)
        bert = checkpoint.find(self._options.model, self._options.allow_pickle)
        self._embedder = embed.make_embedder(self._options, bert)

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """Write the file of a window; gives its number of rows, and why it has none."""
        window = Window(**row)
        path = _part(self._options.out, window)
        refusal = ""
        try:
            if not path.exists():
                self._write(path, window)
        # Ray hands on no exception as it is.
        except Refusal as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"--out {self._options.out} can't be written: {reason(error)}"
        return {"rows": window.rows, "refusal": refusal}

    def _write(self, path: Path, window: Window) -> None:
        partial = path.with_name(_partial(uuid.uuid4().hex))
        width = self._embedder.model.config.hidden_size
        parquet.write(partial, self._blocks(window, width), width, self._about)
        os.replace(partial, path)

    def _blocks(self, window: Window, width: int) -> Iterator[npt.NDArray[np.float32]]:
        for sentences in _read(self._options.texts, window):
            made = np.empty((len(sentences), width), np.float32)
            for members, embeddings in self._embedder(sentences):
                made[members] = embeddings
            yield made
            machine.release_memory()


def run(options: Options, address: str | None) -> None:
    """Embed on the cluster at ``address``; None is what ``ray.init`` makes of it.

    Raises:
        Refusal: a file, the checkpoint or the cluster can't be used.
        typer.Exit: the user interrupted it.
    """
    if options.texts == texts.STANDARD_INPUT:
        raise Refusal("--texts - is this process's standard input; --engine ray needs a file that all machines have")
    # A worker has another working folder.
    options = dataclasses.replace(options, texts=options.texts.absolute(), out=options.out.absolute())
    bert = checkpoint.find(options.model, options.allow_pickle)
    if options.model is not None and Path(options.model).is_dir():
        options = dataclasses.replace(options, model=str(Path(options.model).absolute()))
    choice = embed.choose(options, bert, checkpoint.load_tokenizer(bert))
    state = _state(options.texts)
    windows = list(_windows(options.texts))
    if not windows:
        raise Refusal(f"--texts {options.texts} is empty; it must hold texts")
    identity = {"model": checkpoint.fingerprint(bert), **choice._asdict(), "dtype": options.dtype}
    noted = {"text": list(state), **identity}
    _prepare(options, noted, windows)
    missing = [window for window in windows if not _is_made(options.out, window, bert.config.hidden_size)]
    total = sum(window.rows for window in windows)
    done = total - sum(window.rows for window in missing)
    if done:
        typer.echo(f"going on after {done} of {total} rows", err=True)
    try:
        with _cluster(address), embed.progress(total, done) as advance:
            for rows in _embedded(options, {"checkpoint": bert.name, **identity}, missing):
                done += rows
                advance(rows)
    except KeyboardInterrupt:
        typer.echo(f"stopped: {done} of {total} rows are kept, and the same command goes on with them", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if _state(options.texts) != state:
        raise Refusal(f"--texts {options.texts} was changed while it was read; --restart begins again")
    lost = sum(not _part(options.out, window).exists() for window in windows)
    if lost:
        raise Refusal(
            f"--out {options.out} lacks {lost} of {len(windows)} files that the workers wrote; it must be the same "
            "folder on all machines"
        )
    for path in options.out.glob(_partial("*")):
        path.unlink(missing_ok=True)
    _note(options.out, {**noted, _FINISHED: True})
    typer.echo(
        f"{options.out}: {total} rows of {bert.config.hidden_size} float32 numbers in {len(windows)} files, "
        f"{embed.described(choice)}, of {bert.name} in {options.dtype}"
    )


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect, unless this process is connected."""
    ours = not ray.is_initialized()
    # A cluster that is started here reports to nobody, unless it is told to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints a machine's troubles (a full disk, a lost worker) on stdout, where our result goes.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            # None where there is no cluster to join; its annotation leaves out that it takes None, too.
            starts = ours and services.canonicalize_bootstrap_address(address) is None  # type: ignore[arg-type]
            with _for_this_machine() if starts else contextlib.nullcontext():
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
        except (ConnectionError, ValueError) as error:
            raise Refusal(f"--address {address} can't be used: {first_line(error)}") from None
        try:
            if starts:
                _check_alone()
            yield
        finally:
            if ours:
                _disconnect()


def _disconnect() -> None:
    """Leave the cluster for good.

    Functions of Ray connect by themselves where nobody has. A thread of Ray Data's that is still at work after a run
    was stopped would do so, and start a cluster where it finds none.
    """
    before = auto_init_hook.enable_auto_connect
    auto_init_hook.enable_auto_connect = False
    try:
        ray.shutdown()
        for thread in threading.enumerate():
            if thread.name == _READER:
                thread.join(timeout=10)
    finally:
        auto_init_hook.enable_auto_connect = before


@contextlib.contextmanager
def _for_this_machine() -> Iterator[None]:
    """Have Ray start a cluster that listens on the loopback, as it does on Windows and macOS, where it can't be joined.

    Elsewhere it listens on every interface, and no setting of ``ray.init`` says otherwise: it takes the loopback for an
    oversight and puts the machine's address in its place.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_alone() -> None:
    """Refuse a cluster started here that others can reach, as one of another version of Ray might be."""
    for node in ray.nodes():
        address = node["NodeManagerAddress"]
        if not ipaddress.ip_address(address).is_loopback:
            raise Refusal(
                f"ray {ray.__version__} has started a cluster at {address}, which others can reach; start one as you "
                "want it with `ray start`, and name it with --address"
            )


def _part(out: Path, window: Window) -> Path:
    """The file of a window."""
    return out / f"{window.row:012}.parquet"


def _partial(writer: str) -> str:
    """The name of a file that is being written; its writer's, since a worker that is thought lost may write on."""
    return f".{writer}.partial"


def _embedded(options: Options, about: dict[str, Any], windows: list[Window]) -> Iterator[int]:
    """Numbers of rows that are done, as they are."""
    if not windows:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU")]
    gpus = 0 if options.device == Device.cpu else int(sum(node.get("GPU", 0) for node in nodes))
    if options.device == Device.cuda and not gpus:
        raise Refusal("--device is cuda, and no machine of the cluster has a GPU; it may be cpu")
    if not gpus and not cpus:
        raise Refusal("no machine of the cluster has a CPU or a GPU for Ray's workers")
    needs: dict[str, Any] = {"num_gpus": 1}
    if not gpus:
        # The whole of a machine to each, so that no two share one.
        needs = {"num_cpus": min(cpus)}
        options = dataclasses.replace(options, threads=options.threads or min(cpus))
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    workers = min(gpus or len(cpus), len(windows))
    data = ray.data.from_items([window._asdict() for window in windows], override_num_blocks=len(windows))
    made = data.map(
        # Ray makes actors of a class, which its annotation leaves out.
        Worker,  # type: ignore[arg-type]
        # Ray's statistics take the arguments too. A reference does not make them import fastbert.
        fn_constructor_args=(ray.put((options, about)),),
        # Down to one, because Ray keeps the windows of a lost worker until it has a place for its successor: that of
        # another, which has to give it up when there is nothing else to do.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        **needs,
    )
    # It ends its thread when it is closed.
    with contextlib.closing(cast("Generator[dict[str, Any]]", iter(made.iter_rows()))) as rows:
        for row in rows:
            if row["refusal"]:
                raise Refusal(row["refusal"])
            yield row["rows"]


def _windows(path: Path) -> Iterator[Window]:
    row = 0
    if path.suffix == ".parquet":
        with _parquet(path) as table:
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                if count:
                    yield Window(row, count, group)
                row += count
        return
    place = 0
    with texts.open_file(path) as file:
        for lines in embed.windows(texts.lines(path, file)):
            yield Window(row, len(lines), place)
            row += len(lines)
            place += sum(len(line.raw) for line in lines)


def _read(path: Path, window: Window) -> Iterator[list[str]]:
    """The texts of a window, as many at a time as are embedded together."""
    if path.suffix == ".parquet":
        with _parquet(path) as table:
            for batch in table.iter_batches(embed.WINDOW_LINES, row_groups=[window.place], columns=[_COLUMN]):
                yield [text or "" for text in batch.column(0).to_pylist()]
        return
    with texts.open_file(path) as file:
        file.seek(window.place)
        found = texts.lines(path, file, window.row + 1)
        yield [line.text for line, _ in zip(found, range(window.rows), strict=False)]


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise Refusal(f"--texts {path} can't be read: {first_line(error)}") from None
    names = table.schema_arrow.names
    if _COLUMN not in names:
        raise Refusal(f"--texts {path} has the columns {', '.join(names)}; one must be {_COLUMN}")
    if not pa.types.is_string(kind := table.schema_arrow.field(_COLUMN).type) and not pa.types.is_large_string(kind):
        raise Refusal(f"--texts {path} has {kind} in its column {_COLUMN}; it must be strings")
    return table


def _state(path: Path) -> texts.State:
    with texts.open_file(path) as file:
        return texts.state(file)


def _is_made(out: Path, window: Window, width: int) -> bool:
    """Whether a window's file is there; one that is damaged is deleted."""
    path = _part(out, window)
    if not path.exists():
        return False
    if parquet.is_sound(path, window.rows, width):
        return True
    typer.echo(f"{path} is damaged; its rows are made again", err=True)
    path.unlink()
    return False


def _prepare(options: Options, identity: dict[str, Any], windows: list[Window]) -> None:
    """Make the output folder, or make sure that what is in it is of the same run."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file; with --engine ray it must be a folder")
    if (out / _IDENTITY).exists():
        found = _noted(out)
        finished = found is not None and found.pop(_FINISHED, False)
        if found == identity:
            # A file that was lost is made again.
            finished = finished and all(_part(out, window).exists() for window in windows)
        if finished and not options.overwrite:
            raise Refusal(f"--out {out} holds the rows of a run that is finished; --overwrite replaces it")
        if finished or options.restart:
            for path in out.glob("*.parquet"):
                path.unlink()
        elif found is None:
            raise Refusal(f"--out {out} has a damaged {_IDENTITY}; --restart begins again")
        elif found != identity:
            raise Refusal(f"--out {out} has rows of another text, checkpoint or setting; --restart begins again")
    elif out.exists() and any(out.iterdir()):
        raise Refusal(f"--out {out} is a folder with other things in it; it must be new or empty")
    out.mkdir(parents=True, exist_ok=True)
    _note(out, identity)


def _noted(out: Path) -> dict[str, Any] | None:
    """What a run is, as it was noted; None where that is damaged."""
    try:
        found = json.loads((out / _IDENTITY).read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _note(out: Path, identity: dict[str, Any]) -> None:
    new = out / f".{_IDENTITY}.new"
    new.write_text(json.dumps(identity) + "\n", "utf-8")
    os.replace(new, out / _IDENTITY)
