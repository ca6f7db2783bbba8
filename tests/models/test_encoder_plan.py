"""What is known of an encoder is found out once, and again after every change that could matter."""

import copy

import pytest
import torch
from models import twins
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastbert.models import encoder_plan, layer_training, layers


@pytest.fixture
def looks(monkeypatch):
    """The layers that are looked at."""
    found = []
    unfused = layers.BertLayer.unfused
    monkeypatch.setattr(layers.BertLayer, "unfused", lambda self: found.append(self) or unfused(self))
    return found


def step(model, inputs=None):
    """The states and the gradients of a step."""
    model.zero_grad()
    states = model(**(inputs or twins.batch())).last_hidden_state
    states[twins.valid(twins.batch())].square().sum().backward()
    gradients = {path: None if p.grad is None else p.grad.clone() for path, p in model.named_parameters()}
    return states.detach(), gradients


def test_a_second_step_looks_at_no_layer(looks):
    fast = twins.twins()[1].train()
    step(fast)
    assert set(looks) == set(fast.encoder.layer)
    looks.clear()
    step(fast, twins.batch(seed=1))
    assert looks == []


def test_it_is_asked_once_a_forward(monkeypatch):
    asked = []
    holds = encoder_plan.EncoderPlan.holds
    monkeypatch.setattr(encoder_plan.EncoderPlan, "holds", lambda self, root: asked.append(root) or holds(self, root))
    fast = twins.twins()[1].train()
    step(fast)
    step(fast)
    assert asked == [fast.encoder]


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


def change_class(layer):
    layer.output.dense.__class__ = Scaled


def change_attention(layer):
    kind = type(layer.attention.self)

    def scaled(self, *args, **kwargs):
        context, probabilities = kind.forward(self, *args, **kwargs)
        return 1.5 * context, probabilities

    layer.attention.self.__class__ = type("ScaledAttention", (kind,), {"forward": scaled})


def replace_attention_forward(layer):
    attention = layer.attention.self
    forward = attention.forward

    def scaled(*args, **kwargs):
        context, probabilities = forward(*args, **kwargs)
        return 1.5 * context, probabilities

    attention.forward = scaled


def replace_module(layer):
    made = copy.deepcopy(layer.attention.self.value)
    with torch.no_grad():
        made.weight.mul_(1.5)
    layer.attention.self.value = made


def replace_parameter(layer):
    layer.intermediate.dense.weight = nn.Parameter(1.5 * layer.intermediate.dense.weight.detach())


def replace_data(layer):
    layer.intermediate.dense.weight.data = 1.5 * layer.intermediate.dense.weight.data


def change_activation(layer):
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def prune_weights(layer):
    prune.l1_unstructured(layer.attention.output.dense, "weight", 0.5)


def parametrize(layer):
    parametrizations.weight_norm(layer.attention.self.key)


def tensor_for_parameter(layer):
    """It is no parameter any more, and can be replaced without a trace."""
    dense = layer.output.dense
    weight = dense.weight.detach()
    del dense.weight
    dense.weight = 1.5 * weight


CHANGES = (
    change_class,
    change_attention,
    replace_attention_forward,
    replace_module,
    replace_parameter,
    replace_data,
    change_activation,
    prune_weights,
    parametrize,
    tensor_for_parameter,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps(change):
    theirs, ours = twins.twins()
    for model in (theirs, ours):
        unchanged, _ = step(model.train())
        change(model.encoder.layer[1])
    expected, actual = step(theirs), step(ours)
    twins.assert_packed(ours)
    where = twins.valid(twins.batch())
    torch.testing.assert_close(actual[0][where], expected[0][where], atol=1e-5, rtol=1e-5)
    if change is not parametrize:  # which changes the parameters, and not what they amount to
        assert (actual[0] - unchanged)[where].abs().max() > 1e-3
    assert actual[1].keys() == expected[1].keys()
    for path, gradient in expected[1].items():
        assert (gradient is None) == (actual[1][path] is None), path
        if gradient is not None:
            # Those of the keys' biases are zero but for rounding; their terms are those of the queries' biases.
            scale = expected[1][path.replace("key.bias", "query.bias")].abs().max()
            torch.testing.assert_close(actual[1][path], gradient, atol=2e-5 * float(scale), rtol=0, msg=path)


def test_a_tensor_that_is_no_parameter_may_be_replaced():
    theirs, ours = twins.twins()
    for model in (theirs, ours):
        model.train()
        tensor_for_parameter(model.encoder.layer[1])
        step(model)
        dense = model.encoder.layer[1].output.dense
        dense.weight = 0.5 * dense.weight.expand(2, *dense.weight.shape)[0]
    where = twins.valid(twins.batch())
    torch.testing.assert_close(step(ours)[0][where], step(theirs)[0][where], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["attention.self", "output"])
def test_a_hook_that_is_set_between_two_steps_is_called(part):
    fast = twins.twins()[1].train()
    step(fast)
    called = []
    fast.encoder.layer[1].get_submodule(part).register_forward_hook(lambda *args: called.append(1))
    step(fast)
    assert called == [1]


def test_attention_is_part_of_the_function_only_where_it_is_what_it_seems(monkeypatch):
    given = []
    function = layer_training.layer
    monkeypatch.setattr(
        layer_training, "layer", lambda *args: given.append(isinstance(args[1], torch.Tensor)) or function(*args)
    )
    fast = twins.twins()[1].train()
    change_attention(fast.encoder.layer[1])
    for _ in range(2):
        step(fast)
    assert given == [False, True] * 2


@pytest.mark.parametrize("frozen", [True, False])
def test_attention_alone_has_gradients(frozen):
    """What comes after it, and the embeddings, need none; in eval mode nothing else tells."""
    theirs, ours = twins.twins()
    found = []
    for model in (theirs, ours):
        model.requires_grad_(False).eval()
        model.encoder.layer[1].attention.self.query.requires_grad_(not frozen)
        states = model(**twins.batch()).last_hidden_state
        assert states.requires_grad == (not frozen)
        if not frozen:
            states[twins.valid(twins.batch())].square().sum().backward()
            found.append(model.encoder.layer[1].attention.self.query.weight.grad)
    if not frozen:
        torch.testing.assert_close(*found, atol=1e-5 * float(found[0].abs().max()), rtol=1e-4)


def test_a_copy_has_no_plan_of_the_original():
    fast = twins.twins()[1].train()
    step(fast)
    assert fast.encoder._plan.holds(fast.encoder)
    made = copy.deepcopy(fast)
    assert made.encoder._plan is None
    step(made)
    assert made.encoder._plan.holds(made.encoder)
