"""The choice of an implementation and its explanation."""

import pytest
import torch

import fastbert.ops
from fastbert.backends import extension, select

OPS = (
    "attention",
    "bias_dropout_residual",
    "bias_dropout_residual_layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "layer_norm",
    "linear_gelu",
)
REQUEST = select.Request("cpu", torch.float32)


def cuda_only(request):
    yield from select.needs_device(request, "cuda")


def float16_without_dropout(request):
    yield from select.needs_dtype(request, torch.float16, torch.bfloat16)
    yield from select.needs_no_dropout(request)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(select, "_TABLES", {})
    return select.Table(
        "test_op",
        (
            select.Implementation("triton", "no.such.module", cuda_only),
            select.Implementation("half", "no.such.module", float16_without_dropout),
            select.Implementation("reference", "fastbert.ops.bias_gelu.reference", select.nothing),
        ),
    )


def test_the_first_that_can_serve(table):
    assert table.choose(None, select.Request("cuda", torch.float32)) == "triton"
    assert table.choose(None, select.Request("cpu", torch.float16)) == "half"
    assert table.choose(None, select.Request("cpu", torch.float16, dropout_p=0.1)) == "reference"
    assert table.choose(None, REQUEST) == "reference"


def test_an_explicit_one_never_falls_back(table):
    assert table.choose("reference", select.Request("cuda", torch.float32)) == "reference"
    sentence = "test_op: impl='triton' can't serve this call: it runs on cuda, and the tensors are on cpu"
    with pytest.raises(select.UnsupportedError, match=sentence):
        table.choose("triton", REQUEST)
    with pytest.raises(
        select.UnsupportedError, match="computes in float16, bfloat16, and the dtype is float32; it can't"
    ):
        table.choose("half", select.Request("cpu", torch.float32, dropout_p=0.1))


@pytest.mark.parametrize("name", ["", "cuda", "Triton"])
def test_unknown_names(table, name):
    with pytest.raises(
        ValueError, match=f"test_op: impl is '{name}'; it may be None or one of triton, half, reference"
    ):
        table.choose(name, REQUEST)


def test_nobody_can_serve(monkeypatch):
    monkeypatch.setattr(select, "_TABLES", {})
    table = select.Table("test_op", (select.Implementation("triton", "no.such.module", cuda_only),))
    with pytest.raises(select.UnsupportedError, match=r"no implementation can serve .*; triton: it runs on cuda"):
        table.choose(None, REQUEST)


def test_explain(table):
    rows = table.explain(select.Request("cpu", torch.float16))
    assert [(row.implementation, row.chosen) for row in rows] == [
        ("triton", False),
        ("half", True),
        ("reference", False),
    ]
    assert rows[0].reasons == ("it runs on cuda, and the tensors are on cpu",)
    assert rows[1].reasons == rows[2].reasons == ()
    assert select.explain(select.Request("cpu", torch.float16)) == rows


def test_load(table):
    assert select.table("test_op") is table
    assert select.load("test_op", "reference").__name__ == "fastbert.ops.bias_gelu.reference"
    with pytest.raises(ModuleNotFoundError):
        select.load("test_op", "triton")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_one_for_every_request(op, device, dtype):
    for dropout_p in (0.0, 0.1):
        rows = select.table(op).explain(select.Request(device, dtype, dropout_p, head_size=64))
        assert [row.implementation for row in rows][-1] == "reference"
        assert sum(row.chosen for row in rows) == 1
        assert all(row.op == op for row in rows)
        assert all(reason for row in rows for reason in row.reasons)


def test_every_op_is_in_the_tables():
    assert {row.op for row in select.explain(REQUEST)} == set(OPS) == set(fastbert.ops.__all__)


def test_the_extension_s_reason_is_shown(monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: "fastbert._C is broken: reinstall")
    rows = {row.implementation: row for row in select.table("bias_dropout_residual").explain(REQUEST)}
    assert rows["cpu"].reasons == ("fastbert._C is broken: reinstall",)
    assert rows["reference"].chosen


def test_a_gpu_that_the_build_does_not_know(monkeypatch):
    monkeypatch.setattr(extension, "missing_cuda", lambda: None)
    monkeypatch.setattr(extension, "missing_on_device", lambda index: f"device {index} is too old" if index else None)
    table = select.table("bias_dropout_residual")
    first, second = (select.Request("cuda", torch.float32, index=index) for index in (0, 1))
    assert table.choose(None, first) == table.choose(None, select.Request("cuda", torch.float32)) == "cuda"
    assert table.choose(None, second) == "reference"
    with pytest.raises(select.UnsupportedError, match="device 1 is too old"):
        table.choose("cuda", second)


@pytest.mark.skipif(select._INTERPRETING, reason="TRITON_INTERPRET=1 is set: Triton's kernels are for the cpu then")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_kernels_come_first_on_a_gpu(p, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    request = select.Request("cuda", dtype, p, 64)
    expected = {
        "attention": "triton",
        "layer_norm": "triton",
        "bias_gelu": "triton",
        "linear_gelu": "by_shape",
        "embedding_layer_norm": "triton",
    }
    if extension.missing_cuda() is None:
        expected |= {"bias_dropout_residual": "cuda", "bias_dropout_residual_layer_norm": "cuda"}
    assert {op: select.table(op).choose(None, request) for op in expected} == expected
