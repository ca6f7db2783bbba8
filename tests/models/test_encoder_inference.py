"""Inference through the encoder without its modules' forwards: on a GPU, or with ``--triton``."""

import copy
from collections import Counter

import pytest
import torch
from models import twins
from torch import nn

from fastbert.backends import select
from fastbert.models import encoder_inference, layers, model_inference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = next(select.needs_triton(select.Request(DEVICE, torch.float32)), None)
pytestmark = [pytest.mark.triton, pytest.mark.skipif(REASON is not None, reason=f"Triton's kernels: {REASON}")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

SIZES = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def model():
    return twins.twins("BertModel", **SIZES)[1].eval().to(DEVICE)


@pytest.fixture
def taken(monkeypatch):
    """Whether each forward of an encoder went this way; by what is known of its model, or not."""
    found = []
    forward, known_forward = encoder_inference.forward, model_inference.forward

    def watched(*args):
        encoded = forward(*args)
        found.append(encoded is not None)
        return encoded

    def watched_model(*args):
        known = known_forward(*args)
        found.extend([True] if known is not None else [])
        return known

    monkeypatch.setattr(encoder_inference, "forward", watched)
    monkeypatch.setattr(model_inference, "forward", watched_model)
    # Prepacked weights are for CPUs; here a CPU stands for a GPU.
    monkeypatch.setattr(layers.prepacked, "missing", lambda dtype: "the test is of Triton's kernels")
    monkeypatch.setattr(layers.prepacked, "unsupported", lambda x, linears: "the test is of Triton's kernels")
    return found


def batch(seed=0):
    return {name: value.to(DEVICE) for name, value in twins.batch(2, 6, seed=seed).items()}


def states(model):
    with torch.no_grad():
        return model(**batch()).last_hidden_state


def one_by_one(model):
    """What the layers compute when they are called."""
    plans, encoder_inference.unserved = encoder_inference.unserved, lambda x: "the layers are the oracle"
    try:
        return states(model)
    finally:
        encoder_inference.unserved = plans


def test_it_computes_what_the_layers_do(model, taken):
    first = states(model)
    assert taken == [True]
    assert torch.equal(first, one_by_one(model))
    assert torch.equal(first, states(model))
    assert taken == [True, False, True]


def test_it_launches_seven_operations_a_layer(model, taken, monkeypatch):
    """Three products, attention, the product with GELU, and the rows' two passes: eight kernels with a GELU apart."""
    counts = Counter()

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(encoder_inference.F, "linear", counted("product", encoder_inference.F.linear))
    request = select.Request(DEVICE, torch.float32, index=0 if DEVICE == "cuda" else None)
    names = {"attention": "forward", "linear_gelu": "forward", "bias_dropout_residual_layer_norm": "output"}
    for op, name in names.items():
        module = select.best(op, request)
        monkeypatch.setattr(module, name, counted(op, getattr(module, name)))
    states(model)
    assert taken == [True]
    layers_count = len(model.encoder.layer)
    # The product inside linear_gelu is its own, and the pooler has another.
    inside = counts["product"] - 3 * layers_count - 1
    assert 0 <= inside <= layers_count
    expected = {"attention": 1, "linear_gelu": 1, "bias_dropout_residual_layer_norm": 2}
    assert {op: counts[op] for op in expected} == {op: count * layers_count for op, count in expected.items()}


def rescale(parameter):
    parameter.data = parameter.data * 1.5


def cut(parameter):
    """The same address, another shape."""
    parameter.data = parameter.data[: parameter.shape[0] // 2]


# What may happen to a model between two forwards, by what it is done to; the next must compute with it.
CHANGES = {
    "a weight in place": lambda m: m.encoder.layer[1].output.dense.weight.data.mul_(1.5),
    "a weight's data": lambda m: rescale(m.encoder.layer[1].output.dense.weight),
    "a bias's data": lambda m: rescale(m.encoder.layer[0].intermediate.dense.bias),
    "a query's data": lambda m: rescale(m.encoder.layer[0].attention.self.query.weight),
    "another parameter": lambda m: setattr(
        m.encoder.layer[0].output.LayerNorm, "weight", nn.Parameter(torch.full((16,), 0.5, device=DEVICE))
    ),
    "another module": lambda m: setattr(m.encoder.layer[1].output, "dense", nn.Linear(32, 16, device=DEVICE)),
    "another layer": lambda m: m.encoder.layer.__setitem__(0, copy.deepcopy(m.encoder.layer[1])),
    "a layer less": lambda m: m.encoder.layer.__delitem__(1),
    "an activation": lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()),
    "eps": lambda m: setattr(m.encoder.layer[0].attention.output.LayerNorm, "eps", 0.3),
    "the scale of the scores": lambda m: setattr(m.encoder.layer[0].attention.self, "scaling", 0.9),
    "a hook on a product": lambda m: m.encoder.layer[0].output.dense.register_forward_hook(lambda *a: a[2] * 2),
    "a hook before a LayerNorm": lambda m: m.encoder.layer[0].output.LayerNorm.register_forward_pre_hook(
        lambda module, args: (args[0] * 2 + 1,)
    ),
    "a forward": lambda m: setattr(m.encoder.layer[0].output.dense, "forward", lambda x: x[..., :16]),
    "a dropout in training": lambda m: m.encoder.layer[0].output.dropout.train().__setattr__("p", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_forwards_is_seen(change, model, taken):
    before = states(model)
    assert taken == [True]
    change(model)
    torch.manual_seed(3)
    after = states(model)
    torch.manual_seed(3)
    assert torch.equal(after, one_by_one(model))
    assert not torch.equal(after, before)


def test_a_hook_that_is_gone_costs_nothing_further(model, taken):
    states(model)
    handle = model.encoder.layer[0].output.dense.register_forward_hook(lambda *args: None)
    states(model)
    handle.remove()
    states(model)
    assert taken == [True, True]  # in between the padded way was gone


def test_a_bias_cut_short_raises_as_the_layers_do(model, taken):
    states(model)
    cut(model.encoder.layer[1].output.LayerNorm.bias)
    with pytest.raises((RuntimeError, ValueError)):
        states(model)
    with pytest.raises((RuntimeError, ValueError)):
        one_by_one(model)


def test_with_gradients_or_autocast_the_layers_are_called(model, taken):
    model(**batch())
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        states(model)
    assert taken == [False, False]


def test_of_another_dtype(model, taken):
    states(model)
    model.to(torch.float16)
    assert torch.equal(states(model), one_by_one(model))
    assert taken[:2] == [True, True]


def test_models_keep_plans_of_their_own(model, taken):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    first, second = states(model), states(other)
    assert not torch.equal(first, second)
    assert torch.equal(states(model), first)
    assert torch.equal(states(other), second)
    assert all(taken)
