"""Edits of a weight after an inference: which ones the next forward sees, and which ones a few forwards later."""

import copy
import functools

import instructions
import pytest
import torch
from models import twins

import fastbert
from fastbert.backends import extension, prepacked

# Multiples of 32, so that a layer is one call, and sizes that only oneDNN takes.
SIZES = {
    "one call": {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160},
    "parts": {"hidden_size": 72, "num_attention_heads": 3, "intermediate_size": 130},
}
LINEARS = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)


@functools.cache
def never_run(sizes, dtype):
    """A model to copy. A copy takes a quarter of the time of a new model."""
    return twins.twins(**SIZES[sizes])[1].to(dtype)


@pytest.fixture(params=["AVX2", "AVX512", "AMX", "oneDNN float32", "oneDNN bfloat16"])
def model(request, monkeypatch):
    """A model with prepacked weights, which has run once."""
    library, _, dtype = request.param.partition(" ")
    if library == "oneDNN":
        dtype = getattr(torch, dtype)
        if reason := prepacked.missing(dtype):
            pytest.skip(reason)
        fast = copy.deepcopy(never_run("parts", dtype))
    else:
        dtype = instructions.use(library, monkeypatch)
        fast = copy.deepcopy(never_run("one call", dtype))
    states(fast)
    return fast


def states(fast):
    with torch.no_grad():
        return fast(**twins.batch()).last_hidden_state


def fresh(fast):
    """The states of a model that has never run with other weights."""
    (sizes,) = (name for name, size in SIZES.items() if size["hidden_size"] == fast.config.hidden_size)
    other = copy.deepcopy(never_run(sizes, fast.dtype))
    other.load_state_dict(fast.state_dict())
    return states(other)


def first_row(weight):
    weight[0] = 0.0


def last_row(weight):
    weight[-1] *= -3.0


def some_row(weight):
    weight[weight.shape[0] // 2 + 1] += 1.0


def first_column(weight):
    weight[:, 0] = 0.0


def last_column(weight):
    weight[:, -1] = 2.0


def some_column(weight):
    weight[:, weight.shape[1] // 2 + 1] += 1.0


def few_everywhere(weight):
    where = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.01
    weight[where] += 1.0


ROWS_AND_COLUMNS = [first_row, last_row, some_row, first_column, last_column, some_column]


@pytest.mark.parametrize(
    ("edit", "runs"),
    [*((edit, 0) for edit in ROWS_AND_COLUMNS), (some_row, 5), (some_column, 5)],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("part", LINEARS)
def test_a_row_or_column_is_seen_at_once_case_56(edit, part, runs, model):
    for _ in range(runs):
        states(model)
    edit(model.get_parameter(f"encoder.layer.1.{part}.weight").data)
    assert torch.equal(states(model), fresh(model))


def a_zero_column(weight):
    weight[:, 0] = 0.0


def a_zero_head(weight):
    """As pruning leaves it; of the turns that read some rows whole, several would see zeros only."""
    weight[: weight.shape[0] // 3] = 0.0


def mostly_zeros(weight):
    """Half of them are -0.0."""
    weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.95


@pytest.mark.parametrize("prepare", [a_zero_column, a_zero_head, mostly_zeros], ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("part", ["attention.self.key", "intermediate.dense"])
def test_a_row_or_column_of_a_sparse_weight_is_seen_at_once_case_56(prepare, part, model):
    weight = model.get_parameter(f"encoder.layer.1.{part}.weight").data
    prepare(weight)
    fastbert.refresh(model)
    states(model)
    rows = [weight[row] for row in (0, 1, 34, 51, -2, -1)]
    columns = [weight[:, column] for column in (0, 1, 2, weight.shape[1] // 2, -3, -2, -1)]
    edited = [line for line in [*rows, *columns] if line.any()]
    assert len(edited) > 8
    for line in edited:
        line *= 0.0
        assert torch.equal(states(model), fresh(model))


@pytest.mark.parametrize("part", LINEARS)
@pytest.mark.parametrize("place", [0, 41, -1])
def test_an_element_of_a_bias_is_seen_at_once_case_56(part, place, model):
    model.get_parameter(f"encoder.layer.1.{part}.bias").data[place] += 1.0
    assert torch.equal(states(model), fresh(model))


@pytest.mark.parametrize("part", LINEARS)
def test_scattered_edits_are_seen_after_a_few_forwards_case_56(part, model):
    few_everywhere(model.get_parameter(f"encoder.layer.1.{part}.weight").data)
    expected = fresh(model)
    assert any(torch.equal(states(model), expected) for _ in range(4))


@pytest.mark.parametrize("part", LINEARS)
@pytest.mark.parametrize("place", [(0, 0), (7, 5), (-1, -1), (33, -2)])
def test_one_element_is_seen_in_the_end_case_56(part, place, model):
    weight = model.get_parameter(f"encoder.layer.1.{part}.weight")
    if weight.dtype == torch.float32:
        weight.detach().numpy()[place] += 1.0
    else:
        weight.data[place] += 1.0
    expected = fresh(model)
    assert any(torch.equal(states(model), expected) for _ in range(prepacked.FORWARDS_TO_READ_ALL))
    assert torch.equal(states(model), expected)


@pytest.mark.parametrize("part", LINEARS)
def test_one_element_is_seen_at_once_where_torch_counts_it(part, model):
    with torch.no_grad():
        model.get_parameter(f"encoder.layer.1.{part}.weight")[7, 5] += 1.0
    assert torch.equal(states(model), fresh(model))


@pytest.mark.parametrize("part", LINEARS)
def test_refresh_makes_any_edit_seen_at_once_case_56(part, model):
    model.get_parameter(f"encoder.layer.1.{part}.weight").data[7, 5] += 1.0
    fastbert.refresh(model)
    assert torch.equal(states(model), fresh(model))


def test_what_is_not_edited_is_not_packed_again(model, monkeypatch):
    packed = []
    for kernels in (prepacked.host_linear, prepacked.onednn):
        original = kernels.pack
        monkeypatch.setattr(kernels, "pack", lambda weight, original=original: packed.append(1) or original(weight))
    for _ in range(2 * prepacked.FORWARDS_TO_READ_ALL + 1):
        states(model)
    assert not packed
    model.encoder.layer[1].output.dense.weight.data[:, 3] = 0.0
    states(model)
    assert len(packed) == 1


def test_a_weight_that_is_not_contiguous_is_not_prepacked(model):
    weight = model.encoder.layer[1].output.dense.weight
    weight.data = weight.data.T.contiguous().T
    with torch.no_grad():
        reason = prepacked.unsupported(weight[:1], [model.encoder.layer[1].output.dense])
    assert reason == "a weight isn't contiguous"
    assert torch.allclose(states(model), fresh(model), atol=1e-5 if weight.dtype == torch.float32 else 0.1)


def test_the_number_of_forwards_is_the_extension_s():
    assert extension.module().CHECKSUM_TURNS == prepacked.FORWARDS_TO_READ_ALL
