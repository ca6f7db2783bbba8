"""residual + dropout(x + bias): sizes, probabilities, mixed dtypes, and the compiled kernels bit for bit."""

import pytest
import torch
from ops import problems
from ops.problems import bias_dropout_residual

from fastbert import ops
from fastbert.backends import extension, philox, select

IMPLEMENTATIONS = bias_dropout_residual().implementations()
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
all_dtypes = pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@all_dtypes
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 3, 312), (130, 768), (768,), (3, 1023)], ids=str)
def test_sizes_case_26(shape, p, dtype):
    bias_dropout_residual(shape, dtype, p).check()
    bias_dropout_residual(shape, dtype, p, has_bias=False).check()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    bias_dropout_residual(shape).check()


@all_dtypes
def test_more_than_65536_rows_case_20(dtype):
    bias_dropout_residual((65_537, 9), dtype).check()


@needs_extension
@all_dtypes
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 1023), (64, 768), (70, 24)], ids=str)
def test_compiled_output_is_the_oracle_s_bit_for_bit(shape, p, dtype):
    problem = bias_dropout_residual(shape, dtype, p)
    tensors = {name: x.requires_grad_() for name, x in problem.tensors.items()}
    outputs = [problem.actual(**tensors, impl=impl) for impl in ("cpu", "reference")]
    assert torch.equal(*outputs)
    dy = torch.randn(shape).to(dtype)
    dx, expected = (torch.autograd.grad(output, tensors["x"], dy)[0] for output in outputs)
    assert torch.equal(dx, expected)


@implementations
def test_probabilities_case_26(impl):
    x, bias, residual = torch.randn(400, 500), torch.randn(500), torch.randn(400, 500)
    assert torch.equal(ops.bias_dropout_residual(x, bias, residual, p=0.0, impl=impl), residual + (x + bias))
    assert torch.equal(ops.bias_dropout_residual(x, bias, residual, p=1.0, impl=impl), residual)
    output = ops.bias_dropout_residual(x, bias, residual, p=0.1, impl=impl)
    kept = output != residual
    assert abs(kept.double().mean().item() - 0.9) < 0.01
    torch.testing.assert_close((output - residual)[kept], philox.scale(0.1) * (x + bias)[kept], rtol=1e-4, atol=1e-5)


@implementations
def test_seeds(impl):
    """A given seed decides the mask; without one torch's default generator does."""

    def mask(seed):
        x = torch.ones(50, 40)
        return ops.bias_dropout_residual(x, None, torch.zeros_like(x), p=0.5, seed=seed, impl=impl) != 0

    assert torch.equal(mask(torch.tensor([3])), mask(torch.tensor(3)))
    assert torch.equal(mask(torch.tensor([3, 4, 5])[1:2]), mask(torch.tensor([4])))
    assert not torch.equal(mask(torch.tensor([3])), mask(torch.tensor([4])))
    torch.manual_seed(1)
    first, second = mask(None), mask(None)
    torch.manual_seed(1)
    assert torch.equal(mask(None), first)
    assert not torch.equal(first, second)


@implementations
def test_mixed_dtypes_promote(impl):
    """As in autocast: the branch in 16 bits, the residual in float32."""
    x, bias = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)
    residual = torch.randn(3, 8, requires_grad=True)
    output = ops.bias_dropout_residual(x, bias, residual, impl=impl)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, residual + (x.float() + bias))
    gradients = torch.autograd.grad(output.sum(), (x, bias, residual))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_what_can_not_serve_case_44():
    x = torch.zeros(2, 8)
    with pytest.raises(select.UnsupportedError, match="impl='cuda' can't serve this call: it runs on cuda"):
        ops.bias_dropout_residual(x, None, x, impl="cuda")
    with pytest.raises(select.UnsupportedError, match="it computes in float32, float16, bfloat16, and the dtype is"):
        ops.bias_dropout_residual(x.double(), None, x.double(), impl="cpu")
    assert ops.bias_dropout_residual(x.double(), None, x.double()).dtype == torch.float64


def test_without_the_extension_case_44(monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: "it was never built")
    x = torch.ones(2, 8)
    assert torch.equal(ops.bias_dropout_residual(x, None, x), 2.0 * x)
    with pytest.raises(select.UnsupportedError, match="it was never built"):
        ops.bias_dropout_residual(x, None, x, impl="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x has shape \(2, 0\)"),
        ({"residual": torch.zeros(8)}, ValueError, r"residual has shape \(8,\); it must be \(2, 8\)"),
        ({"residual": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "residual has dtype torch.int64"),
        ({"residual": torch.zeros(2, 8, device="meta")}, ValueError, "residual is on meta; it must be on cpu"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\)"),
        ({"p": -0.1}, ValueError, "p is -0.1; it must be between 0 and 1"),
        ({"p": float("nan")}, ValueError, "p is nan"),
        ({"p": 0.5, "seed": torch.tensor([1], dtype=torch.int32)}, TypeError, "seed has dtype torch.int32"),
        ({"p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, r"seed has shape \(2,\); it must hold one element"),
    ],
)
def test_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "bias": torch.zeros(8), "residual": torch.zeros(2, 8)} | change
    with pytest.raises(error, match=message):
        ops.bias_dropout_residual(**arguments)


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 1023), (64, 768), (65_537, 9)], ids=str)
def test_cuda_is_the_oracle_bit_for_bit(shape, p, dtype):
    problem = bias_dropout_residual(shape, dtype, p)
    tensors = {name: x.cuda().requires_grad_() for name, x in problem.tensors.items()}
    seed = torch.tensor([problems.SEED], device="cuda")
    outputs = [ops.bias_dropout_residual(**tensors, p=p, seed=seed, impl=impl) for impl in ("cuda", "reference")]
    assert torch.equal(*outputs)
    dy = torch.randn(shape, device="cuda").to(dtype)
    dx, expected = (torch.autograd.grad(output, tensors["x"], dy)[0] for output in outputs)
    assert torch.equal(dx, expected)


@pytest.mark.gpu
def test_cuda_beyond_2_to_the_31_elements_case_19():
    shape, seed = (2**21 + 1, 1031), torch.tensor([problems.SEED], device="cuda")
    x = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    output = ops.bias_dropout_residual(x, None, torch.zeros_like(x), p=0.5, seed=seed, impl="cuda").flatten()
    start = output.numel() - 4096
    assert start > 2**31
    assert torch.equal(output[start:] != 0, philox.hidden_draws(seed, 4096, start) < philox.threshold(0.5))
