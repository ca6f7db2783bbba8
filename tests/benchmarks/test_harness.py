"""The harness of the suite: the parity gate, the order of the calls, memory, and the shapes."""

import pytest
import torch

from benchmarks import bench_unpad, harness, shapes, suite
from benchmarks.environment import slug
from benchmarks.harness import Contest, Contestant
from benchmarks.memory import memory

CPU = torch.device("cpu")
EXACT = {"output": torch.tensor([1.0, 2.0], dtype=torch.float64)}


def contest(judged, eager=(1.0, 2.0), calls=None, **changes):
    """One contestant called "fastbert" whose result is ``judged``, and a peer that is right."""
    calls = calls if calls is not None else []
    made = {
        "fastbert": Contestant(lambda: calls.append("fastbert"), lambda: {"output": torch.tensor(judged)}),
        "peer": Contestant(lambda: calls.append("peer"), lambda: {"output": torch.tensor([1.0, 2.0])}),
    }
    given = {"output": torch.tensor(eager)}
    return Contest(made, {"absent": "not installed"}, EXACT, given, torch.float32, CPU, **changes)


def rows_of(one, seconds=0.0):
    return {row["contestant"]: row for row in harness.run(one, seconds)}


class TestGate:
    @pytest.mark.parametrize("judged", [[1.5, 2.0], [float("nan"), 2.0], [float("inf"), 2.0]])
    def test_a_wrong_result_gets_no_time(self, judged):
        rows = rows_of(contest(judged))
        assert rows["fastbert"]["passed"] is False
        assert rows["fastbert"]["what"] == "output"
        assert "milliseconds" not in rows["fastbert"]
        assert rows["peer"]["milliseconds"]["rounds"] >= 5
        assert rows["peer"]["fastbert_is_faster_by"] is None

    def test_twice_the_error_of_eager_and_one_rounding_step_are_allowed(self):
        step = 2 * torch.finfo(torch.float32).eps
        found = harness.judge(
            {"output": torch.tensor([1.2, 2.0])}, EXACT, {"output": torch.tensor([1.1, 2.0])}, torch.float32
        )
        assert found.error == pytest.approx(0.2)
        assert found.allowed == pytest.approx(0.2 + step, abs=1e-7)
        worse = harness.judge(
            {"output": torch.tensor([1.21, 2.0])}, EXACT, {"output": torch.tensor([1.1, 2.0])}, torch.float32
        )
        assert not worse.passed

    def test_the_result_nearest_to_its_bound_is_reported(self):
        exact = {"a": torch.ones(1).double(), "b": torch.ones(1).double()}
        off = {"a": torch.tensor([1.0]), "b": torch.tensor([1.1])}
        assert (
            harness.judge(off, exact, {name: value.float() for name, value in exact.items()}, torch.float32).what == "b"
        )

    def test_a_result_of_zeros_may_not_be_anything_else(self):
        zeros = {"output": torch.zeros(2, dtype=torch.float64)}
        eager = {"output": torch.zeros(2)}
        assert harness.judge({"output": torch.zeros(2)}, zeros, eager, torch.float32).passed
        assert not harness.judge({"output": torch.tensor([0.0, 1e-30])}, zeros, eager, torch.float32).passed

    def test_what_is_missing_has_its_reason(self):
        assert rows_of(contest([1.0, 2.0]))["absent"] == {"contestant": "absent", "reason": "not installed"}


class TestTiming:
    def test_contestants_are_called_in_turn(self):
        calls = []
        rows_of(contest([1.0, 2.0], calls=calls), seconds=0.01)
        # Memory and warm-up first, each by itself.
        timed = calls[-10:]
        assert timed == ["fastbert", "peer"] * 5

    def test_only_the_chosen_run_and_the_floor_with_them(self):
        made = contest([1.0, 2.0], floor="peer")
        assert [row["contestant"] for row in harness.run(made, 0.0, {"fastbert"})] == ["fastbert", "peer", "absent"]
        assert "peer" not in {row["contestant"] for row in harness.run(contest([1.0, 2.0]), 0.0, {"fastbert"})}

    def test_the_floor_is_the_median_of_that_contestant(self):
        rows = rows_of(contest([1.0, 2.0], floor="peer"))
        floor = rows["peer"]["milliseconds"]["median"]
        assert rows["fastbert"]["floor_milliseconds"] == floor
        assert rows["fastbert"]["share_of_floor"] == floor / rows["fastbert"]["milliseconds"]["median"]

    def test_the_floor_is_the_longer_of_products_and_traffic(self, monkeypatch):
        monkeypatch.setattr(harness, "ceilings", lambda device, dtype: {"flops": 1e12, "bytes": 1e10})
        rows = rows_of(contest([1.0, 2.0], flops=1e9, bytes=1e8))
        assert rows["fastbert"]["floor_milliseconds"] == pytest.approx(10.0)

    def test_percentiles(self):
        found = harness.summarise([value / 1e3 for value in (1, 2, 3, 4, 5, 6)])
        assert (found.median, found.p20, found.p80, found.rounds) == (3.5, pytest.approx(2.0), pytest.approx(5.0), 6)


def test_memory_counts_what_autograd_keeps_once():
    weight = torch.randn(64, 64, requires_grad=True)

    def call():
        hidden = torch.ones(1024, 64) @ weight  # keeps its left operand
        return hidden * hidden  # keeps hidden twice

    assert memory(call, CPU)["kept"] == 2 * 1024 * 64 * 4


def test_memory_sees_the_peak():
    found = memory(lambda: torch.ones(64 * 2**20, dtype=torch.int8).add_(1), CPU)["peak"]
    assert found is None or 60 * 2**20 < found < 80 * 2**20


class TestShapes:
    def test_even_lengths_have_the_share(self):
        batch = shapes.even(16, 128, 0.64)
        assert max(batch.lengths) == batch.seqlen == 128
        assert 1 - batch.padding_ratio == pytest.approx(0.64, abs=0.005)

    @pytest.mark.parametrize("quantiles", [shapes.SENTENCES, shapes.DOCSTRINGS, shapes.DOCUMENTS])
    def test_drawn_lengths_follow_the_distribution(self, quantiles):
        lengths = sorted(shapes.drawn("x", 200, quantiles).lengths)
        for share in (0.25, 0.5, 0.75):
            assert lengths[int(200 * share)] == pytest.approx(quantiles[int(20 * share)], abs=8)

    def test_inputs_are_right_padded(self):
        batch = shapes.even(4, 16, 0.75)
        inputs = batch.inputs(2000)
        assert inputs["attention_mask"].sum(1).tolist() == list(batch.lengths)
        assert not inputs["input_ids"][~batch.mask()].any()
        assert batch.cu_seqlens().tolist()[-1] == batch.tokens

    def test_flops(self):
        """Those of section 7 of the paper's sizes by hand: one layer, one sequence of one token."""
        model = shapes.Model("one", 1, 4, 2, 16)
        assert model.forward_flops([1]) == 2 * (4 * 16 + 2 * 64) + 16


def test_every_op_has_a_benchmark_of_its_name():
    from fastbert.backends import select

    folder = harness.__file__.rpartition("/")[0]
    import importlib

    for op in select._TABLES:
        module = importlib.import_module(f"benchmarks.bench_{op}")
        for device in ("cpu", "cuda"):
            works = {case.work for case in module.cases(device)}
            assert works == {f"{op} {direction}" for direction in suite.DIRECTIONS}, folder


def test_what_only_a_gpu_has_is_measured_there_only():
    assert bench_unpad.cases("cpu") == []
    assert {case.work for case in bench_unpad.cases("cuda")} == {"unpad forward"}


@pytest.mark.parametrize(
    ("device", "kind", "name"),
    [
        ("Intel(R) Xeon(R) Processor (avx2, avx512f, avx512_bf16, amx_bf16)", "cpu", "intel-xeon-amx-bf16-2-threads"),
        ("AMD EPYC 9654 96-Core Processor (avx2, avx512f)", "cpu", "amd-epyc-9654-96-core-2-threads"),
        ("NVIDIA H200", "cuda", "nvidia-h200"),
    ],
)
def test_names_of_devices(device, kind, name):
    assert slug({"device": device, "kind": kind, "threads": 2}) == name
