"""gelu(x + bias): sizes, both forms, and the tails."""

import pytest
import torch
import torch.nn.functional as F
from ops import problems
from ops.problems import bias_gelu

from fastbert import ops
from fastbert.backends import select

pytestmark = pytest.mark.triton
implementations = pytest.mark.parametrize("impl", bias_gelu().implementations())
forms = pytest.mark.parametrize("approximate", ["none", "tanh"])


@forms
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 3, 312), (768,), (3, 1023)], ids=str)
def test_sizes(shape, dtype, approximate):
    bias_gelu(shape, dtype, approximate).check()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    bias_gelu(shape).check()


def test_more_than_65536_rows_case_20():
    bias_gelu((65_537, 9)).check()


@pytest.mark.skipif("triton" not in bias_gelu().implementations(), reason="Triton's kernels don't run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(100, 40), (9, 1030), (3, 9000)], ids=str)
def test_more_rows_than_programs(shape, dtype, monkeypatch):
    """On a small device a program of the backward goes on to further rows, and every block of columns has one."""
    monkeypatch.setattr(select.load("bias_gelu", "triton"), "multiprocessors", lambda device: 1)
    bias_gelu(shape, dtype).check("triton")


@implementations
@forms
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
def test_tails_case_24(dtype, approximate, impl):
    """gelu(10) is 10 and gelu(-10) is 0, with slopes 1 and 0; so further out, where x³ overflows float16."""
    x = torch.tensor([[10.0, 100.0], [-10.0, -100.0]], dtype=dtype, requires_grad=True)
    output = ops.bias_gelu(x, torch.zeros(2, dtype=dtype), approximate=approximate, impl=impl)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(output, x.detach().relu(), rtol=step, atol=step)
    torch.testing.assert_close(gradient, (x > 0).to(dtype), rtol=step, atol=step)


@implementations
def test_forms_differ_case_24(impl):
    """The tanh form is off by up to 5e-4, and neither stands in for the other."""
    x, zero = torch.linspace(-4.0, 4.0, 101), torch.zeros(101)
    for approximate in ("none", "tanh"):
        output = ops.bias_gelu(x, zero, approximate=approximate, impl=impl)
        torch.testing.assert_close(output, F.gelu(x, approximate=approximate), rtol=1e-6, atol=1e-6)
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-4


@implementations
def test_bias_of_another_dtype(impl):
    x, bias = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)
    output = ops.bias_gelu(x, bias, impl=impl)
    assert output.dtype == torch.bfloat16
    assert [x.dtype for x in torch.autograd.grad(output.sum(), (x, bias))] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\); it must be \(8,\)"),
        ({"bias": torch.zeros(8, dtype=torch.bool)}, TypeError, "bias has dtype torch.bool"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta; it must be on cpu, where x is"),
        ({"approximate": "erf"}, ValueError, "approximate is 'erf'; it may be 'none' or 'tanh'"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "bias": torch.zeros(8)} | change
    with pytest.raises(error, match=message):
        ops.bias_gelu(**arguments)
