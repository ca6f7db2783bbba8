"""Case 35: a Linear that is quantised, pruned, parametrised, hooked or replaced is called, and not bypassed."""

import copy
import functools

import pytest
import torch
from models import twins
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.models.bert import modeling_bert as hf

import fastbert

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")

# One Linear of each fused product.
PATHS = (
    "encoder.layer.1.attention.self.query",
    "encoder.layer.1.attention.self.value",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.1.intermediate.dense",
    "encoder.layer.1.output.dense",
)


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 1.5 * super().forward(x)


def scale(model, path):
    model.get_submodule(path).__class__ = Scaled


def replace_forward(model, path):
    linear = model.get_submodule(path)
    linear.forward = lambda x: 1.5 * nn.Linear.forward(linear, x)


def prune_half(model, path):
    prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)


def prune_bias(model, path):
    prune.random_unstructured(model.get_submodule(path), "bias", 0.5)


def parametrize(model, path):
    parametrizations.spectral_norm(model.get_submodule(path)).eval()


def quantize(model, path=None):
    """``model`` with one or all of its products in int8."""
    quantization = pytest.importorskip("torch.ao.quantization")
    types = nn.Linear if path is None else path
    quantization.quantize_dynamic(model, {types: quantization.default_dynamic_qconfig}, inplace=True)


class Around(nn.Module):
    """It has no weight of its own."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 1.5 * self.linear(x)


def wrap(model, path):
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, Around(model.get_submodule(path)))


def output_hook(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, output: 1.5 * output)


def input_hook(model, path):
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


CHANGES = (scale, wrap, replace_forward, prune_half, prune_bias, parametrize, quantize, output_hook, input_hook)
HOOKS = (output_hook, input_hook)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("change", CHANGES)
def test_change_is_respected(change, path, gradients):
    reference, fast = twins.twins()
    # The range of an activation decides how it is quantised, and there padding counts in Hugging Face.
    inputs = twins.batch(kind="none" if change is quantize else "right")
    where = twins.valid(inputs)
    with torch.no_grad():
        unchanged = fast(**inputs).last_hidden_state
    torch.manual_seed(0)
    change(reference, path)
    change(fast, path)
    fast.load_state_dict(reference.state_dict())
    with torch.set_grad_enabled(gradients):
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    if change is quantize:
        # Two roundings of an input may fall on either side of a step of its 255: that moves a result by a step times a
        # weight, here and there. Were the change ignored, all of them would differ.
        step = (unchanged.max() - unchanged.min()) / 255 * fast.embeddings.word_embeddings.weight.abs().max()
        error = (actual - expected)[where].abs()
        assert error.max() <= step
        assert error.mean() <= 0.01 * (expected - unchanged)[where].abs().mean()
    else:
        torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)
    assert (actual - unchanged)[where].abs().max() > 1e-3
    if change in HOOKS:
        assert "has a hook" in fast.route
    else:
        twins.assert_packed(fast)


def test_change_after_the_weights_were_prepacked():
    reference, fast = twins.twins()
    inputs = twins.batch()
    with torch.no_grad():
        fast(**inputs)
        for model in (reference, fast):
            prune_half(model, PATHS[-1])
            scale(model, PATHS[0])
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    where = twins.valid(inputs)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)


def test_quantised_model():
    reference, fast = twins.twins()
    quantize(reference)
    quantize(fast)
    inputs = twins.batch(kind="full")
    expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    reasons = {row.part: row.reason for row in fastbert.explain(fast)}
    for part in ("query, key, value", "dense, dropout, residual, LayerNorm", "dense, GELU"):
        assert "torch.ao.nn.quantized" in reasons[part]


def test_gradients_reach_pruned_and_parametrised_weights():
    reference, fast = twins.twins("BertForSequenceClassification")
    oracle = copy.deepcopy(reference).double()
    for model in (reference, fast, oracle):
        prune_half(model, "bert." + PATHS[0])
        parametrizations.weight_norm(model.get_submodule("bert." + PATHS[-1]))
    inputs = twins.head_batch("BertForSequenceClassification")
    for model in (reference, fast, oracle):
        model(**inputs).loss.backward()
    twins.assert_packed(fast)
    twins.assert_gradients_match(fast, reference, oracle)


PARTS = (
    "embeddings",
    "encoder",
    "encoder.layer.1",
    "encoder.layer.1.attention",
    "encoder.layer.1.attention.self",
    "encoder.layer.1.attention.output",
    "encoder.layer.1.intermediate",
    "encoder.layer.1.output",
    "encoder.layer.1.output.LayerNorm",
    "embeddings.LayerNorm",
)


class Foreign(nn.Module):
    """A part of somebody else's in the place of Hugging Face's."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args, **kwargs):
        return scaled(self.part, *args, **kwargs)


def scaled(forward, *args, **kwargs):
    output = forward(*args, **kwargs)
    if isinstance(output, torch.Tensor):
        return 1.1 * output
    if isinstance(output, tuple):
        return (1.1 * output[0], *output[1:])
    output.last_hidden_state = 1.1 * output.last_hidden_state
    return output


@pytest.mark.parametrize("path", [path for path in PARTS if not path.endswith("LayerNorm")])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_replaced_part_is_called_on_padded_states(path, gradients):
    reference, fast = twins.twins()
    inputs = twins.batch(kind="right")
    where = twins.valid(inputs)
    parent, _, name = path.rpartition(".")
    part = reference.get_submodule(path)
    for model in (reference, fast):
        setattr(model.get_submodule(parent), name, Foreign(copy.deepcopy(part)))
    with torch.set_grad_enabled(gradients):
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    assert fast.route.startswith(f"{path} is a {Foreign.__module__}.Foreign, which knows padded states only")
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("mode", ["inference", "gradients", "training"])
def test_a_forward_that_has_been_replaced_is_called(path, mode):
    reference, fast = twins.twins()
    inputs = twins.batch(kind="right")
    where = twins.valid(inputs)
    for model in (reference, fast):
        model.train(mode == "training")
        part = model.get_submodule(path)
        part.forward = functools.partial(scaled, part.forward)
    with torch.set_grad_enabled(mode != "inference"):
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)


class Doubling(nn.Parameter):
    """A weight that multiplies twice, as those of quantising and sharding libraries change what a product does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        return 2.0 * found if function is nn.functional.linear else found


@pytest.mark.parametrize("path", PATHS)
def test_a_parameter_of_another_type(path):
    reference, fast = twins.twins()
    inputs = twins.batch(kind="right")
    where = twins.valid(inputs)
    for model in (reference, fast):
        linear = model.get_submodule(path)
        linear.weight = Doubling(linear.weight.detach())
    with torch.no_grad():
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)
    assert any("its weight is a Doubling" in row.reason for row in fastbert.explain(fast))


class Halving(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_dropout_of_another_kind(given):
    reference, fast = twins.twins()
    inputs = twins.batch(kind="right")
    where = twins.valid(inputs)
    if given == "inputs_embeds":
        inputs["inputs_embeds"] = reference.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    for model in (reference, fast):
        model.train()
        model.embeddings.dropout = Halving()
        model.embeddings.dropout.p = 0.5
        model.encoder.layer[1].output.dropout = Halving()
    expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_an_embedding_that_does_more_than_look_up(option):
    reference, fast = twins.twins()
    inputs = twins.batch(kind="right")
    where = twins.valid(inputs)
    (name,) = option
    gradients = []
    for model in (reference, fast):
        vars(model.embeddings.word_embeddings).update(option)
        states = model(**inputs).last_hidden_state[where]
        states.square().sum().backward()
        gradients.append(model.embeddings.word_embeddings.weight.grad.to_dense())
        assert model.embeddings.word_embeddings.weight.grad.is_sparse == (name == "sparse")
    expected, actual = gradients
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    twins.assert_packed(fast)
    (row,) = (row for row in fastbert.explain(fast) if row.part == "embeddings")
    assert row.implementation == "Hugging Face"
    assert row.reason == f"it has {name}={option[name]}"


@pytest.mark.parametrize("part", ["embeddings", "encoder.layer.0", "encoder.layer.0.output", "embeddings.LayerNorm"])
def test_hooks_see_what_hugging_face_shows_them(part):
    inputs = twins.batch()
    seen = []
    for model in twins.twins():
        model.get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(output))
        model(**inputs)
    expected, actual = seen
    where = twins.valid(inputs)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "part", [hf.BertPredictionHeadTransform, hf.BertIntermediate, hf.BertSelfOutput, hf.BertOutput]
)
@pytest.mark.parametrize("training", [False, True])
def test_a_part_refuses_a_keyword_that_stock_does_not_know(part, training):
    made = fastbert.accelerate(part(twins.config())).train(training)
    states = torch.randn(2, 3, made.dense.in_features)
    more = () if part in (hf.BertPredictionHeadTransform, hf.BertIntermediate) else (torch.randn(2, 3, 64),)
    made(states, *more)
    with pytest.raises(TypeError, match="unknown_to_stock"):
        made(states, *more, unknown_to_stock=1)


def test_gradient_hooks_see_what_hugging_face_shows_them():
    inputs = twins.head_batch("BertForSequenceClassification")
    seen = []
    for model in twins.twins("BertForSequenceClassification"):
        linear = model.get_submodule("bert." + PATHS[2])
        linear.register_full_backward_hook(lambda module, given, received: seen.append((given[0], received[0])))
        model(**inputs).loss.backward()
    torch.testing.assert_close(seen[1], seen[0], atol=1e-6, rtol=1e-4)


def test_a_hook_of_pythons_own():
    """A method of a builtin has no module to tell whose it is."""
    _, fast = twins.twins()
    seen, inputs = {}, twins.batch()
    dense = fast.encoder.layer[1].output.dense
    dense.register_forward_pre_hook(seen.__setitem__)
    with torch.no_grad():
        fast(**inputs)
    assert fast.route == "a Linear has a hook (dict.__setitem__), which may expect padded states"
    assert seen[dense][0].shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("grad", [False, True])
def test_attention_runs_once_where_nothing_is_differentiated(grad):
    reference, fast = twins.twins()
    calls = []
    for model in (reference, fast):
        model.requires_grad_(False)
        query = model.encoder.layer[1].attention.self.query
        query.forward = lambda x, query=query: calls.append(query) or nn.Linear.forward(query, x)
    inputs = twins.batch()
    with torch.set_grad_enabled(grad):
        expected, actual = (model(**inputs).last_hidden_state[twins.valid(inputs)] for model in (reference, fast))
    twins.assert_packed(fast)
    assert len(calls) == 2
    torch.testing.assert_close(actual, expected, atol=twins.TOLERANCE, rtol=twins.TOLERANCE)


@pytest.mark.parametrize("mode", ["inference", "autocast", "traced", "gradients"])
def test_projections_without_biases(mode, fresh_dynamo):
    reference, fast = twins.twins()
    for model in (reference, fast):
        for name in ("query", "key", "value"):
            model.get_submodule(f"encoder.layer.1.attention.self.{name}").bias = None
    inputs = twins.batch()
    run = torch.compile(fast, backend="eager") if mode == "traced" else fast
    with torch.autocast("cpu", enabled=mode == "autocast"), torch.set_grad_enabled(mode == "gradients"):
        expected, actual = (model(**inputs).last_hidden_state[twins.valid(inputs)] for model in (reference, run))
    tolerance = 0.1 if mode == "autocast" else twins.TOLERANCE
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
