"""What a model is given: 4-D masks as in Hugging Face; for what can't be served, clear errors before anything runs."""

import re

import pytest
import torch
from models import twins
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert

IMPLEMENTATIONS = ("sdpa", "eager", "fastbert")


class Launched(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


# What it takes to look at the values of ids.
LOOKS = {"aten::aminmax", "aten::lt", "aten::ge", "aten::is_nonzero", "aten::_local_scalar_dense"}


def assert_refused(error, match, model=None, **inputs):
    """``model`` raises ``error`` with a message that matches ``match``, and has computed nothing by then."""
    model = twins.twins()[1] if model is None else model
    with pytest.raises(error, match=match), Launched() as launched:
        model(**inputs)
    assert launched.names <= LOOKS


def test_launches_are_seen():
    with Launched() as launched, torch.no_grad():
        twins.twins()[1](**twins.batch())
    assert "fastbert::attention" in launched.names
    assert "fastbert::embedding_layer_norm" in launched.names


def allowed_4d(kind, heads=1):
    """bool ``[5, heads, 37, 37]``: where a query may attend to a key; every query has one."""
    padding = twins.valid(twins.batch(kind="right"))[:, None, None, :]
    if kind == "causal":
        padding = padding & torch.ones(37, 37).tril().bool()
    if kind == "random":
        padding = padding & (torch.rand(5, heads, 37, 37, generator=torch.Generator().manual_seed(0)) < 0.7)
        padding[..., 0] = True
    return padding.expand(5, heads, 37, 37)


def assert_same_with_mask(reference, fast, mask, reference_mask=None, tolerance=1e-5):
    inputs = twins.batch(kind="none")
    with torch.no_grad():
        expected = reference(**inputs, attention_mask=mask if reference_mask is None else reference_mask)
        actual = fast(**inputs, attention_mask=mask)
    assert "4-D attention_mask" in fast.route or "attn_implementation='eager'" in fast.route
    assert expected.last_hidden_state.isfinite().all()
    # Nothing is packed, so padded positions agree as well.
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=tolerance, rtol=0)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=tolerance, rtol=0)
    return actual.last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize(("kind", "heads"), [("right", 1), ("causal", 1), ("random", 4)])
def test_additive_4d_masks_case_4(kind, heads, hidden, implementation):
    reference, fast = twins.twins(attn_implementation=implementation)
    mask = torch.zeros(5, heads, 37, 37).masked_fill(~allowed_4d(kind, heads), hidden)
    masked = assert_same_with_mask(reference, fast, mask)
    with torch.no_grad():
        unmasked = fast(**twins.batch(kind="none")).last_hidden_state
    assert not torch.allclose(masked, unmasked, atol=1e-2)


def test_one_4d_mask_for_all_rows_case_4():
    reference, fast = twins.twins()
    assert_same_with_mask(reference, fast, torch.zeros(1, 1, 37, 37).masked_fill(~allowed_4d("causal")[:1], -1e4))


def test_additive_4d_mask_of_keys_only_case_4():
    reference, fast = twins.twins()
    keys = torch.zeros(5, 1, 1, 37).masked_fill(~allowed_4d("right")[:, :, :1], float("-inf"))
    assert_same_with_mask(reference, fast, keys)


def test_gradients_with_an_additive_mask_case_4():
    mask = torch.zeros(5, 1, 37, 37).masked_fill(~allowed_4d("causal"), float("-inf"))
    found = []
    for model in twins.twins():
        model.double()(
            **twins.batch(kind="none"), attention_mask=mask.double()
        ).last_hidden_state.square().sum().backward()
        found.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    expected, actual = found
    for path, gradient in expected.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(actual[path], gradient, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(("kind", "heads"), [("causal", 1), ("random", 4)])
def test_boolean_and_integer_4d_masks_mean_the_same_case_5(kind, heads, dtype, implementation):
    reference = twins.twins()[0]
    fast = twins.twins(attn_implementation=implementation)[1]
    allowed = allowed_4d(kind, heads)
    assert_same_with_mask(reference, fast, allowed.to(dtype), reference_mask=allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boolean_4d_masks_in_other_precisions_case_5(dtype, implementation):
    allowed = allowed_4d("causal")
    inputs = twins.batch(kind="none")
    reference = twins.twins()[0]
    fast = twins.twins(attn_implementation=implementation)[1].to(dtype)
    with torch.no_grad():
        exact = reference(**inputs, attention_mask=allowed).last_hidden_state
        baseline = reference.to(dtype)(**inputs, attention_mask=allowed).last_hidden_state
        states = fast(**inputs, attention_mask=allowed).last_hidden_state
    assert states.dtype == dtype
    error, allowed_error = ((x - exact).abs().max() for x in (states, baseline))
    assert error <= 2 * allowed_error + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("shape", [(), (5, 37, 37), (5, 1, 1, 37, 37)])
def test_masks_of_other_ranks_case_6(shape):
    inputs = twins.batch(kind="none")
    assert_refused(ValueError, "attention_mask has shape .*3-D mask needs", **inputs, attention_mask=torch.ones(shape))


@pytest.mark.parametrize(
    "shape",
    [(4, 37), (5, 36), (5, 38), (5, 1), (37, 5), (1, 36), (36,), (4, 1, 37, 37), (5, 1, 37, 36), (5, 1, 36, 37)],
)
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_masks_of_other_sizes_case_7(shape, given):
    inputs = {"input_ids": twins.batch()["input_ids"]} if given == "input_ids" else {given: torch.randn(5, 37, 64)}
    named = re.escape(f"attention_mask has shape {shape}, and {given} (5, 37)")
    assert_refused(ValueError, named, **inputs, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("shape", [(37,), (1, 37)])
@pytest.mark.parametrize("name", ["BertModel", "BertForQuestionAnswering"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_one_mask_for_all_rows_case_61(shape, name, given):
    inputs = {"input_ids": twins.batch()["input_ids"]} if given == "input_ids" else {given: torch.randn(5, 37, 64)}
    mask = torch.ones(37)
    mask[29:] = 0
    reference, fast = twins.twins(name)
    with torch.no_grad():
        expected = reference(**inputs, attention_mask=mask.expand(5, 37))[0][:, :29]
        found = fast(**inputs, attention_mask=mask.view(shape))[0][:, :29]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_empty_batches_case_11(shape, name):
    model = twins.twins(name)[1]
    told = f"has {shape[0]} sequences of length {shape[1]}; there must be at least one of each"
    empty = torch.zeros(shape, dtype=torch.int64)
    assert_refused(ValueError, f"input_ids {told}", model, input_ids=empty)
    # What Hugging Face raises, and its callers catch.
    assert_refused(RuntimeError, f"input_ids {told}", model, input_ids=empty)
    assert_refused(ValueError, f"input_ids {told}", model, input_ids=empty, attention_mask=torch.ones(shape))
    assert_refused(ValueError, f"inputs_embeds {told}", model, inputs_embeds=torch.randn(*shape, 64))


def test_too_long_case_14():
    told = "has sequence length 601; it may be at most max_position_embeddings, 600"
    assert_refused(ValueError, f"input_ids {told}", input_ids=torch.ones(2, 601, dtype=torch.int64))
    assert_refused(ValueError, f"inputs_embeds {told}", inputs_embeds=torch.randn(2, 601, 64))


def test_long_with_positions_of_its_own_case_14():
    reference, fast = twins.twins()
    inputs = {**twins.batch(2, 601, "none"), "position_ids": (torch.arange(601) % 600).unsqueeze(0)}
    with torch.no_grad():
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "limit", "limit_name"),
    [
        ("input_ids", 101, "vocab_size"),
        ("token_type_ids", 2, "type_vocab_size"),
        ("position_ids", 600, "max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("wrong", ["low", "high", "very high"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_outside_their_table_case_15(name, limit, limit_name, wrong, dtype):
    model = twins.twins("BertForSequenceClassification")[1]
    value = {"low": -1, "high": limit, "very high": 2**31 - 1}[wrong]
    inputs = {**twins.batch(), "position_ids": torch.arange(37).repeat(5, 1)}
    inputs[name] = inputs[name].to(dtype)
    inputs[name][3, 0] = value
    told = f"{name} holds {value}; values must be from 0 to {limit_name} - 1, which is {limit - 1}"
    assert_refused(IndexError, told, model, **inputs)
    inputs[name][3, 0] = limit - 1
    model(**inputs)
    twins.assert_packed(model)


def test_a_wrong_id_in_padding_is_refused_case_15():
    # Hugging Face looks padding up too; what is wrong there is wrong in the caller's tokenisation.
    inputs = twins.batch()
    inputs["input_ids"][0, -1] = 101
    assert inputs["attention_mask"][0, -1] == 0
    assert_refused(IndexError, "input_ids holds 101", **inputs)


@pytest.mark.gpu
def test_wrong_ids_on_a_gpu_leave_the_context_usable_case_15(monkeypatch):
    monkeypatch.setenv("FASTBERT_CHECK_IDS", "1")
    model = twins.twins()[1].cuda()
    inputs = {name: value.cuda() for name, value in twins.batch().items()}
    wrong = inputs["input_ids"].clone()
    wrong[0, 0] = 101
    with pytest.raises(IndexError, match="input_ids holds 101"):
        model(**{**inputs, "input_ids": wrong})
    with torch.no_grad():
        assert model(**inputs).last_hidden_state.isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int16])
def test_ids_of_other_dtypes_case_16(name, dtype):
    inputs = {**twins.batch(), "position_ids": torch.arange(37).repeat(5, 1)}
    inputs[name] = inputs[name].to(dtype)
    assert_refused(TypeError, f"{name} has dtype {dtype}; it may be torch.int64 or torch.int32", **inputs)


@pytest.mark.parametrize("kind", ["none", "right"])
def test_int32_ids_and_positions_case_16(kind):
    reference, fast = twins.twins()
    inputs = {**twins.batch(kind=kind), "position_ids": torch.arange(37).flip(0).repeat(5, 1)}
    where = twins.valid(inputs)
    narrow = {name: value.int() for name, value in inputs.items()}
    with torch.no_grad():
        expected, actual = reference(**inputs).last_hidden_state, fast(**narrow).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_exactly_one_of_ids_and_embeddings(name):
    model = twins.twins(name)[1]
    told = "exactly one of input_ids or inputs_embeds"
    assert_refused(ValueError, told, model)
    assert_refused(ValueError, told, model, attention_mask=torch.ones(5, 37))
    assert_refused(ValueError, told, model, **twins.batch(), inputs_embeds=torch.randn(5, 37, 64))


@pytest.mark.parametrize("shape", [(37,), (5, 1), (1, 37), (1, 1)])
def test_ids_that_broadcast(shape):
    reference, fast = twins.twins()
    inputs = {**twins.batch(kind="none"), "token_type_ids": torch.ones(shape, dtype=torch.int64)}
    with torch.no_grad():
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("shape", [(5, 36), (4, 37), (36,), (1, 5, 37), ()])
def test_ids_that_do_not_broadcast(name, shape):
    inputs = {**twins.batch(), name: torch.zeros(shape, dtype=torch.int64)}
    assert_refused(ValueError, f"{name} has shape .*; with input_ids of \\(5, 37\\) it must match that", **inputs)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"input_ids": torch.ones(37, dtype=torch.int64)}, "input_ids has shape \\(37,\\)"),
        ({"input_ids": torch.ones(2, 5, 37, dtype=torch.int64)}, "input_ids has shape \\(2, 5, 37\\)"),
        ({"inputs_embeds": torch.ones(37, 64)}, "inputs_embeds has shape \\(37, 64\\)"),
        ({"inputs_embeds": torch.ones(5, 37, 64, 1)}, "inputs_embeds has shape \\(5, 37, 64, 1\\)"),
        ({"inputs_embeds": torch.ones(5, 37, 32)}, "inputs_embeds has 32 features; it must have hidden_size, 64"),
        ({"inputs_embeds": torch.ones(5, 37, 96)}, "inputs_embeds has 96 features; it must have hidden_size, 64"),
    ],
)
def test_inputs_of_other_shapes(inputs, told):
    assert_refused(ValueError, told, **inputs)


@pytest.mark.parametrize("shape", [(5, 1, 37, 36), (5, 1, 37, 38), (5, 1, 36, 37), (5, 1, 38, 37), (4, 1, 37, 37)])
def test_4d_masks_of_other_shapes(shape):
    told = "attention_mask has shape .*; a 4-D mask must be \\[5 or 1, heads or 1, 37, 37\\]"
    assert_refused(ValueError, told, **{**twins.batch(), "attention_mask": torch.ones(shape)})


@pytest.mark.parametrize("name", ["BertModel", *twins.HEADS])
def test_every_head_checks_its_inputs(name):
    model = twins.twins(name)[1]
    inputs = twins.batch() if name == "BertModel" else twins.head_batch(name)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"].view(-1)[0] = 101
    with pytest.raises(IndexError, match="input_ids holds 101"):
        model(**inputs)


def test_accelerated_models_check_their_inputs():
    reference = twins.twins("BertForTokenClassification")[0]
    assert_refused(
        ValueError,
        "input_ids has sequence length 601",
        fastbert.accelerate(reference),
        input_ids=torch.ones(2, 601, dtype=torch.int64),
    )


def test_sequence_arguments_need_one_row_without_a_mask():
    inputs = twins.batch()
    cu_seqlens = torch.tensor([0, 10, 37], dtype=torch.int32)
    assert_refused(ValueError, "cu_seq_lens_q.* a batch of 5 rows", **inputs, cu_seq_lens_q=cu_seqlens)
    assert_refused(ValueError, "a batch of 5 rows", input_ids=inputs["input_ids"], cu_seq_lens_q=cu_seqlens)
    one = {name: value[:1] for name, value in inputs.items()}
    assert_refused(ValueError, "no attention_mask", **one, cu_seq_lens_q=cu_seqlens)
    assert_refused(ValueError, "cu_seq_lens_q is needed", input_ids=inputs["input_ids"][:1], max_length_q=37)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q can't be honoured here, since .*eager"):
        twins.twins(attn_implementation="eager")[1](input_ids=inputs["input_ids"][:1], cu_seq_lens_q=cu_seqlens)
