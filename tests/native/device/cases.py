"""What the CUDA kernels compute on the host, against the oracle; started by test_device.py, under the sanitizers."""

import os
from pathlib import Path

import pytest
import torch
from models import test_kernels
from native.device import on_host
from ops import problems

pytestmark = pytest.mark.triton
LIBRARY = Path(os.environ["FASTBERT_DEVICE_LIBRARY"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of one group and less, of part of a warp's, of one to four groups a thread, of several warps, and of more than
# registers hold where rows aren't aligned; and numbers of rows that end a tile or don't.
SHAPES = ((1, 1), (3, 7), (9, 8), (5, 100), (2, 256), (70, 264), (17, 520), (3, 768), (8, 776), (2, 1024), (3, 2056))
MAKERS = (problems.bias_dropout_residual, problems.bias_dropout_residual_layer_norm)


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def module(request):
    with on_host.served(LIBRARY) as module:
        module.run_in_descending_order(request.param)
        yield module
        assert module.launches > 0


def shifted(problem, elements):
    """The same tensors, their rows at addresses that aren't multiples of 16."""
    for name, x in problem.tensors.items():
        memory = torch.empty(x.numel() + elements, dtype=x.dtype)
        problem.tensors[name] = memory[elements:].view(x.shape).copy_(x)
    return problem


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_parity(make, shape, module):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16) if shape[1] <= 776 else (torch.float32,):
        # Of few numbers eager's largest error is small by luck.
        roundings = 1 if shape[0] * shape[1] > 500 else 4
        make(shape, dtype, has_bias=shape[1] != 100).check("cuda", roundings=roundings)


@pytest.mark.parametrize("make", MAKERS)
def test_without_dropout_and_in_float16(make, module):
    torch.manual_seed(0)
    make((9, 264), torch.float32, p=0.0).check("cuda")
    make((9, 264), torch.float16).check("cuda")
    make((9, 263), torch.float16, p=0.0).check("cuda")


@pytest.mark.parametrize("make", MAKERS)
def test_unaligned_rows(make, module):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shifted(make((9, 768), dtype), 1).check("cuda", roundings=2)
    shifted(make((3, 2056), torch.bfloat16), 1).check("cuda", roundings=2)


@pytest.mark.parametrize("module", [True], indirect=True, ids=["descending"])
def test_rows_that_registers_do_not_hold(module):
    torch.manual_seed(0)
    problems.bias_dropout_residual_layer_norm((2, 8200), torch.bfloat16).check("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_in_float32_and_a_second_gradient(dtype, module):
    from fastbert.ops.bias_dropout_residual_layer_norm import cuda, reference

    torch.manual_seed(0)
    shape, seed = (9, 264), torch.tensor([5])
    x, residual, dy, dy2 = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, ln_bias, bias = torch.randn(264), torch.randn(264), torch.randn(264).to(dtype)
    arguments = (bias, residual, weight, ln_bias, 1e-12, 0.1, seed, True)
    results, expected = cuda.forward(x, *arguments), reference.forward(x, *arguments)
    eps = torch.finfo(dtype).eps
    for name, result, exact in zip(("y", "h", "mean", "rstd"), results, expected, strict=True):
        bound = 4 * max(eps, 1e-6) * float(exact.abs().max())
        torch.testing.assert_close(result, exact, atol=bound, rtol=0, msg=name, check_dtype=False)
    saved = (expected[1], weight, expected[2], expected[3], 0.1, seed, [True] * 3)
    results, expected = cuda.backward(dy, dy2, *saved), reference.backward(dy, dy2, *saved)
    for name, result, exact in zip(("dresidual", "dx", "dbias", "dweight", "dln_bias"), results, expected, strict=True):
        bound = 8 * max(eps, 1e-6) * float(exact.abs().max())
        torch.testing.assert_close(result, exact, atol=bound, rtol=0, msg=name, check_dtype=False)


@pytest.mark.parametrize("module", [False], indirect=True, ids=["ascending"])
def test_the_whole_model(module, monkeypatch):
    """Two layers of BERT, forward and backward with dropout: these kernels, and Triton's as compiled."""
    runs = {}
    load = test_kernels.select.load
    monkeypatch.setattr(test_kernels.select, "load", lambda op, name: runs.update({(op, name): 1}) or load(op, name))
    test_kernels.test_loss_and_every_gradient(torch.float32, 20, runs, monkeypatch)
    assert ("bias_dropout_residual_layer_norm", "cuda") in runs
