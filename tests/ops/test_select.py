"""The choice of an implementation and its explanation."""

import dataclasses
import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch

import fastbert.ops
from fastbert.backends import extension, select
from fastbert.ops.attention import api as attention_api

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


@dataclasses.dataclass
class Serves:
    """The requests that an implementation can serve where everything is installed; None: any."""

    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    dropout: bool = True
    largest_head: int = 1000
    head_multiple: int = 1

    def __contains__(self, request):
        return (
            self.device in (None, request.device)
            and (self.dtypes is None or request.dtype in self.dtypes)
            and (self.dropout or request.dropout_p == 0.0)
            and request.head_size <= self.largest_head
            and request.head_size % self.head_multiple == 0
        )


SIXTEEN_BITS = (torch.float16, torch.bfloat16)
UP_TO_32_BITS = (torch.float32, *SIXTEEN_BITS)
TRITON = Serves("cuda", UP_TO_32_BITS)
FLASH = Serves("cuda", SIXTEEN_BITS, dropout=False, largest_head=256, head_multiple=8)
# In the order of preference.
TABLES = {
    "attention": {
        "triton": Serves("cuda", UP_TO_32_BITS, largest_head=128),
        "flash_attn": FLASH,
        "torch_varlen": FLASH,
        "amx": Serves("cpu", (torch.bfloat16,), dropout=False),
        "simd": Serves("cpu", (torch.float32,), dropout=False),
        "sdpa": Serves("cpu", (*UP_TO_32_BITS, torch.float64), dropout=False),
        "cpu": Serves("cpu", UP_TO_32_BITS),
        "reference": Serves(),
    },
    "bias_dropout_residual": {
        "cuda": Serves("cuda", UP_TO_32_BITS),
        "cpu": Serves("cpu", UP_TO_32_BITS),
        "reference": Serves(),
    },
    "bias_dropout_residual_layer_norm": {
        "cuda": Serves("cuda", UP_TO_32_BITS),
        "cpu": Serves("cpu", UP_TO_32_BITS),
        "composed": Serves(),
        "reference": Serves(),
    },
    "bias_gelu": {"triton": TRITON, "torch": Serves(), "reference": Serves()},
    "embedding_layer_norm": {"triton": TRITON, "torch": Serves(), "reference": Serves()},
    "layer_norm": {"triton": TRITON, "torch": Serves(), "reference": Serves()},
    "linear_gelu": {
        "by_shape": TRITON,
        "persistent": Serves("cuda", SIXTEEN_BITS),
        "triton": TRITON,
        "cublas_triton": TRITON,
        "torch": Serves(),
        "reference": Serves(),
    },
}


@pytest.fixture
def everything_installed(monkeypatch):
    """A GPU isn't asked for its capability."""
    monkeypatch.setattr(select, "_TRITON_DEVICE", "cuda")
    for name in ("_missing_extension", "_missing_amx", "_missing_simd", "_missing_triton"):
        monkeypatch.setattr(select, name, lambda: None)
    monkeypatch.setattr(select, "_missing_cuda_extension", lambda index: None)
    monkeypatch.setattr(select, "_capability", lambda index: None)
    monkeypatch.setattr(importlib.import_module("fastbert.ops.attention.api"), "_missing_flash_attn", lambda: None)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("op", OPS)
def test_who_can_serve_what(op):
    expected = TABLES[op]
    dtypes = (*UP_TO_32_BITS, torch.float64)
    for device, dtype, dropout_p, size in itertools.product(
        ("cpu", "cuda", "mps"), dtypes, (0.0, 0.1), (8, 12, 128, 129, 136, 256, 257, 264)
    ):
        request = select.Request(device, dtype, dropout_p, size)
        rows = select.table(op).explain(request)
        assert [row.implementation for row in rows] == list(expected)
        able = [name for name, serves in expected.items() if request in serves]
        assert [row.implementation for row in rows if not row.reasons] == able, request
        assert select.table(op).choose(None, request) == able[0]


def test_every_op_is_in_the_tables():
    assert {row.op for row in select.explain(REQUEST)} == set(OPS) == set(fastbert.ops.__all__)


@pytest.mark.parametrize("op", [op for op in OPS if "cpu" in TABLES[op]])
def test_the_extension_s_reason_is_shown(monkeypatch, op):
    told = "fastbert._C is broken: reinstall"
    for name in ("missing", "missing_amx", "missing_simd"):
        monkeypatch.setattr(extension, name, lambda: told)
    for dtype in (torch.float32, torch.bfloat16):
        rows = {row.implementation: row for row in select.table(op).explain(select.Request("cpu", dtype))}
        assert rows["cpu"].reasons == (told,)
        own = {torch.float32: "simd", torch.bfloat16: "amx"}[dtype]
        assert own not in rows or rows[own].reasons == (told,)
        assert rows["reference"].reasons == ()


def test_a_gpu_that_the_build_does_not_know(monkeypatch):
    monkeypatch.setattr(extension, "missing_cuda", lambda: None)
    monkeypatch.setattr(extension, "missing_on_device", lambda index: f"device {index} is too old" if index else None)
    table = select.table("bias_dropout_residual")
    first, second = (select.Request("cuda", torch.float32, index=index) for index in (0, 1))
    assert table.choose(None, first) == table.choose(None, select.Request("cuda", torch.float32)) == "cuda"
    assert table.choose(None, second) == "reference"
    with pytest.raises(select.UnsupportedError, match="device 1 is too old"):
        table.choose("cuda", second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_kernels_come_first_on_a_gpu(p, dtype, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(select, "_TRITON_DEVICE", "cuda")
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


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (ImportError("no such file"), "the package flash-attn can't be imported (no such file): `pip install flash-"),
        (SimpleNamespace(), "the installed flash-attn is older than 2.7: `pip install --upgrade flash-attn"),
        (SimpleNamespace(_wrapped_flash_attn_varlen_forward=1), None),
    ],
    ids=["absent", "old", "new"],
)
def test_what_flash_attn_lacks(found, told, monkeypatch):
    def import_module(name):
        if isinstance(found, ImportError):
            raise found
        return found

    monkeypatch.setattr(importlib, "import_module", import_module)
    reason = attention_api._import_flash_attn.__wrapped__()
    assert reason is None if told is None else reason.startswith(told)


@pytest.mark.parametrize("capability", [None, (8, 9), (9, 0), (10, 0)])
def test_the_capability_of_the_device(monkeypatch, capability):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability)
    found = list(select.needs_capability(select.Request("cuda", torch.float16, index=2), 90))
    old = capability == (8, 9)
    assert found == (["it needs compute capability 9.0, and the device has 8.9"] if old else [])
    assert asked == ([] if capability is None else [2])
    assert not list(select.needs_capability(select.Request("cpu", torch.float16), 90))


@pytest.mark.parametrize("value", ["1", "true", "True", "on", "YES", "y", "", "0", "false", "off", "no", "n", "2"])
def test_the_interpreter_is_asked_for_as_triton_understands_it(monkeypatch, value):
    knobs = pytest.importorskip("triton.knobs", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert select._is_on(value) == knobs.getenv_bool("TRITON_INTERPRET", False)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("interpreting", [False, True])
def test_triton_s_kernels_are_for_a_gpu_and_not_for_the_interpreter(monkeypatch, interpreting):
    monkeypatch.setattr(select, "_INTERPRETING", interpreting)
    on = {device: list(select.needs_triton(select.Request(device, torch.float32))) for device in ("cpu", "cuda")}
    told = ["TRITON_INTERPRET=1 is set, and Triton's interpreter doesn't know the assembly in these kernels"]
    expected = told if interpreting else []
    assert on == {"cpu": ["it runs on cuda, and the tensors are on cpu", *expected], "cuda": expected}
    monkeypatch.setattr(select, "_missing_triton", lambda: "Triton is broken")
    assert list(select.needs_triton(select.Request("cpu", torch.float32)))[-1] == "Triton is broken"
