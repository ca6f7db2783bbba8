"""LayerNorm: sizes, the statistics' accuracy, and parameters in another dtype."""

import pytest
import torch
from ops import problems
from ops.problems import layer_norm

from fastbert import ops
from fastbert.backends import select

pytestmark = pytest.mark.triton
IMPLEMENTATIONS = layer_norm().implementations()
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 312), (5, 768), (768,), (3, 1023), (1, 1, 1, 3072)], ids=str)
def test_sizes(shape, dtype):
    layer_norm(shape, dtype).check()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    layer_norm(shape).check()


def test_one_column():
    """The output is the bias, whatever the input."""
    problem = layer_norm((5, 1))
    for impl in IMPLEMENTATIONS:
        assert torch.equal(problem.actual(**problem.tensors, impl=impl), problem.tensors["bias"].expand(5, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_65536_rows_case_20(dtype):
    layer_norm((65_537, 9), dtype).check()


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="Triton's kernels don't run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(99, 40), (50, 700), (25, 1000)], ids=str)
def test_more_rows_than_programs(shape, dtype, monkeypatch):
    """On a small device a program of the backward goes on to further rows."""
    monkeypatch.setattr(select.load("layer_norm", "triton"), "multiprocessors", lambda device: 1)
    layer_norm(shape, dtype).check("triton")


@implementations
@half_dtypes
def test_constant_rows_case_21(dtype, impl):
    """The variance is zero, and 1 / sqrt(eps) a million: float16 can hold no larger incoming gradient's result."""
    values = torch.cat([torch.tensor([0.0, 0.1, 1000.0]), 5.0 * torch.randn(97)]).to(dtype)
    x = values[:, None].repeat(1, 768).requires_grad_()
    weight, bias = torch.randn(2, 768).to(dtype)
    output = ops.layer_norm(x, weight, bias, 1e-12, impl=impl)
    (gradient,) = torch.autograd.grad(output, x, torch.full_like(output, 1e-3))
    torch.testing.assert_close(output, bias.expand(100, 768), rtol=1e-2, atol=1e-2)
    assert gradient.isfinite().all()


@implementations
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_large_mean_case_22(spread, impl):
    """E[x²] - E[x]² would be off by 8 here; two passes leave the rounding of the mean, 5e-4, over the spread."""
    x = 1e4 + spread * torch.randn(64, 768)
    output = ops.layer_norm(x, torch.ones(768), torch.zeros(768), 1e-12, impl=impl)
    exact = torch.nn.functional.layer_norm(x.double(), (768,), eps=1e-12)
    assert (output - exact).abs().max() < 5e-3 / spread
    assert abs(output.square().mean().item() - 1.0) < 1e-3 / spread**2


@implementations
def test_largest_float16_case_23(impl):
    """Squares of 6e4 overflow float16, and 768 of them are a sum of 3e12."""
    signs = torch.ones(4, 768).bernoulli_().mul_(2.0).sub_(1.0)
    x = (signs * (6e4 + 100.0 * torch.randn(4, 768))).half()
    assert x.isfinite().all()
    weight, bias = torch.randn(2, 768).half()
    output = ops.layer_norm(x, weight, bias, 1e-12, impl=impl)
    exact = torch.nn.functional.layer_norm(x.double(), (768,), weight.double(), bias.double(), 1e-12)
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=1e-3)
    problem = layer_norm((4, 768), torch.float16)
    problem.tensors["x"] = x
    problem.check(impl)


@implementations
@half_dtypes
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_another_dtype(parameter_dtype, dtype, impl):
    """The output has the dtype of x, each gradient that of its argument."""
    problem = layer_norm((3, 24), dtype)
    tensors = dict(problem.tensors)
    tensors["weight"] = tensors["weight"].to(parameter_dtype)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    output = ops.layer_norm(**leaves, eps=1e-12, impl=impl)
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output.sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == [dtype, parameter_dtype, dtype]
    torch.testing.assert_close(output, problem.actual(**problem.tensors, impl=impl), rtol=1e-2, atol=1e-2)


@implementations
@half_dtypes
def test_16_bit_gradients_of_parameters_are_summed_in_float32(dtype, impl):
    """Over 1280 rows PyTorch's own CPU kernel is off by several per cent, which parity would allow."""
    problem = layer_norm((1280, 64), dtype)
    leaves = {name: x.requires_grad_() for name, x in problem.tensors.items()}
    doubles = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    dy = torch.randn(1280, 64).to(dtype)
    gradients = torch.autograd.grad(problem.actual(**leaves, impl=impl), list(leaves.values()), dy)
    exact = torch.autograd.grad(problem.oracle(**doubles), list(doubles.values()), dy.double())
    for gradient, truth in zip(gradients[1:], exact[1:], strict=True):
        step = torch.finfo(dtype).eps * truth.abs().max()
        assert (gradient.double() - truth).abs().max() <= step


@implementations
def test_statistics(impl):
    """mean and rstd ``[..., 1]`` in float32, for a backward of another implementation."""
    x = torch.randn(2, 5, 24).to(torch.bfloat16)
    weight = torch.ones(24).to(torch.bfloat16)
    _, mean, rstd = torch.ops.fastbert.layer_norm(x, weight, weight, 1e-5, impl)
    assert mean.shape == rstd.shape == (2, 5, 1)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean(-1, keepdim=True))
    torch.testing.assert_close(rstd, torch.rsqrt(x.float().var(-1, correction=0, keepdim=True) + 1e-5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64; it may be any floating"),
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\); its last dimension"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x has shape \(3, 0\); its last dimension"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
        ({"weight": torch.zeros(8, dtype=torch.int32)}, TypeError, "weight has dtype torch.int32"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias has shape \(1, 8\); it must be \(8,\)"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta; it must be on cpu, where x is"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "bias": torch.zeros(8)} | change
    with pytest.raises(error, match=message):
        ops.layer_norm(**arguments, eps=1e-5)
