"""``fastbert embed --engine ray``: the local engine's rows, each once, also when a machine is lost on the way."""

import contextlib
import ipaddress
import json
import sys
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from cli import tiny
from ray.cluster_utils import Cluster

from fastbert.cli import embed as embedding
from fastbert.cli import embed_ray, parquet
from fastbert.cli.errors import Refusal

COUNT = 300
WINDOW = 5
# Windows that either machine begins before one of them is killed.
EACH = 8


@pytest.fixture(scope="module")
def lines():
    return [*tiny.texts(COUNT - 2), "", "the sum"]


@pytest.fixture
def arguments(checkpoint, lines, tmp_path, monkeypatch):
    """The command's arguments for a text file that makes many windows."""
    monkeypatch.setattr(embedding, "WINDOW_LINES", WINDOW)
    path = tiny.write(tmp_path / "texts.txt", lines)
    given = {
        "texts": path,
        "model": checkpoint,
        "out": tmp_path / "out",
        "device": "cpu",
        "threads": 1,
        "engine": "ray",
    }

    def make(*options, **changes):
        named = {**given, **changes}.items()
        return ["embed", *(word for name, value in named for word in (f"--{name}", value)), *options]

    return make


@pytest.fixture
def expected(arguments, tmp_path):
    """The local engine's rows."""
    result = tiny.run(*arguments(out=tmp_path / "local.npy", engine="local"))
    assert result.exit_code == 0, result.output
    return np.load(tmp_path / "local.npy")


def rows(folder):
    """The rows of all files by name, and the row that each file's name says it begins with."""
    files = sorted(folder.glob("*.parquet"))
    parts = [np.stack(pq.read_table(file).column("embedding").to_numpy()) for file in files]
    starts = [0, *np.cumsum([len(part) for part in parts])[:-1].tolist()]
    assert [int(file.stem) for file in files] == starts
    return np.concatenate(parts)


def no_column(folder):
    pq.write_table(pa.table({"sentence": ["a"]}), folder / "no.parquet")
    return {"texts": folder / "no.parquet"}


def no_strings(folder):
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    return {"texts": folder / "numbers.parquet"}


def no_rows(folder):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "none.parquet")
    return {"texts": folder / "none.parquet"}


def no_parquet(folder):
    return {"texts": tiny.write(folder / "text.parquet", ["the sum"])}


def other_things(folder):
    (folder / "mine").mkdir()
    tiny.write(folder / "mine" / "a.parquet", ["precious"])
    return {"out": folder / "mine"}


def a_file(folder):
    return {"out": tiny.write(folder / "a-file", ["precious"])}


def another_run(folder):
    return {"out": run_of(folder / "other", {"text": [1, 2]})}


def a_finished_run(folder):
    return {"out": run_of(folder / "other", {"text": [1, 2], "finished": True})}


def a_damaged_run(folder):
    return {"out": run_of(folder / "other", [])}


def run_of(folder, noted):
    folder.mkdir()
    (folder / "fastbert.json").write_text(json.dumps(noted))
    tiny.write(folder / "000000000000.parquet", ["precious"])
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (no_column, "no.parquet has the columns sentence; one must be text"),
        (no_strings, "numbers.parquet has int64 in its column text; it must be strings"),
        (no_rows, "none.parquet is empty"),
        (no_parquet, "text.parquet can't be read: "),
        (other_things, "mine is a folder with other things in it"),
        (a_file, "a-file is a file; with --engine ray it must be a folder"),
        (another_run, "other has rows of another text, checkpoint or setting; --restart begins again"),
        (a_finished_run, "other holds the rows of a run that is finished; --overwrite replaces it"),
        (a_damaged_run, "other has a damaged fastbert.json; --restart begins again"),
        (lambda folder: {"max-length": 4096}, "--max-length"),
        (lambda folder: {"texts": "-"}, "--texts - is this process's standard input; --engine ray needs a file"),
        (lambda folder: {"engine": "local", "address": "auto"}, "--address is auto, and --engine is local"),
    ],
)
def test_refused(arguments, tmp_path, changes, told):
    given = changes(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert told in tiny.refusal(
        *arguments(*(("--restart",) if changes in (other_things, a_finished_run) else ()), **given)
    )
    assert {path: path.read_bytes() for path in before} == before
    assert not ray.is_initialized()


@pytest.fixture
def without_workers(monkeypatch):
    """The driver alone; gives what sets what happens in place of the workers."""
    monkeypatch.setattr(embed_ray, "_cluster", lambda address: contextlib.nullcontext())
    return lambda embedded: monkeypatch.setattr(embed_ray, "_embedded", embedded)


def test_a_folder_that_is_not_shared(arguments, without_workers):
    without_workers(lambda options, about, windows: (window.rows for window in windows))
    told = tiny.refusal(*arguments())
    assert f"out lacks {COUNT // WINDOW} of {COUNT // WINDOW} files that the workers wrote; it must be the same" in told


def test_a_text_that_changes(arguments, without_workers):
    def change(options, about, windows):
        with options.texts.open("a") as file:
            file.write("another\n")
        yield from ()

    without_workers(change)
    assert "texts.txt was changed while it was read; --restart begins again" in tiny.refusal(*arguments())


@pytest.mark.parametrize(("kind", "option"), [(another_run, "--restart"), (a_finished_run, "--overwrite")])
def test_what_another_run_left_is_deleted_when_asked_for(arguments, without_workers, tmp_path, kind, option):
    out = kind(tmp_path)["out"]
    seen = []

    def look(options, about, windows):
        seen.extend(path.name for path in out.iterdir())
        raise KeyboardInterrupt
        yield

    without_workers(look)
    assert tiny.run(*arguments(option, out=out)).exit_code == 130
    assert seen == ["fastbert.json"]
    # It goes on with what is its own now.
    assert tiny.run(*arguments("--overwrite", out=out)).exit_code == 130


def test_a_finished_run_is_noted(arguments, without_workers, tmp_path):
    def write(options, about, windows):
        for window in windows:
            parquet.write(embed_ray._part(options.out, window), iter([np.zeros((window.rows, 32), np.float32)]), 32, {})
            yield window.rows

    without_workers(write)
    assert tiny.run(*arguments()).exit_code == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for options in ([], ["--restart"], ["--restart", "--pooling", "cls"]):
        assert "is finished; --overwrite replaces it" in tiny.refusal(*arguments(*options))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    # A file that was lost since is made again, and no other.
    (lost := min(path for path in files if path.suffix == ".parquet")).unlink()
    result = tiny.run(*arguments())
    assert result.exit_code == 0, result.output
    assert f"going on after {COUNT - WINDOW} of {COUNT} rows" in result.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert lost.exists()


def test_stopped_by_the_user(arguments, without_workers):
    def stop(options, about, windows):
        yield WINDOW
        raise KeyboardInterrupt

    without_workers(stop)
    result = tiny.run(*arguments())
    assert result.exit_code == 130
    assert f"stopped: {WINDOW} of {COUNT} rows are kept, and the same command goes on" in result.stderr


def test_without_ray(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fastbert.cli.embed_ray", raising=False)
    monkeypatch.delattr("fastbert.cli.embed_ray", raising=False)
    assert "pip install '.[ray]'" in tiny.refusal(*arguments())


def listening():
    """The processes of this one's tree that take connections, and on which addresses."""
    found = set()
    mine = psutil.Process()
    for process in (mine, *mine.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            open_ = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found.update((process.name(), c.laddr.ip.removeprefix("::ffff:")) for c in open_)
    return found


@pytest.mark.slow
def test_a_cluster_of_its_own(arguments, expected, lines, tmp_path, monkeypatch):
    """Case 65: it listens to this machine alone. Parquet goes in, and a run that was stopped goes on."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # A cluster that others have started here is none of this test's.
    monkeypatch.setattr(ray._private.services, "find_bootstrap_address", lambda folder: None)
    table = pa.table({"number": range(COUNT), "text": lines})
    pq.write_table(table, tmp_path / "texts.parquet", row_group_size=2 * WINDOW + 1)
    out = tmp_path / "out"
    embedded = embed_ray._embedded
    seen = []

    def watched(*given):
        # With a worker too.
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
        seen.append(listening())
        yield from embedded(*given)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(embed_ray, "_embedded", watched)
    given = arguments(texts=tmp_path / "texts.parquet")
    result = tiny.run(*given)
    assert result.exit_code == 130, result.output
    assert f"stopped: {COUNT} of {COUNT} rows are kept" in result.stderr
    assert not ray.is_initialized()
    whole = rows(out)
    np.testing.assert_allclose(whole, expected, atol=1e-6, rtol=0)

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    lost = sorted(before)[2:5]
    for path in lost[:2]:
        path.unlink()
    damaged = bytearray(lost[2].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    lost[2].write_bytes(damaged)
    (out / ".0123.partial").write_bytes(b"of a worker that was killed")
    result = tiny.run(*given, "--address", "local")
    assert result.exit_code == 0, result.output
    assert f"going on after {COUNT - 3 * (2 * WINDOW + 1)} of {COUNT} rows" in result.stderr
    assert f"{lost[2]} is damaged; its rows are made again" in result.stderr
    assert f"{COUNT} rows of 32 float32 numbers in 28 files, mean pooling, not normalized" in result.stdout
    assert not ray.is_initialized()
    np.testing.assert_array_equal(rows(out), whole)
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} == set(lost)
    assert sorted(path.name for path in out.iterdir()) == sorted([*(path.name for path in before), "fastbert.json"])
    assert "--overwrite replaces it" in tiny.refusal(*given)

    assert len(seen) == 2
    for found in seen:
        assert {"raylet", "gcs_server"} <= {name for name, _ in found}
        assert [(name, ip) for name, ip in found if not ipaddress.ip_address(ip).is_loopback] == []


@pytest.mark.slow
def test_a_cluster_that_listens_to_all_is_not_used(arguments, monkeypatch):
    """As another version of Ray might start one."""
    monkeypatch.setattr(embed_ray, "_for_this_machine", contextlib.nullcontext)
    told = tiny.run(*arguments("--address", "local"))
    assert told.exit_code == 2
    assert "which others can reach" in told.stderr.splitlines()[-1]
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, and one machine."""
    # Ray asks each machine whether it lives, and takes five failures for a death; it would ask every three seconds.
    settings = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": settings})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def halting(notes, victim, lost):
    """A worker that notes its windows, and stays in the EACH-th: on the machine ``victim`` until its end.

    Elsewhere it goes on when there is the file ``lost``.
    """

    class Halting(embed_ray.Worker):
        def _blocks(self, window, width, each=EACH):
            machine = ray.get_runtime_context().get_node_id()
            with notes.open("a") as file:
                file.write(f"{machine}\n")
            while notes.read_text().split().count(machine) >= each and (machine == victim or not lost.exists()):
                time.sleep(0.02)
            yield from super()._blocks(window, width)

    return Halting


@pytest.mark.slow
def test_a_machine_is_lost_halfway(arguments, cluster, expected, tmp_path, monkeypatch):
    machines = {*cluster.worker_nodes, victim := cluster.add_node(num_cpus=2)}
    notes, lost = tmp_path / "notes", tmp_path / "lost"
    monkeypatch.setattr(embed_ray, "Worker", halting(notes, victim.node_id, lost))
    killed = []

    def kill():
        while not killed:
            seen = notes.read_text().split() if notes.exists() else []
            if all(seen.count(machine.node_id) >= EACH for machine in machines):
                killed.append(len(list((tmp_path / "out").glob("*.parquet"))))
                cluster.remove_node(victim, allow_graceful=False)
                lost.touch()
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = tiny.run(*arguments(address=cluster.address))
    assert result.exit_code == 0, result.output
    killer.join(1)
    # Both were at work, and there was as much left to do.
    assert 0 < killed[0] < COUNT / WINDOW - 10
    np.testing.assert_array_equal(rows(tmp_path / "out"), expected)


def poor():
    """A worker with too little memory, on a machine in trouble, of which Ray tells the driver."""

    class Poor(embed_ray.Worker):
        def _blocks(self, window, width):
            from ray._private.utils import publish_error_to_driver

            publish_error_to_driver("machine", "the disk is full", ray._private.worker.global_worker.gcs_client)
            time.sleep(1)
            raise Refusal("--tokens-per-batch is 4096, too much for this GPU's memory")

    return Poor


@pytest.mark.slow
def test_a_worker_refuses(arguments, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_ray, "Worker", poor())
    result = tiny.run(*arguments(address=cluster.address))
    assert result.exit_code == 2, result.output
    assert result.stdout == "", result.stdout
    assert "the disk is full" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastbert: --tokens-per-batch is 4096, too much")
    assert list((tmp_path / "out").glob("*.parquet")) == []


@pytest.mark.slow
def test_a_thread_that_is_left_does_not_connect_again(arguments, cluster, monkeypatch):
    """Ray Data's are still at work when a run ends early, and Ray connects whoever calls it."""
    outcomes = []

    def straggle():
        while ray.is_initialized():
            time.sleep(0.001)
        try:
            outcomes.append(ray.get_runtime_context().get_node_id())
        except Exception as error:
            outcomes.append(error)

    def embedded(*given):
        yield WINDOW
        threading.Thread(target=straggle, name=embed_ray._READER).start()
        raise Refusal("too much for this GPU's memory")

    monkeypatch.setattr(embed_ray, "_embedded", embedded)
    assert "too much for this GPU's memory" in tiny.refusal(*arguments(address=cluster.address))
    assert not ray.is_initialized()
    assert isinstance(outcomes[0], Exception)
    assert embed_ray.auto_init_hook.enable_auto_connect


@pytest.mark.slow
def test_no_machine_has_a_gpu(arguments, cluster):
    assert "--device is cuda, and no machine of the cluster has a GPU" in tiny.refusal(
        *arguments(address=cluster.address, device="cuda")
    )
    assert not ray.is_initialized()
