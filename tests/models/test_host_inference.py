"""Inference through the encoder on a CPU by calls that are made ready once, and seen to be out of date."""

import copy
import gc
import weakref

import instructions
import pytest
import torch
from models import twins
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import fastbert
from fastbert.backends import prepacked
from fastbert.models import host_inference, layers, whole_layer

SIZES = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160, "num_hidden_layers": 3}


@pytest.fixture(params=["AVX2", "AVX512", "AMX"], autouse=True)
def dtype(request, monkeypatch):
    """That of one of the sets of instructions, which is the one that is used."""
    return instructions.use(request.param, monkeypatch)


@pytest.fixture
def model(dtype):
    return twins.twins(**SIZES, hidden_dropout_prob=0.5)[1].to(dtype)


@pytest.fixture
def taken(monkeypatch):
    """Whether each forward of an encoder went this way."""
    found = []
    forward = host_inference.forward

    def watched(*args):
        encoded = forward(*args)
        found.append(encoded is not None)
        return encoded

    monkeypatch.setattr(host_inference, "forward", watched)
    return found


def states(model, seed=0, **changes):
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**twins.batch(4, 9, seed=seed), **changes).last_hidden_state


def one_by_one(model, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_inference, "forward", lambda *args: None)
        return states(model, seed)


def anew(model):
    """What a copy computes, of which nothing is known."""
    return states(copy.deepcopy(model))


def test_it_gives_the_bits_of_the_layers_called_one_by_one(model, taken):
    expected = [one_by_one(model, seed) for seed in range(3)]
    for _ in range(2):
        for seed in range(3):
            assert torch.equal(states(model, seed), expected[seed])
    assert taken == [True] * 6


def test_no_module_is_called_and_the_weights_are_looked_at_once(model, taken, monkeypatch):
    states(model)
    module = host_inference.prepacked.extension.module()
    looks = []

    class Counted:
        def __getattr__(self, name):
            if name == "checksums_unchanged":
                looks.append(name)
            return getattr(module, name)

    monkeypatch.setattr(prepacked.extension, "module", Counted)
    monkeypatch.setattr(layers.BertLayer, "forward", None)
    states(model)
    assert taken == [True, True]
    assert len(looks) == 1


def test_an_input_stays_as_it_is(model, dtype):
    with torch.no_grad():
        x = torch.randn(7, 96, dtype=dtype)
        kept = x.clone()
        packing = host_inference.Packing(torch.tensor([0, 3, 7], dtype=torch.int32), 4, None, None, (1, 7))
        known = layers.encoder_plan.lookup(model.encoder)
        first = host_inference.forward(model.encoder, x, packing, known)
        again = host_inference.forward(model.encoder, x, packing, known)
    assert torch.equal(x, kept)
    assert torch.equal(first, again)
    assert first.data_ptr() not in (again.data_ptr(), x.data_ptr())


def part(path):
    return lambda model: model.get_submodule(f"encoder.layer.1.{path}")


def parameter(path):
    return lambda model: model.get_parameter(f"encoder.layer.1.{path}")


DENSE, KEY, NORM = part("output.dense"), part("attention.self.key"), part("attention.output.LayerNorm")


def change_data(tensor):
    tensor.data = tensor.data * -1.5


def transpose_data(tensor):
    tensor.data = tensor.data.t()


def double_norms(model):
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.double()


def drop_out(model):
    part("output.dropout")(model).train()


def two_layers_share(model):
    model.encoder.layer[0].output.dense.weight = model.encoder.layer[1].output.dense.weight


# What may happen to a model between two forwards; the next must compute with it. And whether it is prepared again.
CHANGES = {
    "a weight in place": (lambda m: parameter("output.dense.weight")(m).data.mul_(-1.5), True),
    "a weight, counted": (lambda m: parameter("attention.self.value.weight")(m).mul_(-1.5), True),
    "a weight's data": (lambda m: change_data(parameter("intermediate.dense.weight")(m)), True),
    "a bias in place": (lambda m: parameter("attention.output.dense.bias")(m).data.add_(1.0), True),
    "a bias's data": (lambda m: change_data(parameter("attention.self.query.bias")(m)), True),
    "a norm in place": (lambda m: parameter("output.LayerNorm.weight")(m).data.mul_(-1.5), True),
    "a norm's data": (lambda m: change_data(parameter("attention.output.LayerNorm.bias")(m)), True),
    "a strided norm": (lambda m: setattr(NORM(m).weight, "data", torch.full((192,), 0.7, dtype=m.dtype)[::2]), False),
    "a transposed weight": (lambda m: transpose_data(parameter("attention.output.dense.weight")(m)), False),
    "a column of a weight": (lambda m: parameter("output.dense.weight")(m).data[:, 5].zero_(), True),
    "another parameter": (lambda m: setattr(DENSE(m), "bias", nn.Parameter(torch.ones_like(DENSE(m).bias))), True),
    "no bias": (lambda m: setattr(DENSE(m), "bias", None), True),
    "another module": (lambda m: setattr(part("output")(m), "dense", nn.Linear(160, 96, dtype=m.dtype)), True),
    "shared": (two_layers_share, True),
    "another layer": (lambda m: m.encoder.layer.__setitem__(0, copy.deepcopy(m.encoder.layer[1])), True),
    "a layer less": (lambda m: m.encoder.layer.__delitem__(1), True),
    "no layer": (lambda m: m.encoder.layer.__delitem__(slice(None)), False),
    "other heads": (lambda m: setattr(part("attention.self")(m), "attention_head_size", 48), True),
    "another scale": (lambda m: setattr(part("attention.self")(m), "scaling", 0.9), True),
    "eps": (lambda m: setattr(NORM(m), "eps", 0.5), True),
    "an activation": (lambda m: setattr(part("intermediate")(m), "intermediate_act_fn", nn.ReLU()), False),
    "chunks": (lambda m: setattr(m.encoder.layer[1], "chunk_size_feed_forward", 2), False),
    "a hook on a product": (lambda m: KEY(m).register_forward_hook(lambda module, args, y: 2.0 * y), None),
    "a forward": (lambda m: setattr(DENSE(m), "forward", lambda x: x[..., :96]), False),
    "a layer's forward": (lambda m: setattr(m.encoder.layer[0], "forward", lambda x, **_: -x), False),
    "a dropout that drops": (drop_out, False),
    "norms of float64": (double_norms, None),
    "eager": (lambda m: m.set_attn_implementation("eager"), None),
}


@pytest.mark.parametrize(("change", "prepared"), CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_forwards_is_seen(change, prepared, model, taken):
    before = states(model)
    states(model)
    assert taken == [True, True]
    with torch.no_grad():
        change(model)
    try:
        expected = anew(model)
    except RuntimeError as error:
        for _ in range(2):
            with pytest.raises(type(error)):
                states(model)
        return
    assert not torch.equal(expected, before)
    del taken[:]
    found = [states(model) for _ in range(3)]
    for one in found:
        assert torch.equal(one, expected)
    if prepared is not None:
        assert taken == [prepared] * 3


def test_with_gradients_autocast_or_hooks_of_torchs_the_layers_are_called(model, taken):
    states(model)
    model(**twins.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states(model)
    called = []
    handle = register_module_forward_hook(lambda module, *args: called.append(type(module)))
    states(model)
    handle.remove()
    assert called.count(layers.BertLayer) == 3
    states(model)
    model.requires_grad_(False)
    assert torch.equal(model(**twins.batch(4, 9, seed=0)).last_hidden_state, states(model))
    model.requires_grad_(True)
    assert model(**twins.batch()).last_hidden_state.requires_grad
    assert taken == [True, False, False, False, True, True, True, False]


def test_a_weight_that_is_a_plain_attribute_is_read_at_every_forward(model, taken):
    """As sharding has it while a layer runs: one may take another's place without a trace."""
    states(model)
    dense = DENSE(model)
    weight = dense.weight.data
    del dense.weight
    for factor in (1.0, -1.5, 2.0):
        dense.weight = weight * factor
        for _ in range(2):
            assert torch.equal(states(model), anew(model))
    # Copies of the model run too.
    assert taken == [True] + [False] * 12


def test_weights_that_one_forgot_are_packed_again(model, taken):
    expected = states(model)
    prepacked.drop(model.encoder.layer[2].intermediate)
    found = [states(model) for _ in range(3)]
    assert all(torch.equal(one, expected) for one in found)
    assert taken == [True] * 4


def test_hidden_states_are_collected(model, taken):
    states(model)
    with torch.no_grad():
        found = model(**twins.batch(4, 9), output_hidden_states=True).hidden_states
    assert len(found) == 4
    assert taken == [True, False]


def test_false_lengths_raise_as_the_layers_do(model, taken):
    ids = twins.batch(1, 40, "none")["input_ids"]
    offsets = torch.tensor([0, 10, 40], dtype=torch.int32)
    with torch.no_grad():
        model(ids, cu_seq_lens_q=offsets, max_length_q=30)
        with pytest.raises(ValueError, match="max_seqlen"):
            model(ids, cu_seq_lens_q=offsets, max_length_q=20)
    assert taken == [True, False]


def test_copies_have_calls_of_their_own(model, taken):
    first = states(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for one in other.parameters():
            one.mul_(1.1)
    second = states(other)
    assert not torch.equal(first, second)
    assert torch.equal(states(model), first)
    assert torch.equal(states(other), second)
    assert all(taken)


def test_a_model_is_freed_with_its_last_reference(dtype):
    model = twins.twins(**SIZES)[1].to(dtype)
    states(model)
    held = weakref.ref(model.encoder.layer[1].output)
    gc.disable()
    try:
        del model
        assert held() is None
    finally:
        gc.enable()


def test_another_default_device_changes_nothing(model):
    expected = states(model)
    inputs = twins.batch(4, 9, seed=0)
    with torch.no_grad(), torch.device("meta"):
        assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_adapters_that_are_switched(model, taken):
    peft = pytest.importorskip("peft")
    bare = states(model)
    settings = peft.LoraConfig(target_modules=["query", "dense"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.base_model.disable_adapter_layers()
    assert torch.equal(states(model), bare)
    adapted.base_model.enable_adapter_layers()
    assert not torch.equal(states(model), bare)
    assert taken == [True, True, False]


def test_layers_that_are_no_single_call_have_no_plan(dtype, taken):
    model = twins.twins(**{**SIZES, "intermediate_size": 144})[1].to(dtype)
    assert "no multiple" in model.encoder.layer[0].divided(torch.zeros(1, 96, dtype=dtype))
    assert torch.equal(states(model), states(model))
    assert taken == [False, False]
    assert fastbert.explain(model)
    assert whole_layer.unserved(torch.zeros(1, 96, dtype=dtype)) is None
