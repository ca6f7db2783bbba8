"""gelu(x Wᵀ + b): sizes, both forms, autocast, and what it keeps for the backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops import problems
from ops.problems import linear_gelu

from fastbert import ops
from fastbert.backends import select

pytestmark = pytest.mark.triton
implementations = pytest.mark.parametrize("impl", linear_gelu().implementations())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "features"), [((3, 1), 1), ((2, 3, 7), 13), ((4, 312), 99), ((96,), 64)], ids=str)
def test_sizes(shape, features, dtype, approximate):
    linear_gelu(shape, features, dtype, approximate).check()
    linear_gelu(shape, features, dtype, approximate, has_bias=False).check()


@pytest.mark.skipif("triton" not in linear_gelu().implementations(), reason="Triton's kernels don't run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("few", "shape", "features"), [(0, (300, 70), 290), (1000, (300, 70), 130), (1000, (1100, 64), 64)]
)
def test_blocks(few, shape, features, dtype, monkeypatch):
    """Several blocks of rows and columns, in large blocks and in small ones, and more than a group of them."""
    module = select.load("linear_gelu", "triton")
    monkeypatch.setattr(module, "_FEW", few)
    linear_gelu(shape, features, dtype).check("triton")


PERSISTENT = pytest.mark.skipif(
    "persistent" not in linear_gelu(dtype=torch.bfloat16).implementations(), reason="Triton's kernels don't run here"
)


@PERSISTENT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("shape", "features"), [((300, 72), 264), ((129, 136), 8), ((2, 5, 8), 1032)], ids=str)
def test_persistent_programs(shape, features, approximate, dtype):
    """Programs take several blocks each or one; no size is a multiple of a block's."""
    linear_gelu(shape, features, dtype, approximate).check("persistent")
    linear_gelu(shape, features, dtype, approximate, has_bias=False).check("persistent")


@PERSISTENT
@pytest.mark.parametrize("parts", [1, 4])
def test_persistent_parts(parts, monkeypatch):
    module = select.load("linear_gelu", "persistent")
    options = module.launch.options("linear_gelu_persistent", "16 bits") | {"PARTS": parts}
    monkeypatch.setattr(module.launch, "options", lambda kernel, shape_class: dict(options))
    problem = linear_gelu((140, 72), 136, torch.bfloat16)
    with torch.no_grad():  # its backward takes the options of another kernel
        changed = problem.actual(**problem.tensors, impl="persistent")
        monkeypatch.undo()
        assert torch.equal(changed, problem.actual(**problem.tensors, impl="persistent"))


@PERSISTENT
def test_persistent_rows_that_tma_does_not_take():
    """Rows, or a first one, beside multiples of 16 bytes; rows that overlap; copies leave the arguments alone."""
    module = select.load("linear_gelu", "persistent")
    storage = torch.randn(9, 40).bfloat16()
    plain = torch.randn(24, 16).bfloat16()
    assert module._aligned(plain) is plain
    assert module._aligned(storage[:, 8:24]).data_ptr() == storage[:, 8:24].data_ptr()
    for x in (storage[:, 3:19], storage.view(-1)[:351].view(9, 39)[:, :16], storage[:1, :16].expand(9, 16)):
        copy = module._aligned(x)
        assert torch.equal(copy, x)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        expected = module.forward(copy, plain, None, "none", True)
        assert all(map(torch.equal, module.forward(x, plain, None, "none", True), expected))
    padded = module._aligned(storage[:, :13])
    assert padded.shape == (9, 16)
    assert torch.equal(padded[:, :13], storage[:, :13])
    assert not padded[:, 13:].any()


def test_persistent_says_what_it_can_not_serve(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(select, "_TRITON_DEVICE", "cuda")
    monkeypatch.setattr(select, "_capability", lambda index: (80, 90)[index])
    table = select.table("linear_gelu")
    half, other = (select.Request("cuda", torch.bfloat16, index=index) for index in (1, 0))
    assert table.choose("persistent", half) == "persistent"
    with pytest.raises(select.UnsupportedError, match=r"it needs compute capability 9\.0, and the device has 8\.0"):
        table.choose("persistent", other)
    with pytest.raises(select.UnsupportedError, match="computes in float16, bfloat16, and the dtype is float32"):
        table.choose("persistent", select.Request("cuda", torch.float32, index=1))


@implementations
def test_without_a_gradient_nothing_is_kept(impl):
    x, weight = torch.randn(5, 8), torch.randn(6, 8)
    chosen = torch.ops.fastbert.linear_gelu(x, weight, None, "none", False, impl)
    assert chosen[1].shape == (0,)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastbert.linear_gelu.default, (x, weight, None, "none", False, impl), test_utils=checks
    )
    assert torch.equal(chosen[0], torch.ops.fastbert.linear_gelu(x, weight, None, "none", True, impl)[0])
    with pytest.raises(RuntimeError, match="needs_hidden=False"):
        torch.ops.fastbert.linear_gelu(x.requires_grad_(), weight, None, "none", False, impl)[0].sum().backward()


class TestByShape:
    """The table of which implementation was measured to be the faster."""

    @pytest.fixture(autouse=True)
    def _module(self):
        self.by_shape = pytest.importorskip("fastbert.ops.linear_gelu.by_shape", reason="Triton is not installed")

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [(0, 64), (1, 64), (64, 64), (65, 128), (128, 128), (5000, 8192), (65_536, 65_536), (10**6, 65_536)],
    )
    def test_classes_of_rows(self, rows, expected):
        assert self.by_shape.rows_class(rows) == expected

    def test_the_table_can_be_read(self):
        assert set(self.by_shape.read(self.by_shape.MEASURED).values()) <= set(self.by_shape.ROUTES)

    def test_what_it_says(self, tmp_path, monkeypatch):
        path = tmp_path / "table.toml"
        path.write_text(
            '[[measured]]\ncapability = 90\ndtype = "bfloat16"\nN = 3072\nK = 768\n'
            'training = false\nfaster = { 128 = "triton" }\n'
        )
        table = self.by_shape.read(path)
        monkeypatch.setattr(self.by_shape, "_measured", lambda: table)
        monkeypatch.setattr(self.by_shape, "capability", lambda: 90)
        assert self.by_shape.faster(torch.bfloat16, 100, 3072, 768, False) == "triton"
        for changed in (
            (torch.float16, 100, 3072, 768, False),
            (torch.bfloat16, 129, 3072, 768, False),
            (torch.bfloat16, 100, 768, 768, False),
            (torch.bfloat16, 100, 3072, 768, True),
        ):
            assert self.by_shape.faster(*changed) == "cublas_triton"

    @pytest.mark.parametrize("entry", ['100 = "triton"', '128 = "torch"'])
    def test_what_it_may_not_say(self, entry, tmp_path):
        path = tmp_path / "table.toml"
        head = '[[measured]]\ncapability = 90\ndtype = "bfloat16"\nN = 1\nK = 1\ntraining = true\n'
        path.write_text(f"{head}faster = {{ {entry} }}\n")
        with pytest.raises(ValueError, match="is not a class of M and one of persistent, triton, cublas_triton"):
            self.by_shape.read(path)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8)], ids=str)
def test_empty_batch_case_11(shape):
    linear_gelu(shape).check()


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


@implementations
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_backward_that_gives_the_output_too(impl, approximate, dtype):
    """Bit for bit the forward's GELU of h and the gradients of the backward by itself, whatever is wanted of them."""
    module = select.load("linear_gelu", impl)
    elementwise = select.load("bias_gelu", impl if impl in ("torch", "reference") else "triton")
    for rows, features in ((5, 7), (33, 1030), (0, 9)):
        hidden, dy = (torch.randn(rows, features).to(dtype) for _ in range(2))
        x, weight = torch.randn(rows, 16).to(dtype), torch.randn(features, 16).to(dtype)
        y = elementwise.forward(hidden, None, approximate)
        for mask, given in itertools.product(itertools.product([False, True], repeat=3), (dy, dy.t().contiguous().t())):
            expected = module.backward(given, x, weight, hidden, approximate, list(mask))
            found = module.backward_with_output(given.clone(), x, weight, hidden, approximate, list(mask))
            assert torch.equal(found[0], y)
            assert found[0].is_contiguous()
            assert all(map(torch.equal, found[1:], expected))
