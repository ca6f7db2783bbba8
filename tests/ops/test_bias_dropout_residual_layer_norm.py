"""LayerNorm(residual + dropout(x + bias)): sizes, probabilities, mixed dtypes."""

import pytest
import torch
from ops import problems
from ops.problems import EPS, bias_dropout_residual_layer_norm

from fastbert import ops

implementations = pytest.mark.parametrize("impl", bias_dropout_residual_layer_norm().implementations())


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 312), (5, 768), (768,), (3, 1023)], ids=str)
def test_sizes_case_26(shape, p, dtype):
    bias_dropout_residual_layer_norm(shape, dtype, p).check()
    bias_dropout_residual_layer_norm(shape, dtype, p, has_bias=False).check()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    bias_dropout_residual_layer_norm(shape).check()


@pytest.mark.many_programs
def test_more_than_65536_rows_case_20():
    bias_dropout_residual_layer_norm((65_537, 9)).check()


@implementations
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_is_layer_norm_of_bias_dropout_residual_case_26(p, impl):
    x, residual, (bias, weight, ln_bias) = torch.randn(40, 24), torch.randn(40, 24), torch.randn(3, 24)
    seed = torch.tensor([problems.SEED])
    output = ops.bias_dropout_residual_layer_norm(x, bias, residual, weight, ln_bias, EPS, p=p, seed=seed, impl=impl)
    hidden = ops.bias_dropout_residual(x, bias, residual, p=p, seed=seed, impl="reference")
    torch.testing.assert_close(output, ops.layer_norm(hidden, weight, ln_bias, EPS, impl="reference"))
    if p == 1.0:
        torch.testing.assert_close(output, ops.layer_norm(residual, weight, ln_bias, EPS, impl="reference"))


@implementations
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_mixed_dtypes_promote(p, impl):
    """As in autocast: the branch in 16 bits, the residual and the parameters in float32, and other mixtures."""
    dtypes = (torch.bfloat16, torch.float32, torch.float32, torch.float32, torch.float64)
    leaves = [
        torch.randn(shape).to(dtype).requires_grad_()
        for shape, dtype in zip([(3, 8), (8,), (3, 8), (8,), (8,)], dtypes, strict=True)
    ]
    output = ops.bias_dropout_residual_layer_norm(*leaves, EPS, p=p, impl=impl)
    assert output.dtype == torch.float32
    assert tuple(gradient.dtype for gradient in torch.autograd.grad(output.sum(), leaves)) == dtypes
    halves = [x.detach().half() for x in leaves[:3]]
    assert ops.bias_dropout_residual_layer_norm(*halves, *leaves[3:], EPS, impl=impl).dtype == torch.float16


@implementations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_constant_row_case_21(dtype, impl):
    x, bias = torch.full((2, 768), 3.0, dtype=dtype, requires_grad=True), torch.zeros(768, dtype=dtype)
    ln_bias = torch.randn(768).to(dtype)
    output = ops.bias_dropout_residual_layer_norm(x, bias, x, bias + 1.0, ln_bias, EPS, impl=impl)
    (gradient,) = torch.autograd.grad(output, x, torch.full_like(output, 1e-3))
    assert torch.equal(output, ln_bias.expand(2, 768))
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"residual": torch.zeros(8)}, ValueError, r"residual has shape \(8,\); it must be \(2, 8\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\)"),
        ({"weight": torch.zeros(2, 8)}, ValueError, r"weight has shape \(2, 8\); it must be \(8,\)"),
        ({"ln_bias": torch.zeros(8, dtype=torch.int64)}, TypeError, "ln_bias has dtype torch.int64"),
        ({"ln_bias": torch.zeros(8, device="meta")}, ValueError, "ln_bias is on meta; it must be on cpu, where x is"),
        ({"p": 1.1}, ValueError, "p is 1.1; it must be between 0 and 1"),
        ({"p": 0.5, "seed": torch.tensor([1.0])}, TypeError, "seed has dtype torch.float32; it must be torch.int64"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8)}
    arguments |= {name: torch.zeros(8) for name in ("bias", "weight", "ln_bias")} | change
    with pytest.raises(error, match=message):
        ops.bias_dropout_residual_layer_norm(**arguments, eps=EPS)
