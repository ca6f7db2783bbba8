"""Second derivatives, forward mode and ``torch.func``: as Hugging Face's, or its error, whatever the attention is."""

import copy
import pickle

import pytest
import torch
from models import twins
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastbert

TOLD = "torch.func or forward-mode differentiation is at work, and the ops have reverse mode only"


def embedded():
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4))


def loss(model, inputs_embeds):
    """A number: the states of a padded batch, weighted."""
    states = model(inputs_embeds=inputs_embeds, attention_mask=twins.batch(2, 5)["attention_mask"])[0]
    weights = torch.linspace(-1, 1, states[0].numel()).view(states.shape[1:])
    return (states * weights)[twins.valid(twins.batch(2, 5))].square().sum()


def second_derivative(model):
    x = embedded().requires_grad_()
    (first,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def second_derivative_of_parameters(model):
    first = torch.autograd.grad(loss(model, embedded()), list(model.encoder.parameters()), create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), model.encoder.layer[0].output.dense.weight)[0]


def forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(model, forward_ad.make_dual(embedded(), embedded().sin()))).tangent


def gradient_of_parameters(model):
    def of(parameters):
        states = functional_call(model, parameters, kwargs=twins.batch(2, 5))[0]
        return states[twins.valid(twins.batch(2, 5))].square().sum()

    return torch.cat([x.flatten() for x in grad(of)(dict(model.encoder.named_parameters(prefix="encoder"))).values()])


def first_states(model):
    return lambda x: model(inputs_embeds=x)[0][0, 0, :3]


TRANSFORMS = {
    "second derivative": second_derivative,
    "second derivative of parameters": second_derivative_of_parameters,
    "forward mode": forward_mode,
    "grad": lambda model: grad(lambda x: loss(model, x))(embedded()),
    "grad of parameters": gradient_of_parameters,
    "jvp": lambda model: jvp(lambda x: loss(model, x), (embedded(),), (embedded().sin(),))[1],
    "vmap": lambda model: vmap(lambda x: model(inputs_embeds=x)[0])(embedded()[:, None]),
    "vmap of ids": lambda model: vmap(lambda x: model(input_ids=x)[0])(twins.batch(2, 5)["input_ids"][:, None]),
    "vmap of grad": lambda model: vmap(grad(lambda x: first_states(model)(x).sum()))(embedded()[:, None]),
    "jacrev": lambda model: jacrev(first_states(model))(embedded()[:1]),
    "jacfwd": lambda model: jacfwd(first_states(model))(embedded()[:1, :2]),
    "hessian": lambda model: hessian(lambda x: first_states(model)(x).sum())(embedded()[:1, :1]),
    "hvp": lambda model: torch.autograd.functional.hvp(lambda x: loss(model, x), embedded(), embedded().sin())[1],
}


def outcome(transform, model):
    try:
        return transform(model)
    except (RuntimeError, NotImplementedError) as error:
        return error


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fastbert"])
def test_transforms_case_59(transform, implementation, training):
    stock = "sdpa" if implementation == "fastbert" else implementation
    reference = twins.twins(attn_implementation=stock)[0].train(training)
    fast = twins.twins(attn_implementation=implementation)[1].train(training)
    expected, found = (outcome(TRANSFORMS[transform], model) for model in (reference, fast))
    if isinstance(expected, Exception):
        # No number where Hugging Face has none, and the reason is one of torch's or of the ops.
        assert isinstance(found, Exception)
        assert "derivative" in str(found) or "forward AD" in str(found)
        return
    assert not isinstance(found, Exception), found
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_the_reason_is_told():
    fast = twins.twins()[1]
    grad(lambda x: loss(fast, x))(embedded())
    assert fast.route == TOLD
    loss(fast, embedded())
    twins.assert_packed(fast)


def test_attention_for_stock_models_case_59():
    """``attn_implementation="fastbert"`` in Hugging Face's own classes."""
    reference, other = twins.twins()[0], twins.twins(attn_implementation="fastbert")[0]
    expected, found = (jacrev(first_states(model))(embedded()[:1]) for model in (reference, other))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("how", ["made", "accelerated", "switched", "copied", "pickled"])
def test_eager_means_stock_modules_case_59(name, how):
    """No op of fastbert's runs, however the model came to its attention."""
    implementation = "sdpa" if how == "switched" else "eager"
    reference, fast = twins.twins(name, attn_implementation=implementation)
    if how == "accelerated":
        fast = fastbert.accelerate(copy.deepcopy(reference))
    elif how == "switched":
        fast.set_attn_implementation("eager")
        reference.set_attn_implementation("eager")
    elif how == "copied":
        fast = copy.deepcopy(fast)
    elif how == "pickled":
        fast = pickle.loads(pickle.dumps(fast))
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = fast(**twins.batch())[0]
    assert not [event.name for event in profile.events() if event.name.startswith(("fastbert::", "mkldnn::"))]
    with torch.no_grad():
        assert torch.equal(found, reference(**twins.batch())[0])
