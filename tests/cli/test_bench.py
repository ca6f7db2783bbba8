"""``fastbert bench``: the suite on one op, what counts as a change, and the report."""

import copy
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from cli import tiny

from fastbert.cli.bench import compare, figures, report, results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MISSING = object()


def row(contestant="fastbert", median=10.0, spread=0.02, rounds=25, work="inference", **changes):
    timing = {"median": median, "p20": median * (1 - spread / 2), "p80": median * (1 + spread / 2), "rounds": rounds}
    found = {
        "work": work, "model": "BERT-base", "batch": "16x128-64", "dtype": "bfloat16", "dropout_p": 0.0,
        "sequences": 16, "seqlen": 128, "tokens": 1312, "padding_ratio": 0.3594, "lengths": {"128": 16},
        "contestant": contestant, "what": "output", "error": 1e-3, "allowed": 2e-3, "passed": True,
        "milliseconds": timing, "timed": "processor's clock", "memory": {"peak": 1_000_000, "kept": None},
        "floor_milliseconds": 8.0, "share_of_floor": 8.0 / median, "fastbert_is_faster_by": None,
        "flops": 1e9, "bytes": 1e7,
    }  # fmt: skip
    return {**found, **changes}


def data(*rows, name="some-processor-2-threads", **environment):
    facts = {
        "device": "Some Processor", "kind": "cpu", "processor": "Some Processor", "threads": 2, "gpu": None,
        "python": "3.12.1", "versions": {"torch": "2.13.0", "flash-attn": None}, "commit": "abc",
    }  # fmt: skip
    ceilings = [{"dtype": "bfloat16", "flops": 2e12, "bytes": 2e10}]
    return {
        "name": name, "environment": {**facts, **environment}, "partial": False, "ceilings": ceilings,
        "rows": list(rows),
    }  # fmt: skip


def theirs(median=20.0, **changes):
    return row("huggingface sdpa", median, fastbert_is_faster_by=median / 10.0, **changes)


def absent():
    facts = ("work", "model", "batch", "dtype", "dropout_p")
    return {"contestant": "liger", "reason": "no GPU", **{name: row()[name] for name in facts}}


def write(folder, *datas):
    paths = [folder / f"{index}.json" for index in range(len(datas))]
    for path, one in zip(paths, datas, strict=True):
        path.write_text(json.dumps(one), "utf-8")
    return paths


class TestRun:
    @pytest.fixture(scope="class")
    @staticmethod
    def ran(tmp_path_factory):
        out = tmp_path_factory.mktemp("bench")
        return out, tiny.run("bench", "--quick", "--filter", "layer_norm-forward and not bias", "--out", out)

    def test_it_prints_each_contestant_with_its_error_floor_and_memory(self, ran):
        _, result = ran
        assert result.exit_code == 0, result.output
        for word in ("layer_norm forward", "fastbert torch", "torch eager", "of floor", "×", "%", "MB", "TFLOP/s"):
            assert word in result.stdout

    def test_who_took_no_part_is_told_with_the_reason(self, ran):
        _, result = ran
        assert "not run: liger: its kernels run on a GPU" in result.stdout
        assert "fastbert triton" in result.stdout

    def test_the_results_say_what_they_depend_on(self, ran):
        out, _ = ran
        (path,) = out.glob("*.json")
        assert path.stem.endswith("-quick-filtered")
        found = results.read(path)
        assert found["partial"]
        assert found["environment"]["versions"]["torch"]
        ours = next(r for r in found["rows"] if r["contestant"] == "fastbert torch")
        assert ours["milliseconds"]["rounds"] >= 5
        assert ours["milliseconds"]["p20"] <= ours["milliseconds"]["median"] <= ours["milliseconds"]["p80"]
        assert 0 < ours["error"] <= ours["allowed"]
        assert sum(ours["lengths"].values()) == ours["sequences"]

    def test_the_same_rows_are_written_as_csv(self, ran):
        out, _ = ran
        (path,) = out.glob("*.csv")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = results.read(path.with_suffix(".json"))["rows"]
        assert [r["contestant"] for r in rows] == [r["contestant"] for r in found]
        timed = next(index for index, r in enumerate(found) if "milliseconds" in r)
        assert float(rows[timed]["milliseconds_median"]) == found[timed]["milliseconds"]["median"]

    def test_a_filter_that_leaves_nothing(self, tmp_path):
        told = tiny.refusal("bench", "--quick", "--filter", "nonsense", "--out", tmp_path)
        assert "--filter 'nonsense' leaves nothing to run" in told

    def test_without_pytest(self, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install '.[bench]'" in tiny.refusal("bench", "--out", tmp_path)


class TestCompare:
    def test_equal_results_have_not_changed(self, tmp_path):
        old, new = write(tmp_path, data(row(), theirs()), data(row(), theirs()))
        result = tiny.run("bench", "--compare", old, new)
        assert result.exit_code == 0
        assert "0 slower, 0 faster, 1 within the noise" in result.stdout

    def test_a_slowdown_beyond_the_noise_fails(self, tmp_path):
        old, new = write(tmp_path, data(row(), theirs()), data(row(median=11.0), theirs()))
        result = tiny.run("bench", "--compare", old, new)
        assert result.exit_code == 1
        assert "SLOWER" in result.stdout
        assert "1.100" in result.stdout

    def test_a_speed_up_is_told_and_passes(self, tmp_path):
        old, new = write(tmp_path, data(row(), theirs()), data(row(median=8.0), theirs()))
        result = tiny.run("bench", "--compare", old, new)
        assert result.exit_code == 0
        assert "1 faster" in result.stdout

    def test_a_slower_machine_is_no_slower_fastbert(self):
        slow = [row(median=15.0), theirs(median=30.0)]
        (change,), lost = compare.compare([row(), theirs()], slow, 0.05)
        assert change.ratio == pytest.approx(1.0)
        assert (change.slower, change.faster, lost) == (False, False, [])

    def test_the_noise_grows_with_the_spread_and_falls_with_the_rounds(self):
        def noise(**timing):
            return compare.compare([row()], [row(**timing)], 0.05)[0][0].noise

        assert 0.05 < noise(rounds=100) < noise(rounds=5) < noise(rounds=5, spread=0.2)

    def test_within_the_noise_of_few_rounds(self):
        noisy = {"rounds": 5, "spread": 0.2}
        (change,), _ = compare.compare([row(**noisy)], [row(median=11.5, **noisy)], 0.05)
        assert not change.slower

    def test_peers_that_change_by_themselves_widen_the_noise(self):
        """Twelve contests; a slowdown by a quarter in one, beside peers that are steady, or off by up to a fifth."""
        old = [one for place in range(12) for one in (row(batch=str(place)), theirs(batch=str(place)))]

        def slower(spread):
            new = copy.deepcopy(old)
            for place in range(12):
                factor = 1.0 + spread * (place % 5 - 2) / 2
                for one in new[2 * place : 2 * place + 2]:
                    one["milliseconds"] = {
                        k: v * (factor if k != "rounds" else 1) for k, v in one["milliseconds"].items()
                    }
            new[0] = row(median=12.5 * (1.0 - spread), batch="0")
            return [change.contest for change in compare.compare(old, new, 0.05)[0] if change.slower]

        assert len(slower(0.0)) == 1
        assert slower(0.2) == []

    @pytest.mark.parametrize(
        "now",
        [
            {"contestant": "fastbert", "reason": "the extension is missing"},
            {"contestant": "fastbert", "what": "output", "error": 3.0, "allowed": 1.0, "passed": False},
        ],
    )
    def test_a_time_that_is_lost_fails(self, tmp_path, now):
        facts = {key: value for key, value in row().items() if key not in ("milliseconds", "error", "allowed")}
        old, new = write(tmp_path, data(row(), theirs()), data({**facts, **now}, theirs()))
        result = tiny.run("bench", "--compare", old, new)
        assert result.exit_code == 1
        assert "LOST: inference, BERT-base" in result.stdout

    def test_a_contest_that_was_not_run_is_not_lost(self):
        changes, lost = compare.compare([row(), row(work="fine-tuning step")], [row()], 0.05)
        assert (len(changes), lost) == (1, [])

    def test_a_peer_that_became_slower_is_no_matter(self):
        changes, _ = compare.compare([row(), theirs()], [row(), theirs()], 0.05)
        assert [change.contestant for change in changes] == ["fastbert"]

    def test_two_devices_are_not_compared(self, tmp_path):
        old, new = write(tmp_path, data(row()), data(row(), name="another"))
        assert "can't be compared" in tiny.refusal("bench", "--compare", old, new)

    @pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
    def test_a_file_that_holds_no_results(self, tmp_path, text):
        (good,) = write(tmp_path, data(row()))
        bad = tmp_path / "bad.json"
        if text is not None:
            bad.write_text(text)
        assert str(bad) in tiny.refusal("bench", "--compare", good, bad)


# Of a file with results, what is changed and what is told of it.
DAMAGE = [
    ("environment", True, "environment is True; it must be an object"),
    ("environment.versions.torch", [], "environment.versions.torch is []; it must be a text or null"),
    ("rows", {}, "rows is {}; it must be a list"),
    ("rows.0", 5, "rows[0]: the whole is 5; it must be an object"),
    ("rows.0.batch", [], "rows[0]: batch is []; it must be a text"),
    ("rows.0.dtype", "float8", "rows[0]: dtype is 'float8'; it must be one of float32, bfloat16, float16"),
    ("rows.0.milliseconds.median", 0, "rows[0]: milliseconds.median is 0; it must be a finite number above 0"),
    ("rows.0.milliseconds.rounds", None, "rows[0]: milliseconds.rounds is None; it must be a finite number above 0"),
    ("rows.0.padding_ratio", 10**400, "rows[0]: padding_ratio is 1000"),
    ("rows.0.error", "x", "rows[0]: error is 'x'; it must be a number"),
    ("rows.0.work", "\ud800", "rows[0]: work is '\\ud800'; it must be a text"),
    ("rows.2.milliseconds", {"median": "x"}, "rows[2]: sequences is missing; it must be a finite number"),
    ("rows.2.allowed", 1.0, "rows[2]: what is missing; it must be a text"),
    ("rows.0.memory", [], "rows[0]: memory is []; it must be an object"),
    ("rows.0.share_of_floor", MISSING, "rows[0]: share_of_floor is missing; it must be a finite number or null"),
    ("ceilings.0.bytes", 0, "ceilings[0].bytes is 0; it must be a finite number above 0"),
]


def change(path, place, value):
    """Set what stands at a place of a JSON file, such as "rows.0.batch"."""
    whole = json.loads(path.read_text("utf-8"))
    *outer, last = (int(name) if name.isdigit() else name for name in place.split("."))
    found = whole
    for name in outer:
        found = found[name]
    if value is MISSING:
        del found[last]
    else:
        found[last] = value
    path.write_text(json.dumps(whole), "utf-8")


class TestDamagedResults:
    @pytest.mark.parametrize(("place", "value", "told"), DAMAGE)
    def test_compare(self, tmp_path, place, value, told):
        old, new = write(tmp_path, data(row(), theirs()), data(row(), theirs(), absent()))
        change(new, place, value)
        line = tiny.refusal("bench", "--compare", old, new)
        assert line.startswith(f"fastbert: {new}")
        assert told in line

    @pytest.mark.parametrize(("place", "value", "told"), DAMAGE)
    def test_report(self, tmp_path, place, value, told):
        (path,) = write(tmp_path, data(row(), theirs(), absent()))
        change(path, place, value)
        line = tiny.refusal("bench", "report", "--results", tmp_path, "--out", tmp_path / "out")
        assert line.startswith(f"fastbert: {path}")
        assert told in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", ["{", "[]", '{"rows": "\udcff"}'])
    def test_a_file_that_is_no_json_object(self, tmp_path, text):
        write(tmp_path, data(row()))
        (tmp_path / "bad.json").write_text(text, "utf-8", errors="surrogateescape")
        line = tiny.refusal("bench", "report", "--results", tmp_path, "--out", tmp_path / "out")
        assert f"{tmp_path / 'bad.json'} is no JSON" in line

    @pytest.mark.parametrize(
        ("name", "place", "value"),
        [
            ("kernels", "kernels.0.occupancy", "x"),
            ("kernels", "extension.0.stack", MISSING),
            ("predicted", "forwards.0.kernels.0.total", MISSING),
            ("training", "runs.0.scores", 5),
            ("training", "runs.0.scores.masked_loss", MISSING),
        ],
    )
    def test_a_marked_table(self, tmp_path, name, place, value):
        write(tmp_path, data(row()))
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
        (tmp_path / "README.md").write_text(f"<!-- results: {name} -->\n<!-- end -->\n")
        change(tmp_path / f"{name}.json", place, value)
        line = tiny.refusal("bench", "report", "--results", tmp_path, "--out", tmp_path)
        assert f"{name}.json" in line
        assert place.rpartition(".")[2] in line

    def test_a_document_that_is_not_utf_8(self, tmp_path):
        write(tmp_path, data(row()))
        (tmp_path / "README.md").write_bytes(b"\xff")
        line = tiny.refusal("bench", "report", "--results", tmp_path, "--out", tmp_path)
        assert f"{tmp_path / 'README.md'} is not UTF-8" in line

    @pytest.mark.parametrize("made", [report.REPORT, "benchmarks/figures/0/error.svg"])
    def test_what_was_made_before_may_be_anything(self, tmp_path, made):
        write(tmp_path, data(row(), theirs()))
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_bytes(b"\xff")
        result = tiny.run("bench", "report", "--results", tmp_path, "--out", tmp_path, "--check")
        assert result.exit_code == 1
        assert f"out of date: {tmp_path / made}" in result.stdout


class TestReport:
    @pytest.fixture(scope="class")
    @staticmethod
    def original(tmp_path_factory):
        folder = tmp_path_factory.mktemp("report")
        results = folder / "results"
        results.mkdir()
        made = data(
            row(), theirs(), row("openvino", 15.0, fastbert_is_faster_by=1.5), row("flash-attn", reason="no GPU")
        )
        (results / "some.json").write_text(json.dumps(made), "utf-8")
        (folder / "README.md").write_text("# x\n<!-- results: some -->\nold\n<!-- end -->\ny\n", "utf-8")
        result = tiny.run("bench", "report", "--results", results, "--out", folder)
        assert result.exit_code == 0, result.output
        return folder

    @pytest.fixture
    def written(self, original, tmp_path):
        """A report of made-up results, with a README that has a table of them."""
        return shutil.copytree(original, tmp_path / "report")

    def check(self, folder):
        return tiny.run("bench", "report", "--results", folder / "results", "--out", folder, "--check")

    def test_the_report_and_the_readme_have_the_numbers(self, written):
        text = (written / report.REPORT).read_text("utf-8")
        assert "| fastbert | 10.0 (9.9–10.1) | 80% | – | 1.0e-03 / 2.0e-03 | 1.0 | – |" in text
        assert "- flash-attn: no GPU" in text
        readme = (written / "README.md").read_text("utf-8")
        assert "| 20.0 (19.8–20.2) | 2.00× | 15.0 (14.8–15.2) | 1.50× |" in readme
        assert "old" not in readme
        assert readme.startswith("# x\n")
        assert readme.endswith("<!-- end -->\ny\n")

    def test_every_figure_is_drawn_and_shown(self, written):
        text = (written / report.REPORT).read_text("utf-8")
        for name in figures.FIGURES:
            path = f"benchmarks/figures/some/{name}.svg"
            assert f"({path})" in text
            assert "<svg" in (written / path).read_text("utf-8")

    def test_nothing_is_out_of_date_then(self, written):
        result = self.check(written)
        assert result.exit_code == 0, result.stdout

    @pytest.mark.parametrize(
        ("stale", "damage"),
        [
            ("README.md", lambda text: text.replace("2.00×", "3.00×")),
            ("BENCHMARKS.md", lambda text: text.replace("10.0", "1.0")),
            ("benchmarks/figures/some/error.svg", lambda text: re.sub(r"SHA-256 \w+", "SHA-256 0", text)),
        ],
    )
    def test_what_does_not_match_the_data_is_told(self, written, stale, damage):
        path = written / stale
        path.write_text(damage(path.read_text("utf-8")), "utf-8")
        result = self.check(written)
        assert result.exit_code == 1
        assert result.stdout == f"out of date: {path}\n"

    def test_new_data_makes_all_of_it_out_of_date(self, written):
        path = written / "results" / "some.json"
        made = json.loads(path.read_text("utf-8"))
        made["rows"][0]["milliseconds"]["median"] = 9.0
        path.write_text(json.dumps(made), "utf-8")
        assert self.check(written).stdout.count("out of date") == 2 + len(figures.FIGURES)

    def test_partial_results_are_left_out(self, tmp_path):
        partial = data(row())
        partial["partial"] = True
        write(tmp_path, partial)
        assert "no results of a whole run" in tiny.refusal("bench", "report", "--results", tmp_path, "--out", tmp_path)

    def test_this_repository_is_up_to_date(self):
        """Every number in BENCHMARKS.md, README.md and docs is that of benchmarks/results."""
        result = tiny.run("bench", "report", "--results", RESULTS, "--out", ROOT, "--check")
        assert result.exit_code == 0, result.stdout

    def test_a_changed_figure_of_this_repository_is_seen(self, tmp_path):
        shutil.copytree(RESULTS, tmp_path / "results")
        for name in ("README.md", report.REPORT):
            shutil.copy(ROOT / name, tmp_path / name)
        shutil.copytree(ROOT / "benchmarks" / "figures", tmp_path / "benchmarks" / "figures")
        assert self.check(tmp_path).exit_code == 0
        readme = tmp_path / "README.md"
        text = readme.read_text("utf-8")
        changed = text.replace("× |", "0× |")
        assert changed != text
        readme.write_text(changed, "utf-8")
        assert self.check(tmp_path).exit_code == 1
