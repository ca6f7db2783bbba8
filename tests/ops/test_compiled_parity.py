"""Triton's kernels as they are compiled for compute capability 9.0, executed; and faults that this finds.

After the compiler's stage "ttgir" a kernel has its layouts, its buffers in shared memory, and copies and products that
run beside it. Each is run twice: copies end as late as they may and products at once, and the other way round.
"""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from models import test_kernels
from ops import problems

from fastbert.backends import select

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(select._TRITON_DEVICE != "cpu", reason="only --triton runs Triton's kernels on the CPU"),
]
if select._TRITON_DEVICE == "cpu":
    import triton.language as tl
    from triton_ir import execute, launches, memory, parse

    from fastbert.backends.triton_utils import jit
else:
    tl, jit = SimpleNamespace(constexpr=None), lambda function: function

MODULES = ("attention", "bias_gelu", "embedding_layer_norm", "layer_norm", "linear_gelu")
# Lengths of one and of several blocks, with empty sequences between them.
SHORT, LONG = (3, 0, 31, 1), (70, 0, 1, 150)
PROBLEMS = {
    "attention, short": (problems.attention, {"lengths": SHORT, "heads": 2}),
    "attention, short, dropout": (problems.attention, {"lengths": SHORT, "heads": 2, "p": 0.1}),
    "attention, long": (problems.attention, {"lengths": LONG, "heads": 1, "size": 64}),
    "attention, long, dropout": (problems.attention, {"lengths": LONG, "heads": 1, "size": 64, "p": 0.1}),
    "attention, odd heads, long, dropout": (problems.attention, {"lengths": LONG, "heads": 2, "size": 40, "p": 0.1}),
    "layer_norm": (problems.layer_norm, {"shape": (9, 72)}),
    "bias_gelu": (problems.bias_gelu, {"shape": (9, 1030)}),
    "embedding_layer_norm": (problems.embedding_layer_norm, {"tokens": 150}),
    "embedding_layer_norm, without dropout": (problems.embedding_layer_norm, {"tokens": 20, "hidden": 72, "p": 0.0}),
    "linear_gelu": (problems.linear_gelu, {"shape": (70, 72), "features": 140}),
    "linear_gelu, tanh": (problems.linear_gelu, {"shape": (70, 71), "features": 33, "approximate": "tanh"}),
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["late products", "late copies"])
def beside(request, monkeypatch):
    """The order in which what runs beside a program ends."""
    found = launches.Settings("ttgir", request.param)
    monkeypatch.setattr(launches, "settings", found)
    return found


@pytest.fixture
def two_multiprocessors(monkeypatch):
    """So few that programs take several blocks."""
    for name in ("layer_norm", "bias_gelu", "embedding_layer_norm"):
        monkeypatch.setattr(select.load(name, "triton"), "multiprocessors", lambda device: 2)
    monkeypatch.setattr(importlib.import_module("fastbert.ops.linear_gelu.persistent"), "multiprocessors", lambda x: 2)


@pytest.mark.usefixtures("two_multiprocessors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_parity(name, dtype, beside):
    make, sizes = PROBLEMS[name]
    make(**sizes, dtype=dtype).check("triton")
    assert beside.ran


@pytest.mark.usefixtures("two_multiprocessors")
@pytest.mark.parametrize(("rows", "features"), [(700, 300), (9, 33)])
def test_parity_of_the_persistent_product(rows, features, beside):
    problems.linear_gelu((rows, 200), features, dtype=torch.bfloat16).check("persistent")
    assert "persistent_kernel" in {name for _, name in beside.ran}


@pytest.mark.parametrize("shape", [(5, 40), (40, 3)], ids=str)
def test_the_tokens_of_a_mask(shape, beside):
    from fastbert.ops.unpad import reference, triton

    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    ids = torch.arange(mask.numel()).view(shape)
    cu_seqlens, indices, facts, packed = triton.unpad_ids(mask.to(torch.int64), True, ids, ids)
    oracle = reference.unpad(mask, None, True)
    assert torch.equal(cu_seqlens, oracle[0])
    assert torch.equal(indices, oracle[1])
    assert facts[:2].tolist() == oracle[2][:2].tolist()
    assert torch.equal(packed, torch.stack([indices, indices % shape[1], indices]))
    assert {name for _, name in beside.ran} == {"lengths_kernel", "indices_kernel"}


@pytest.mark.parametrize(("dtype", "seqlen"), [(torch.float32, 20), (torch.bfloat16, 140)], ids=str)
def test_two_layers_of_bert(dtype, seqlen, beside, monkeypatch):
    """Forward and backward, with dropout."""
    ran = {}
    load = select.load
    monkeypatch.setattr(select, "load", lambda op, name: ran.update({(op, name): 1}) or load(op, name))
    test_kernels.test_loss_and_every_gradient(dtype, seqlen, ran, monkeypatch)


def test_every_kernel_is_among_them():
    """Those that the problems launch are all that the modules have."""
    found = launches.Settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "settings", found)
        for make, sizes in PROBLEMS.values():
            problem = make(**sizes, dtype=torch.bfloat16)
            output = problem.actual(**{k: x.requires_grad_() for k, x in problem.tensors.items()}, impl="triton")
            output.backward(torch.ones_like(output) if problem.dy is None else problem.dy)
    modules = [importlib.import_module(f"fastbert.ops.{name}.triton") for name in MODULES]
    kernels = {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    assert len(kernels) >= 12
    assert found.ran >= kernels


@jit
def _copy(x_ptr, y_ptr, count, first, MASKED: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = first + tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    if MASKED:
        tl.store(y_ptr + at, x, mask=at < count)
    else:
        tl.store(y_ptr + at, x)


@jit
def _neighbour(x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + (at + BLOCK) % (4 * BLOCK)))


@jit
def _all_to_one_place(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.zeros([BLOCK], tl.int32), tl.load(x_ptr + tl.arange(0, BLOCK)))


class TestFaultsOfKernels:
    """What is wrong in a kernel is found as it runs."""

    def copy(self, x=None, first=0, masked=True, step=16):
        x = torch.randn(100) if x is None else x
        y = torch.full([200], 7.0)
        _copy[(7,)](x, y[:100], 100, first, MASKED=masked, STEP=step, BLOCK=16)
        return x, y

    def test_none(self):
        x, y = self.copy()
        assert torch.equal(y[:100], x)
        assert (y[100:] == 7.0).all()

    def test_a_store_that_is_not_masked(self):
        with pytest.raises(memory.OutOfBoundsError, match="a write of y_ptr at element 111, and its last is 99"):
            self.copy(masked=False)

    def test_a_read_before_the_start(self):
        with pytest.raises(memory.OutOfBoundsError, match="a read of x_ptr at element -5, and its last is 99"):
            self.copy(first=-5)

    def test_a_read_between_rows(self):
        with pytest.raises(memory.OutOfBoundsError, match=r"a read between the rows of x_ptr, \(4, 25\)"):
            self.copy(torch.zeros(4, 30)[:, :25])

    def test_two_programs_that_write_to_one_place(self):
        with pytest.raises(memory.RaceError, match="writes where another writes, in y_ptr"):
            self.copy(step=12)

    @pytest.mark.parametrize("at_once", [1, 1 << 18], ids=["one after the other", "at once"])
    def test_a_program_that_reads_what_another_writes(self, at_once, monkeypatch):
        monkeypatch.setattr(execute, "AT_ONCE", at_once)
        with pytest.raises(memory.RaceError, match=r"(reads|writes) what another (reads|writes), in x_ptr"):
            _neighbour[(4,)](torch.randn(64), BLOCK=16)

    def test_a_program_that_writes_two_values_to_one_place(self):
        with pytest.raises(memory.RaceError, match="a program writes two values to one place of y_ptr"):
            _all_to_one_place[(1,)](torch.arange(16.0), torch.empty(1), BLOCK=16)
        _all_to_one_place[(1,)](torch.ones(16), torch.empty(1), BLOCK=16)


LONG_ATTENTION = (problems.attention, {"lengths": (300, 0, 1), "heads": 1, "size": 64}, "triton")
PERSISTENT = (problems.linear_gelu, {"shape": (700, 200), "features": 300}, "persistent")
# What is changed in a compiled kernel, whether copies end late when that is seen, and what is said then.
FAULTS = {
    "a copy is not waited for": (LONG_ATTENTION, r"(ttg\.async_wait .*num = )\d+", r"\g<1>99", True, "off by"),
    "one buffer for all copies": (
        *(LONG_ATTENTION, r"(ttg\.memdesc_index %\w+)\[%\w+\]", r"\1[%c0_i32]", False, "off by"),
    ),
    "a fence is missing": (LONG_ATTENTION, r"ttng\.fence_async_shared.*\n", "", False, "written without a fence"),
    "too few bytes come": (
        *(PERSISTENT, r"(ttng\.barrier_expect .*), 32768,", r"\1, 65536,", True, "a barrier that waits for 65536"),
    ),
    "a barrier is not waited for": (PERSISTENT, r"ttng\.wait_barrier.*\n", "", True, "off by"),
    "a store is not waited for": (
        *(PERSISTENT, r"(ttng\.async_tma_store_wait .*pendings = )\d+", r"\g<1>99", True, "off by"),
    ),
}


@pytest.mark.usefixtures("two_multiprocessors")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_compiler(fault, monkeypatch):
    (make, sizes, impl), old, new, late_copies, told = FAULTS[fault]
    monkeypatch.setattr(launches, "settings", launches.Settings("ttgir", late_copies))
    changed = []

    def parsed(text):
        text, count = re.subn(old, new, text)
        changed.append(count)
        return parse.parse(text)

    problem = make(**sizes, dtype=torch.bfloat16)
    monkeypatch.setattr(launches, "parse", parsed)
    launches.compiled.cache_clear()
    try:
        with pytest.raises(AssertionError, match=told):
            problem.check(impl)
    finally:
        launches.compiled.cache_clear()
    assert any(changed)


def test_what_is_not_known_is_not_left_out():
    text = "tt.func public @kernel(%arg0: i32) attributes {noinline = false} {\n%0 = tt.fancy %arg0 : i32\n}"
    with pytest.raises(NotImplementedError, match=r"tt\.fancy in kernel"):
        execute.Launch(parse.parse(text), [("x", 3)], (1,)).run()
