"""The matrix products behind prepacked weights, each of their implementations against float64."""

import itertools

import instructions
import parity
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.backends import host_linear, onednn, prepacked

KERNELS = [
    pytest.param(
        kernels,
        dtype,
        marks=pytest.mark.skipif(kernels.missing(dtype) is not None, reason=str(kernels.missing(dtype))),
        id=f"{kernels.__name__.rpartition('.')[2]}-{dtype}",
    )
    for kernels, dtype in (
        (onednn, torch.float32),
        (onednn, torch.float16),
        (onednn, torch.bfloat16),
        (host_linear, torch.float32),
        (host_linear, torch.bfloat16),
    )
]
# What follows the product, in eager PyTorch.
POSTS = {
    "linear": lambda y, other: y,
    "linear_gelu none": lambda y, other: F.gelu(y),
    "linear_gelu tanh": lambda y, other: F.gelu(y, approximate="tanh"),
    "linear_add": lambda y, other: y + other,
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["AVX2", "AVX512"])
def level(request, monkeypatch):
    """The kernels in float32 for one instruction set."""
    instructions.use(request.param, monkeypatch)


def call(kernels, post, x, weight, bias, other):
    function = getattr(kernels, post.partition(" ")[0])
    extra = {"linear": (), "linear_add": (other,)}.get(post, (post.partition(" ")[2],))
    return function(x, kernels.pack(weight), bias, *extra)


def check(kernels, dtype, post, rows, features, depth, biased=True):
    x, weight, bias, other = (
        torch.randn(rows, depth).to(dtype),
        (torch.randn(features, depth) / depth**0.5).to(dtype),
        torch.randn(features).to(dtype) if biased else None,
        torch.randn(rows, features).to(dtype),
    )

    def truth(convert):
        y = F.linear(*(None if part is None else convert(part) for part in (x, weight, bias)))
        return POSTS[post](y, convert(other))

    exact, eager = truth(torch.Tensor.double), truth(lambda part: part)
    y = call(kernels, post, x, weight, bias, other)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((rows, features), dtype, True)
    # Four rounding steps and not one: of a few numbers eager may have the exact ones by luck.
    allowed = 2 * parity.distance(eager, exact) + 4 * torch.finfo(dtype).eps * exact.abs().max().item()
    if kernels is onednn:
        allowed = max(allowed, one_after_the_other(x, weight))
    assert parity.distance(y, exact) <= allowed


def one_after_the_other(x, weight):
    """Six standard deviations of the error of a product whose terms are added one after the other in float32.

    oneDNN may do that on a processor where eager PyTorch's products are those of another library, which adds in blocks.
    Partial sum k of terms with the root mean square t is about t * sqrt(k); rounding it gives an error of variance
    (eps * t)² k / 12, and the sum of these over K terms is (eps * t * K)² / 24.
    """
    depth = x.shape[1]
    term = (x.double().square() @ weight.double().square().T / depth).sqrt().max().item()
    return 6 * torch.finfo(torch.float32).eps * term * depth / 24**0.5


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize(
    ("rows", "features", "depth"),
    [(1, 32, 32), (5, 96, 416), (31, 64, 768), (33, 2304, 768), (128, 768, 800), (200, 768, 3072), (1311, 64, 2048)],
)
def test_products(kernels, dtype, post, rows, features, depth):
    check(kernels, dtype, post, rows, features, depth)
    check(kernels, dtype, post, rows, features, depth, biased=False)


@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("rows", [*range(1, 16), 27, 29, 500])
def test_products_of_each_instruction_set(post, rows, level):
    """Tiles of every number of rows; sums of one chunk, of several, and of a part."""
    check(host_linear, torch.float32, post, rows, 160, 416)
    check(host_linear, torch.float32, post, rows, 32, 1152, biased=False)


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
@pytest.mark.parametrize(("count", "rows"), [*itertools.product((1, 2, 3, 7), (3, 100))])
def test_any_number_of_threads(kernels, dtype, count, rows, threads):
    threads(count)
    check(kernels, dtype, "linear_add", rows, 288, 416)


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_rows_do_not_meet(kernels, dtype):
    """A NaN in one row, and memory behind the last one, stay out of the others."""
    storage = torch.full((40, 64), float("nan"), dtype=dtype)
    storage[:37] = torch.randn(37, 64)
    weight = torch.randn(96, 64).to(dtype)
    expected = call(kernels, "linear", storage[:37].clone(), weight, None, None)
    storage[5] = float("nan")
    y = call(kernels, "linear", storage[:37], weight, None, None)
    rows = torch.arange(37) != 5
    assert torch.equal(y[rows], expected[rows])
    assert y[5].isnan().all()


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_everywhere(kernels, dtype, approximate):
    """One by one times x, over the whole range, at the tails, and where there is no number."""
    values = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-6, -1e-6, 1e4, -1e4])]).to(dtype)
    x = torch.zeros(len(values), 32, dtype=dtype)
    x[:, 0] = values
    weight = torch.zeros(32, 32, dtype=dtype)
    weight[0, 0] = 1.0
    y = call(kernels, f"linear_gelu {approximate}", x, weight, None, None)[:, 0].double()
    exact = F.gelu(values.double(), approximate=approximate)
    assert ((y - exact).abs() <= 2e-6 + torch.finfo(dtype).eps * exact.abs()).all()
    x[0, 0] = float("nan")
    assert call(kernels, f"linear_gelu {approximate}", x, weight, None, None)[0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_that_the_extension_takes(dtype):
    if reason := host_linear.missing(dtype):
        pytest.skip(reason)

    def chosen(features, depth):
        return prepacked.kernels([nn.Linear(depth, features, dtype=dtype)])

    assert chosen(64, 96) is host_linear
    assert chosen(60, 96) is onednn
    assert chosen(64, 100) is onednn
    with pytest.raises(ValueError, match="depth is 60; it may be a positive multiple of 32"):
        host_linear.pack(torch.zeros(64, 60, dtype=dtype))


def test_dtypes_that_the_extension_takes():
    told = host_linear.missing(torch.float16)
    assert told == "the extension multiplies in float32 and bfloat16, not in torch.float16"
    assert prepacked.kernels([nn.Linear(64, 96, dtype=torch.float16)]) is onednn


def test_instructions_that_are_not_there(monkeypatch):
    if reason := host_linear.missing(torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(host_linear, "instructions", lambda dtype: 7)
    with pytest.raises(ValueError, match="instructions is 7; it may be AVX2, AVX512 or AMX"):
        host_linear.pack(torch.zeros(64, 64))


@pytest.mark.parametrize("rows", [3, 40, 700])
def test_a_row_s_product_is_the_same_in_any_company(rows, level, threads):
    x, weight = torch.randn(rows, 416), torch.randn(288, 416)
    whole = call(host_linear, "linear", x, weight, None, None)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(call(host_linear, "linear", x, weight, None, None), whole)
        assert torch.equal(call(host_linear, "linear", x[1:2], weight, None, None), whole[1:2])


@pytest.fixture
def oneDNN(monkeypatch):
    """``onednn.missing`` without what it has found before; a build of torch that can do all of it."""
    if reason := onednn.missing(torch.float32):
        pytest.skip(reason)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True)
    return onednn.missing.__wrapped__


def test_what_onednn_lacks(oneDNN, monkeypatch):
    assert oneDNN(torch.float32) is None
    assert "and float16, not in torch.float64" in oneDNN(torch.float64)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
            told = f"oneDNN has no {str(dtype).removeprefix('torch.')} kernels for this processor"
            assert oneDNN(dtype) == told
            assert oneDNN(torch.float32) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert oneDNN(torch.float32).startswith("this build of torch has no oneDNN")


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_a_build_of_torch_without_prepacked_products(oneDNN, monkeypatch, error):
    def fail(*args):
        raise error("no kernel\nand more")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)
    assert oneDNN(torch.float32) == "this build of torch can't run oneDNN's prepacked linear (no kernel)"


def test_a_wrong_product_is_noticed(oneDNN, monkeypatch):
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight: reorder(2.0 * weight))
    assert oneDNN(torch.float32) == "oneDNN's prepacked linear gives a wrong product on this processor"


@pytest.mark.parametrize(
    ("shape", "dtype", "sizes"),
    [
        ((511, 2048), torch.bfloat16, [511]),
        ((512, 2048), torch.bfloat16, [384, 128]),
        ((1449, 3072), torch.bfloat16, [384, 384, 384, 297]),
        ((1450, 2048), torch.bfloat16, [1450]),
        ((512, 2047), torch.bfloat16, [512]),
        ((512, 2048), torch.float32, [512]),
        ((2, 512, 2048), torch.bfloat16, [2]),
    ],
    ids=str,
)
def test_long_sums_come_in_blocks_of_rows(monkeypatch, shape, dtype, sizes):
    found = []
    monkeypatch.setattr(onednn, "_linear_add", lambda x, weight, bias, other: found.append(len(x)) or 2 * other)
    x, other = torch.zeros(shape, dtype=dtype), torch.randn(*shape[:-1], 4).to(dtype)
    assert torch.equal(onednn.linear_add(x, None, None, other), 2 * other)
    assert found == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_onednn_has_what_torch_says_of_this_processor(dtype):
    if reason := onednn.missing(torch.float32):
        pytest.skip(reason)
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    supported = dtype not in kinds or getattr(torch.ops.mkldnn, f"_is_mkldnn_{kinds[dtype]}_supported")()
    assert (onednn.missing(dtype) is None) == supported


def test_a_product_of_another_depth_is_refused():
    if reason := host_linear.missing(torch.float32):
        pytest.skip(reason)
    with pytest.raises(ValueError, match=r"x has shape \(2, 64\); its last dimension must be 96, the weight's"):
        host_linear.linear(torch.zeros(2, 64), host_linear.pack(torch.zeros(32, 96)), None)


@pytest.fixture
def frozen():
    """Two linear layers side by side, without gradients."""
    return [nn.Linear(64, 96).requires_grad_(False) for _ in range(2)]


def test_where_no_weight_is_prepacked(frozen):
    if reason := prepacked.missing(torch.float32):
        pytest.skip(reason)
    x, told = torch.randn(3, 64), prepacked.unsupported
    assert told(x, frozen) is None
    assert told(x.to("meta"), frozen) == "prepacked linears run on the cpu, and the tensors are on meta"
    assert told(x[:0], frozen) == "there is nothing to multiply"
    assert told(x.bfloat16(), frozen) == "the input is torch.bfloat16 and a weight or bias torch.float32"
    assert told(x.requires_grad_(), frozen).startswith("gradients are needed")
    with torch.no_grad():
        assert told(x, frozen) is None
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert told(x, frozen) == "autocast is on, which casts the weights at every use"
    for parameter in (frozen[1].weight, frozen[0].bias):
        parameter.requires_grad_()
        assert told(x, frozen).startswith("gradients are needed")
        with torch.inference_mode():
            assert told(x, frozen) is None
        parameter.requires_grad_(False)
    frozen[1].bias.data = frozen[1].bias.data.double()
    assert told(x, frozen) == "the input is torch.float32 and a weight or bias torch.float64"
    frozen[1].bias.data = torch.zeros(192)[::2]
    assert told(x, frozen) == "a weight isn't contiguous"
    with torch.inference_mode():
        frozen[1].bias = nn.Parameter(torch.zeros(96), requires_grad=False)
    assert told(x, frozen).startswith("a weight was made in inference mode")
