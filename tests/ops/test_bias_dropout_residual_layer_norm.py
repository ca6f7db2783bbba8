"""LayerNorm(residual + dropout(x + bias)): sizes, probabilities, mixed dtypes, and the compiled kernels' masks."""

import functools
import itertools

import parity
import pytest
import torch
from ops import problems
from ops.problems import EPS, bias_dropout_residual_layer_norm

from fastbert import ops
from fastbert.backends import extension, philox, select

IMPLEMENTATIONS = bias_dropout_residual_layer_norm().implementations()
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
all_dtypes = pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def forward(problem, p, impl, seed=None, needs_backward=True):
    """All results of the registered forward: out, hidden, mean, rstd."""
    x, residual, weight, ln_bias = (problem.tensors[name] for name in ("x", "residual", "weight", "ln_bias"))
    if seed is None:
        seed = problems.seed_of(p, problems.SEED)
    return torch.ops.fastbert.bias_dropout_residual_layer_norm(
        x, problem.tensors.get("bias"), residual, weight, ln_bias, EPS, p, seed, needs_backward, impl
    )


@all_dtypes
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 312), (130, 768), (768,), (3, 1023)], ids=str)
def test_sizes_case_26(shape, p, dtype):
    bias_dropout_residual_layer_norm(shape, dtype, p).check()
    bias_dropout_residual_layer_norm(shape, dtype, p, has_bias=False).check()


@all_dtypes
@pytest.mark.parametrize("hidden", [2049, 8192, 8200])
def test_long_rows(hidden, dtype):
    bias_dropout_residual_layer_norm((3, hidden), dtype).check()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    bias_dropout_residual_layer_norm(shape).check()


def test_more_than_65536_rows_case_20():
    bias_dropout_residual_layer_norm((65_537, 9)).check()


@needs_extension
@all_dtypes
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 1023), (64, 768), (70, 24)], ids=str)
def test_compiled_hidden_is_the_oracle_s_bit_for_bit(shape, p, dtype):
    problem = bias_dropout_residual_layer_norm(shape, dtype, p)
    _, hidden, mean, rstd = forward(problem, p, "cpu")
    _, expected_hidden, expected_mean, expected_rstd = forward(problem, p, "reference")
    assert torch.equal(hidden, expected_hidden)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    if shape[-1] > 1:
        torch.testing.assert_close(rstd, expected_rstd, rtol=1e-5, atol=0.0)


@implementations
@all_dtypes
@pytest.mark.parametrize("shape", [(5, 7), (33, 1023), (130, 24)], ids=str)
def test_mask_of_the_backward_case_28(shape, dtype, impl):
    p, seed = 0.5, torch.tensor([problems.SEED])
    problem = bias_dropout_residual_layer_norm(shape, dtype, p)
    _, hidden, mean, rstd = forward(problem, p, impl)
    dresidual, dx, *_ = torch.ops.fastbert.bias_dropout_residual_layer_norm_bwd(
        torch.randn(shape).to(dtype), None, hidden, problem.tensors["weight"], mean, rstd, p, seed, [True] * 3, impl
    )
    mask = philox.hidden_mask(seed, dx.shape, p)
    assert torch.equal(dx != 0, mask & (dresidual != 0))
    torch.testing.assert_close(dx, torch.where(mask, dresidual * philox.scale(p), 0.0), rtol=1e-2, atol=1e-6)


@implementations
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_output_mask(p, impl):
    """Every subset of the parameters' gradients is what it is among all of them, and empty where it isn't wanted."""
    problem = bias_dropout_residual_layer_norm((70, 24), p=p)
    _, hidden, mean, rstd = forward(problem, p, impl)
    dy, seed = torch.randn(70, 24), problems.seed_of(p, problems.SEED)

    def backward(output_mask):
        return torch.ops.fastbert.bias_dropout_residual_layer_norm_bwd(
            dy, None, hidden, problem.tensors["weight"], mean, rstd, p, seed, output_mask, impl
        )

    everything = backward([True, True, True])
    assert everything[1].shape == ((70, 24) if p > 0.0 else (0,))
    for output_mask in itertools.product([False, True], repeat=3):
        gradients = backward(list(output_mask))
        for gradient, expected, wanted in zip(gradients, everything, (True, True, *output_mask), strict=True):
            assert torch.equal(gradient, expected) if wanted else gradient.shape == (0,)


@implementations
@all_dtypes
@pytest.mark.parametrize("shape", [(5, 7), (70, 24), (3, 2049)], ids=str)
def test_second_gradient_of_the_output(shape, dtype, impl):
    """It is what the sum of the two in their dtype, PyTorch's own, gives."""
    problem = bias_dropout_residual_layer_norm(shape, dtype, 0.1)
    _, *kept = forward(problem, 0.1, impl)
    dy, dy2 = torch.randn(2, *shape).to(dtype)

    def backward(first, second):
        return torch.ops.fastbert.bias_dropout_residual_layer_norm_bwd(
            first, second, kept[0], problem.tensors["weight"], *kept[1:], 0.1, problems.seed_of(0.1, problems.SEED),
            [True] * 3, impl,
        )  # fmt: skip

    for gradient, expected in zip(backward(dy, dy2), backward(dy + dy2, None), strict=True):
        assert torch.equal(gradient, expected)


@implementations
def test_without_a_backward_nothing_is_kept(impl):
    problem = bias_dropout_residual_layer_norm((5, 24))
    expected = forward(problem, 0.1, impl)[0]
    output, *kept = forward(problem, 0.1, impl, needs_backward=False)
    assert torch.equal(output, expected)
    assert [x.shape for x in kept] == [(0,)] * 3
    x, residual, *parameters = (problem.tensors[name] for name in ("x", "residual", "weight", "ln_bias"))
    arguments = (x, None, residual, *parameters, EPS, 0.0, None, False, impl)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastbert.bias_dropout_residual_layer_norm.default, arguments, test_utils=checks)
    leaves = {name: x.requires_grad_() for name, x in problem.tensors.items()}
    with torch.no_grad():
        assert torch.equal(problem.actual(**leaves, impl=impl), expected)
    with pytest.raises(RuntimeError, match="called with needs_backward=False"):
        forward(problem, 0.1, impl, needs_backward=False)[0].sum().backward()


def test_what_is_kept_for_the_backward():
    """h, and two numbers a row: neither the mask nor x."""
    problem = bias_dropout_residual_layer_norm((64, 768), torch.bfloat16)
    leaves = {name: x.requires_grad_() for name, x in problem.tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        problem.actual(**leaves)
    parameters = {leaf.data_ptr() for leaf in leaves.values()}
    sizes = [x.numel() * x.element_size() for x in kept if x.data_ptr() not in parameters]
    assert sum(sizes) <= 64 * (768 * 2 + 8) + 8


@needs_extension
def test_result_does_not_depend_on_the_number_of_threads_case_31():
    problem = bias_dropout_residual_layer_norm((3000, 131))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            output, gradients = parity.results(functools.partial(problem.actual, impl="cpu"), problem.tensors, None)
            results.append([output, *gradients.values()])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


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


@needs_extension
@all_dtypes
@pytest.mark.parametrize("hidden", [5, 100, 768, 1023])
def test_constant_rows_without_eps_are_torch_s_case_61(hidden, dtype):
    """Torch gives NaN: 0 / 0. A mean that is off by its rounding gave numbers, as far from 0 as those of other rows."""
    constants = torch.tensor([0.0, 1.0, 0.1, 0.3, 3.3, -7.7, 1e4]).to(dtype)
    rows = torch.cat([constants[:, None].expand(-1, hidden), torch.randn(2, hidden).to(dtype)])
    weight, ln_bias = torch.randn(2, hidden).to(dtype)
    dy, zeros = torch.randn(rows.shape).to(dtype), torch.zeros_like(rows)

    def all_of(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (rows, weight, ln_bias)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dy)

    results = all_of(lambda x, w, b: ops.bias_dropout_residual_layer_norm(zeros, None, x, w, b, 0.0, impl="cpu"))
    expected = all_of(lambda x, w, b: torch.nn.functional.layer_norm(x, (hidden,), w, b, 0.0))
    assert expected[0][:7].isnan().all()
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result.isnan(), truth.isnan())


def test_what_can_not_serve_case_44():
    x, row = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(select.UnsupportedError, match="impl='cuda' can't serve this call: it runs on cuda"):
        ops.bias_dropout_residual_layer_norm(x, None, x, row, row, EPS, impl="cuda")
    x, row = x.double(), row.double()
    with pytest.raises(select.UnsupportedError, match="it computes in float32, float16, bfloat16, and the dtype is"):
        ops.bias_dropout_residual_layer_norm(x, None, x, row, row, EPS, impl="cpu")
    assert ops.bias_dropout_residual_layer_norm(x, None, x, row, row, EPS).dtype == torch.float64


def test_without_the_extension_case_44(monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: "it was never built")
    problem = bias_dropout_residual_layer_norm()
    problem.check("composed")
    assert torch.equal(problem.actual(**problem.tensors), problem.actual(**problem.tensors, impl="composed"))
    with pytest.raises(select.UnsupportedError, match="it was never built"):
        problem.actual(**problem.tensors, impl="cpu")


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


def on_cuda(shape, dtype=torch.float32, p=0.1, has_bias=True):
    """The problem with its tensors and incoming gradient on the GPU, where its seed is made too: the default device."""
    problem = bias_dropout_residual_layer_norm(shape, dtype, p, has_bias)
    problem.dy = torch.randn(shape).to(dtype).cuda()
    problem.tensors = {name: x.cuda() for name, x in problem.tensors.items()}
    return problem


CUDA_SHAPES = [
    (5, 7),
    (300, 312),
    (300, 384),
    (2049, 768),
    (33, 1023),
    (257, 1024),
    (65_537, 9),
    (70, 2048),
    (20, 3001),
    (33, 4096),
    (9, 8192),
    (5, 8200),
]


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cuda_parity_case_20_and_26(shape, p, dtype):
    for has_bias in (True, False):
        problem = on_cuda(shape, dtype, p, has_bias)
        with torch.device("cuda"):
            problem.check("cuda")


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
def test_cuda_hidden_is_the_oracle_s_bit_for_bit(shape, p, dtype):
    problem = on_cuda(shape, dtype, p)
    with torch.device("cuda"):
        assert torch.equal(forward(problem, p, "cuda")[1], forward(problem, p, "reference")[1])


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("hidden", [768, 4096])
def test_cuda_any_alignment_case_18(hidden, dtype):
    problem = on_cuda((33, hidden), dtype)
    for name, x in problem.tensors.items():
        storage = x.new_empty(x.numel() + 1)
        problem.tensors[name] = storage[1:].view(x.shape).copy_(x)
    with torch.device("cuda"):
        problem.check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_parameters_in_float32(dtype):
    problem = on_cuda((130, 768), dtype)
    for name in ("weight", "ln_bias"):
        problem.tensors[name] = problem.tensors[name].float()
    with torch.device("cuda"):
        output, gradients = parity.results(functools.partial(problem.actual, impl="cuda"), problem.tensors, problem.dy)
        expected_output, expected = parity.results(
            functools.partial(problem.actual, impl="reference"), problem.tensors, problem.dy
        )
    torch.testing.assert_close(output, expected_output)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_cuda_beyond_2_to_the_31_elements_case_19():
    shape, p, seed = (2**21 + 1, 1031), 0.5, torch.tensor([problems.SEED], device="cuda")
    x, ones = torch.ones(shape, dtype=torch.bfloat16, device="cuda"), torch.ones(1031, device="cuda")
    arguments = (x, None, torch.zeros_like(x), ones.to(x.dtype), ones.to(x.dtype), EPS, p, seed, True, "cuda")
    output, hidden, mean, rstd = torch.ops.fastbert.bias_dropout_residual_layer_norm(*arguments)
    start = x.numel() - 4096
    assert start > 2**31
    kept = philox.hidden_draws(seed, 4096, start) < philox.threshold(p)
    assert torch.equal(hidden.flatten()[start:] != 0, kept)
    torch.testing.assert_close(
        output[-2:], ops.layer_norm(hidden[-2:], *arguments[3:5], EPS, impl="reference"), rtol=1e-2, atol=1e-2
    )
    del x, arguments, output
    dy = torch.randn(1031, device="cuda").to(hidden.dtype).expand(shape)
    dresidual, dx, *_ = torch.ops.fastbert.bias_dropout_residual_layer_norm_bwd(
        dy, None, hidden, ones.to(dy.dtype), mean, rstd, p, seed, [False] * 3, "cuda"
    )
    assert torch.equal(dx.flatten()[start:] != 0, kept & (dresidual.flatten()[start:] != 0))


@pytest.mark.gpu
def test_cuda_repeats_bit_for_bit_case_31():
    problem = on_cuda((2049, 768), torch.bfloat16)
    function = functools.partial(problem.actual, impl="cuda")
    with torch.device("cuda"):
        expected_output, expected = parity.results(function, problem.tensors, problem.dy)
        for _ in range(200):
            output, gradients = parity.results(function, problem.tensors, problem.dy)
            assert torch.equal(output, expected_output)
            assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.gpu
def test_cuda_current_stream_case_32():
    problem = on_cuda((4096, 768), p=0.0)
    x = problem.tensors["x"]
    expected = forward(problem, 0.0, "cuda")
    late = problem.tensors["x"] = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read x before this is over
        late.copy_(x)
        results = forward(problem, 0.0, "cuda")
    torch.cuda.synchronize()
    assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph_draws_again_case_29():
    """A replay reads the seed that is there then."""
    problem, seed = on_cuda((64, 768)), torch.tensor([1], device="cuda")
    call = functools.partial(forward, problem, 0.1, "cuda", seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()[1]
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(captured, call()[1])
