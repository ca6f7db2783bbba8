"""Every op on a GPU, with every implementation that it has there: parity at real and at odd sizes."""

import functools

import parity
import pytest
import torch
from ops import problems

from fastbert.backends import select

pytestmark = pytest.mark.gpu
all_dtypes = pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)

DROPPING = pytest.mark.parametrize("p", [0.0, 0.1])


def check(make, *args, **kwargs):
    """Parity of all implementations; tensors, seeds and the incoming gradient are made on the GPU."""
    with torch.device("cuda"):
        problem = make(*args, **kwargs)
        first = next(iter(problem.tensors.values()))
        size = first.shape[-1] if problem.op == "attention" else None
        request = select.Request("cuda", first.dtype, problem.dropout_p, size)
        # The oracle in the dtype itself adds up with atomics here: from run to run it is another number.
        able = [row.implementation for row in select.table(problem.op).explain(request) if not row.reasons]
        names = [name for name in able if name != "reference"]
        assert names[0] not in ("composed", "torch", "reference"), select.table(problem.op).explain(request)
        problem.check(*names)


LENGTHS = {
    "BERT's": list(range(5, 129, 4)),
    "one of 128": [128] * 32,
    "long": [512, 300, 1, 129, 0, 256],
    "short": [1, 31, 32, 33, 0, 63, 64, 65, 17] * 8,
}


@all_dtypes
@DROPPING
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "size"), [(12, 64), (12, 32)])
def test_attention_case_9_and_12(heads, size, lengths, p, dtype):
    check(problems.attention, lengths, heads=heads, size=size, dtype=dtype, p=p)


@all_dtypes
@DROPPING
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127, 128, 129, 511, 512])
def test_lengths_of_attention_case_9(length, p, dtype):
    check(problems.attention, [length, length // 3], heads=3, size=64, dtype=dtype, p=p)


@all_dtypes
@DROPPING
@pytest.mark.parametrize("size", [16, 40, 59, 80, 96, 128])
def test_head_sizes_of_attention_case_10(size, p, dtype):
    check(problems.attention, [100, 21, 300], heads=2, size=size, dtype=dtype, p=p)


def test_many_sequences_case_20():
    check(problems.attention, [1, 3, 2, 0] * 16_385, heads=1, size=16)


ROWS = [(5, 7), (300, 312), (2049, 384), (8192, 768), (4097, 1024), (33, 1023), (70_001, 24), (20, 3001), (9, 8192)]


@all_dtypes
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_layer_norm_case_20(shape, dtype):
    check(problems.layer_norm, shape, dtype)


@all_dtypes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(5, 7), (4097, 1536), (8192, 3072), (70_001, 24), (33, 4095)], ids=str)
def test_bias_gelu_case_20(shape, approximate, dtype):
    check(problems.bias_gelu, shape, dtype, approximate)


@all_dtypes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("shape", "features"),
    [((100, 768), 3072), ((4096, 768), 3072), ((2049, 1024), 4096), ((1025, 384), 1536), ((77, 59), 131), ((3, 1), 1)],
    ids=str,
)
def test_linear_gelu(shape, features, approximate, dtype):
    check(problems.linear_gelu, shape, features, dtype, approximate)
    check(problems.linear_gelu, shape, features, dtype, approximate, has_bias=False)


@all_dtypes
@DROPPING
@pytest.mark.parametrize(("tokens", "hidden"), [(60, 24), (8192, 768), (4097, 1024), (2049, 384), (33, 1023)])
def test_embedding_layer_norm_case_31(tokens, hidden, p, dtype):
    """Thousands of tokens share each of a few ids."""
    check(problems.embedding_layer_norm, tokens, hidden, dtype, p)


@all_dtypes
@DROPPING
@pytest.mark.parametrize("shape", [(5, 7), (8192, 768), (33, 1023), (70_001, 24)], ids=str)
def test_bias_dropout_residual_case_20(shape, p, dtype):
    check(problems.bias_dropout_residual, shape, dtype, p)


def test_float32_products_are_no_tf32_case_25():
    """Sums of 768 products are off by far less than TF32's 10 bits would make them, until torch allows TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    with torch.device("cuda"):
        problem = problems.linear_gelu((512, 768), 256)
        qkv = problems.attention([200, 64], heads=4, size=64)

    def error(problem, impl):
        with torch.device("cuda"):
            exact = problem.oracle(**{name: x.double() for name, x in problem.tensors.items()})
            return parity.distance(problem.actual(**problem.tensors, impl=impl), exact)

    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact = {impl: error(problem, impl) for impl in ("triton", "cublas_triton")}
        exact["attention"] = error(qkv, "triton")
        assert all(value < 2e-5 for value in exact.values()), exact
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        loose = {impl: error(problem, impl) for impl in ("triton", "cublas_triton")}
        loose["attention"] = error(qkv, "triton")
        assert all(value > 1e-4 for value in loose.values()), loose
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("name", problems.MAKERS)
def test_repeats_are_bitwise_equal_case_31(name):
    with torch.device("cuda"):
        problem = problems.MAKERS[name](dtype=torch.bfloat16)
        impl = select.table(problem.op).choose(None, select.Request("cuda", torch.bfloat16, problem.dropout_p, 16))
        function = functools.partial(problem.actual, impl=impl)
        expected_output, expected = parity.results(function, problem.tensors, problem.dy)
        for _ in range(200):
            output, gradients = parity.results(function, problem.tensors, problem.dy)
            assert torch.equal(output.nan_to_num(), expected_output.nan_to_num())
            assert all(torch.equal(gradients[key].nan_to_num(), x.nan_to_num()) for key, x in expected.items())


class TestMoreThan2To31Elements:
    """Case 19: the last rows are what they are alone. Each tensor has 4.3 GB or more."""

    @pytest.fixture(autouse=True)
    def _room(self):
        free, _ = torch.cuda.mem_get_info()
        if free < 40 << 30:
            pytest.skip(f"needs 40 GiB of GPU memory, and {free >> 30} are free")
        yield
        torch.cuda.empty_cache()

    @staticmethod
    def large(*shape, last):
        x = torch.zeros(*shape, dtype=torch.bfloat16, device="cuda")
        x[-last:] = torch.randn(last, *shape[1:], device="cuda").to(x.dtype)
        assert x.numel() > 2**31
        return x

    def compare(self, function, last, **tensors):
        with torch.no_grad():
            dy = torch.randn_like(function(**tensors))
        output, gradients = parity.results(function, tensors, dy)
        cut = {name: x[-last:] if x.ndim > 1 else x for name, x in tensors.items()}
        expected, expected_gradients = parity.results(function, cut, dy[-last:])
        assert torch.equal(output[-last:], expected)
        for name, x in tensors.items():
            if x.ndim > 1:
                key = f"gradient of {name}"
                assert torch.equal(gradients[key][-last:], expected_gradients[key])

    def test_layer_norm(self):
        x = self.large(2**21 + 64, 1024, last=64)
        weight, bias = torch.randn(2, 1024, device="cuda").to(x.dtype)
        function = functools.partial(torch.ops.fastbert.layer_norm, eps=1e-12, impl="triton")
        self.compare(lambda x, weight, bias: function(x, weight, bias)[0], 64, x=x, weight=weight, bias=bias)

    def test_bias_gelu(self):
        x = self.large(2**20 + 64, 2048, last=64)
        bias = torch.randn(2048, device="cuda").to(x.dtype)
        function = functools.partial(torch.ops.fastbert.bias_gelu, approximate="none", impl="triton")
        self.compare(lambda x, bias: function(x, bias), 64, x=x, bias=bias)

    def test_attention(self):
        rows, length = 2**20 + 128, 128
        qkv = self.large(rows, 3, 11, 64, last=length)
        scale = (0.125, 0.0, None, "triton")

        def function(qkv):
            offsets = torch.arange(0, qkv.shape[0] + 1, length, dtype=torch.int32, device="cuda")
            return torch.ops.fastbert.attention(qkv, offsets, length, *scale)[0]

        self.compare(function, length, qkv=qkv)
