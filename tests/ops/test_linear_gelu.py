"""gelu(x Wᵀ + b): sizes, both forms, autocast, and what it keeps for the backward."""

import pytest
import torch
import torch.nn.functional as F
from ops import problems
from ops.problems import linear_gelu

from fastbert import ops

implementations = pytest.mark.parametrize("impl", linear_gelu().implementations())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "features"), [((3, 1), 1), ((2, 3, 7), 13), ((4, 312), 99), ((96,), 64)], ids=str)
def test_sizes(shape, features, dtype, approximate):
    linear_gelu(shape, features, dtype, approximate).check()
    linear_gelu(shape, features, dtype, approximate, has_bias=False).check()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    linear_gelu(shape).check()


@pytest.mark.many_programs
def test_more_than_65536_rows_case_20():
    linear_gelu((65_537, 5), 3).check()


@implementations
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_tails_case_24(approximate, dtype, impl):
    x = torch.tensor([[10.0], [-10.0], [100.0], [-100.0]], dtype=dtype, requires_grad=True)
    output = ops.linear_gelu(x, torch.ones(1, 1, dtype=dtype), None, approximate=approximate, impl=impl)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(output, x.detach().relu(), rtol=step, atol=step)
    torch.testing.assert_close(gradient, (x > 0).to(dtype), rtol=step, atol=step)


@implementations
def test_autocast_is_that_of_linear(impl):
    """Outputs, and gradients in the dtype of the arguments."""
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 8), (6, 8), (6,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.linear_gelu(x, weight, bias, impl=impl)
        expected = F.gelu(F.linear(x, weight, bias))
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(output.float().sum(), (x, weight, bias))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.linear_gelu(x, weight, bias, impl=impl).dtype == torch.float32


@implementations
def test_mixed_dtypes_promote(impl):
    x = torch.randn(5, 8).bfloat16().requires_grad_()
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6).bfloat16().requires_grad_()
    output = ops.linear_gelu(x, weight, bias, impl=impl)
    assert output.dtype == torch.float32
    gradients = torch.autograd.grad(output.sum(), (x, weight, bias))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.bfloat16]


@implementations
def test_keeps_the_input_of_the_gelu_only(impl):
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True), torch.randn(6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = ops.linear_gelu(x, weight, bias, impl=impl)
    assert [tensor.shape for tensor in saved] == [x.shape, weight.shape, output.shape]
    torch.testing.assert_close(saved[2], F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"weight": torch.zeros(8, dtype=torch.int8)}, TypeError, "weight has dtype torch.int8"),
        ({"weight": torch.zeros(6, 7)}, ValueError, r"weight has shape \(6, 7\); it must be \(I, 8\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight has shape \(8,\)"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \(8,\); it must be \(6,\)"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias is on meta"),
        ({"approximate": None}, ValueError, "approximate is None; it may be 'none' or 'tanh'"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)} | change
    with pytest.raises(error, match=message):
        ops.linear_gelu(**arguments)
