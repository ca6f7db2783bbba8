"""dropout(LayerNorm(sum of three lookups)): ids, repeated ids, the padding row, dropout."""

import pytest
import torch
from ops import problems
from ops.problems import EPS, embedding_layer_norm

from fastbert import ops
from fastbert.backends import select

pytestmark = pytest.mark.triton
IMPLEMENTATIONS = embedding_layer_norm().implementations()
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("hidden", [7, 312, 768, 1023])
def test_sizes_case_26(hidden, p, dtype):
    embedding_layer_norm(17, hidden, dtype, p).check()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 3])
def test_padding_row_and_ids_case_16(padding_idx, ids_dtype):
    embedding_layer_norm(padding_idx=padding_idx, ids_dtype=ids_dtype).check()


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="Triton's kernels don't run here")
@pytest.mark.parametrize("hidden", [24, 520])
def test_more_tokens_than_programs(hidden, monkeypatch):
    """On a small device a program of the backward goes on to further tokens."""
    monkeypatch.setattr(select.load("embedding_layer_norm", "triton"), "multiprocessors", lambda device: 1)
    embedding_layer_norm(hidden=hidden).check("triton")


def test_empty_batch_case_11():
    embedding_layer_norm(tokens=0).check()


def test_more_than_65536_rows_case_20():
    embedding_layer_norm(tokens=65_537, hidden=9).check()


def arguments(tokens=6, hidden=8):
    tables = {"word": torch.randn(11, hidden), "position": torch.randn(7, hidden), "token_type": torch.randn(2, hidden)}
    ids = {name: torch.zeros(tokens, dtype=torch.int64) for name in ("input_ids", "position_ids", "token_type_ids")}
    return {**ids, **tables, "weight": torch.ones(hidden), "bias": torch.zeros(hidden), "eps": EPS}


@implementations
def test_padding_row_has_no_gradient(impl):
    """It is looked up like any other; a negative index counts from the end."""
    inputs = arguments()
    inputs["input_ids"] = torch.tensor([0, 10, 10, 3, 0, 1])
    word = inputs["word"].requires_grad_()
    plain = ops.embedding_layer_norm(**inputs, impl=impl)
    (everything,) = torch.autograd.grad(plain, word, torch.randn(6, 8))
    assert (everything[[0, 10]] != 0).any(dim=1).all()
    for padding_idx, row in ((0, 0), (-1, 10), (10, 10)):
        output = ops.embedding_layer_norm(**inputs, padding_idx=padding_idx, impl=impl)
        assert torch.equal(output, plain)
        (gradient,) = torch.autograd.grad(output, word, torch.randn(6, 8))
        assert (gradient[row] == 0).all()
        assert (gradient[[1, 3]] != 0).any(dim=1).all()


@implementations
@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
def test_repeated_ids_case_31(dtype, impl):
    """Thousands of tokens of two types: the sum is made in float32, and bit for bit the same each time."""
    tokens, repeats = 4000, 20
    inputs = arguments(tokens)
    inputs["token_type_ids"] = torch.arange(tokens) % 2
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items() if name in ("word", "token_type")}
    inputs |= leaves | {"position": inputs["position"].to(dtype)}
    dy = 1.0 + torch.randn(tokens, 8).to(dtype)

    def gradients():
        output = ops.embedding_layer_norm(**inputs, impl=impl)
        return torch.autograd.grad(output, list(leaves.values()), dy)

    first = gradients()
    exact = torch.autograd.grad(
        ops.embedding_layer_norm(
            **{name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()},
            impl="reference",
        ),
        list(leaves.values()),
        dy.double(),
    )
    for gradient, truth in zip(first, exact, strict=True):
        step = torch.finfo(dtype).eps * truth.abs().max() + 1e-5 * dy.abs().sum(0).max()
        assert (gradient - truth).abs().max() <= step
    for _ in range(repeats):
        assert all(torch.equal(x, y) for x, y in zip(gradients(), first, strict=True))


# The sorted ids are added up in chunks of 64: lengths of segments for each way to lie in them.
SEGMENTS = {
    "one id": [200],
    "one chunk": [64],
    "a chunk each": [64, 64, 64],
    "a chunk and one more": [65, 64, 1],
    "from the middle of a chunk": [40, 100, 3, 1, 1],
    "two in one chunk": [70, 20, 70],
    "many chunks": [1, 1100, 2],
    "all different": [1] * 70,
}


@implementations
@pytest.mark.parametrize(("ids_dtype", "skipped"), [(torch.int32, None), (torch.int64, 0)], ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_case_31(dtype, lengths, skipped, ids_dtype, impl):
    """A table's gradient has the sums of what its rows were used for, and zeros in the other rows.

    The ids are 7, 10, 13 ...; ``skipped`` says which of them is ``padding_idx``.
    """
    rows = 7 + 3 * torch.arange(len(lengths))
    ids = rows.repeat_interleave(torch.tensor(lengths))[torch.randperm(sum(lengths))]
    tables = {"word": torch.randn(300, 8), "position": torch.randn(1, 8), "token_type": torch.randn(1, 8)}
    inputs = arguments(len(ids)) | tables | {"input_ids": ids.to(ids_dtype)}
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items() if torch.is_tensor(x)}
    inputs |= {"eps": EPS, "padding_idx": None if skipped is None else int(rows[skipped])}
    dy = torch.randn(len(ids), 8).to(dtype)

    def gradient(**changes):
        leaves = inputs | changes
        word = leaves["word"].requires_grad_()
        return torch.autograd.grad(ops.embedding_layer_norm(**leaves), word, dy.to(word.dtype))[0]

    actual = gradient(impl=impl)
    doubles = {name: x.double() for name, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    # Sums are made in float32 and rounded once. Triton's are of terms that were: each is off by up to half a step of a
    # number of up to 4, and of n such errors, equally often up as down, the sum is within three times their root.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    terms = 3 * 4 * rounding * max(lengths) ** 0.5 if impl == "triton" else 0.0
    expected = gradient(**doubles, impl="reference")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5 + rounding, atol=1e-4 + terms)
    unused = torch.ones(300, dtype=torch.bool)
    unused[rows] = False
    assert (actual[unused] == 0).all()
    assert torch.equal(gradient(impl=impl), actual)


@implementations
@pytest.mark.parametrize("rows", [128, 129, 32_768, 32_769])
def test_last_row_of_a_table(rows, impl):
    """Ids are sorted in the narrowest dtype that holds them."""
    inputs = arguments(tokens=3) | {"word": torch.randn(rows, 8).requires_grad_()}
    inputs["input_ids"] = torch.tensor([rows - 1, 0, rows - 1])
    output = ops.embedding_layer_norm(**inputs, impl=impl)
    (actual,) = torch.autograd.grad(output, inputs["word"], torch.randn(3, 8))
    assert (actual != 0).any(dim=1).nonzero().flatten().tolist() == [0, rows - 1]


@implementations
def test_tables_of_different_dtypes(impl):
    inputs = arguments()
    dtypes = {"word": torch.bfloat16, "position": torch.float32, "token_type": torch.float16, "weight": torch.float64}
    leaves = {name: inputs[name].to(dtype).requires_grad_() for name, dtype in dtypes.items()}
    output = ops.embedding_layer_norm(**(inputs | leaves), impl=impl)
    assert output.dtype == torch.float32
    gradients = torch.autograd.grad(output.sum(), list(leaves.values()))
    assert [gradient.dtype for gradient in gradients] == list(dtypes.values())


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "triton"])  # undefined in there
@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("value", [-1, 11])
def test_ids_out_of_range_case_15(value, name, impl):
    inputs = arguments()
    inputs[name][2] = value
    with pytest.raises(IndexError):
        ops.embedding_layer_norm(**inputs, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(6)}, TypeError, "input_ids has dtype torch.float32; it must be torch.int32 or"),
        ({"token_type_ids": torch.zeros(6, dtype=torch.bool)}, TypeError, "token_type_ids has dtype torch.bool"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"input_ids has shape \(2, 3\)"),
        ({"position_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"position_ids has shape \(5,\)"),
        ({"word": torch.zeros(8)}, ValueError, r"word has shape \(8,\); it must be \(rows, 8\)"),
        ({"position": torch.zeros(7, 9)}, ValueError, r"position has shape \(7, 9\); it must be \(rows, 8\)"),
        ({"token_type": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "token_type has dtype torch.int64"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight has shape \(9,\); it must be \(8,\)"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias has shape \(9,\); it must be \(8,\)"),
        ({"input_ids": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "input_ids is on meta"),
        ({"position_ids": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "position_ids is on meta"),
        ({"token_type_ids": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "token_type_ids is on meta"),
        ({"p": 2.0}, ValueError, "p is 2.0; it must be between 0 and 1"),
        ({"p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, r"seed has shape \(2,\)"),
        ({"padding_idx": 11}, ValueError, "padding_idx is 11; it may be None or -11 to 10, a row of word"),
        ({"padding_idx": -12}, ValueError, "padding_idx is -12"),
    ],
)
def test_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.embedding_layer_norm(**(arguments() | change))
