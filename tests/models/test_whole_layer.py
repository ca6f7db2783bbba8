"""A layer in one call of the extension: the states that its parts give, and the parts where one of them is special."""

import copy

import instructions
import pytest
import torch
from models import twins
from torch import nn

import fastbert
from fastbert.models import whole_layer


@pytest.fixture(params=["AVX2", "AVX512", "AMX"], autouse=True)
def dtype(request, monkeypatch):
    """That of one of the sets of instructions, which is the one that is used."""
    return instructions.use(request.param, monkeypatch)


@pytest.fixture
def model(dtype):
    """Makes models of sizes that the kernels take."""

    def make(**changes):
        sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160, "num_hidden_layers": 3}
        return twins.twins(**{**sizes, **changes})[1].to(dtype)

    return make


def assert_near(found, expected, dtype):
    """As near as two ways of computing the same in ``dtype``; in float32 their sums differ in order, too."""
    rounding = (4 if dtype == torch.bfloat16 else 8) * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=rounding, rtol=0)


def states(fast, inputs=None, **kwargs):
    with torch.no_grad():
        return fast(**(twins.batch() if inputs is None else inputs), **kwargs).last_hidden_state


@pytest.fixture
def calls(monkeypatch):
    """The layers that have been one call, once for each time."""
    found, layers = [], {}
    prepare, forward = whole_layer.prepare, whole_layer.forward

    def prepared(layer, *args):
        call = prepare(layer, *args)
        layers[id(call.run)] = (layer, call)
        return call

    def counted(made, *args):
        found.extend(layers[id(call.run)][0] for call in made)
        return forward(made, *args)

    monkeypatch.setattr(whole_layer, "prepare", prepared)
    monkeypatch.setattr(whole_layer, "forward", counted)
    return found


def in_parts(fast, inputs=None):
    """What the parts compute one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layer, "unserved", lambda x: "in parts")
        return states(fast, inputs)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (3, 130)])
def test_states_are_as_near_to_float64_as_those_of_the_parts(activation, kind, shape, calls, model, dtype):
    fast = model(hidden_act=activation)
    inputs = twins.batch(*shape, kind)
    where = twins.valid(inputs)
    exact = twins.hf.BertModel(fast.config).eval()
    exact.load_state_dict(fast.state_dict())
    truth = states(exact.double(), inputs)[where]
    whole, parts = states(fast, inputs)[where], in_parts(fast, inputs)[where]
    assert len(calls) == 3
    rounding = torch.finfo(dtype).eps * float(truth.abs().max())
    error, measure = (float((found.double() - truth).abs().max()) for found in (whole, parts))
    assert error <= 2 * measure + rounding


def test_norms_of_float32(calls, model, dtype):
    fast = model()
    for name, module in fast.named_modules():
        if name.endswith("LayerNorm"):
            module.float()
    assert_near(states(fast), in_parts(fast), dtype)
    assert len(calls) == 3


def test_a_fully_masked_row(calls, model):
    fast = model()
    inputs = twins.batch()
    inputs["attention_mask"][1] = 0
    found = states(fast, inputs)
    assert found.isfinite().all()
    assert not found[1].any()
    assert len(calls) == 3


def test_layers_share_memory_and_give_outputs_of_their_own(calls, model):
    fast = model()
    with torch.no_grad():
        hidden = fast(**twins.batch(), output_hidden_states=True).hidden_states
    kept = [one.clone() for one in hidden]
    assert len(calls) == 3
    states(fast)
    assert len(calls) == 6
    for one, other in zip(hidden, kept, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(hidden[1], hidden[2])


@pytest.mark.parametrize("way", ["in place", "data", "load_state_dict"])
@pytest.mark.parametrize(
    "part", ["attention.self.key", "attention.output.dense", "intermediate.dense", "output.LayerNorm"]
)
def test_a_changed_weight_is_used(part, way, model, dtype):
    fast = model()
    before = states(fast)
    changed = copy.deepcopy(fast.state_dict())
    name = f"encoder.layer.1.{part}.weight"
    changed[name] *= -2.0
    parameter = fast.get_parameter(name)
    with torch.no_grad():
        if way == "in place":
            parameter.mul_(-2.0)
        elif way == "data":
            parameter.data.copy_(changed[name])
        else:
            fast.load_state_dict(changed)
    assert not torch.equal(states(fast), before)
    assert_near(states(fast), in_parts(fast), dtype)


SPECIAL = [
    "attention", "attention.self", "attention.self.query", "attention.self.value", "attention.output",
    "attention.output.dense", "attention.output.LayerNorm", "attention.output.dropout", "intermediate",
    "intermediate.dense", "intermediate.intermediate_act_fn", "output", "output.dense", "output.LayerNorm",
]  # fmt: skip


@pytest.mark.parametrize("path", SPECIAL)
def test_a_hook_on_a_part_is_called(path, calls, model, dtype):
    fast = model()
    layer = fast.encoder.layer[1]
    called = []
    layer.get_submodule(path).register_forward_hook(lambda *_: called.append(path))
    assert "hook" in layer.divided(torch.zeros(1, 96, dtype=dtype))
    states(fast)
    assert called
    assert layer not in calls


@pytest.mark.parametrize("path", ["attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"])
def test_a_module_of_another_class_is_called(path, calls, model, dtype):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    fast = model()
    layer = fast.encoder.layer[1]
    layer.get_submodule(path).__class__ = Doubled
    assert_near(states(fast), in_parts(fast), dtype)
    assert layer not in calls
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": 72, "num_attention_heads": 3}, "a size is no multiple of 32"),
        ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward is 2"),
        ({"hidden_act": "relu"}, "is not of the GELU family"),
    ],
)
def test_what_one_call_cannot_serve(change, reason, calls, model, dtype):
    fast = model(**change)
    x = torch.zeros(1, fast.config.hidden_size, dtype=dtype)
    with torch.no_grad():
        assert reason in fast.encoder.layer[0].divided(x)
    assert states(fast).isfinite().all()
    assert not calls


@pytest.mark.parametrize("path", ["attention.self", "attention.output.dropout", "output.dropout"])
def test_one_part_in_training_mode_drops(path, calls, model, dtype):
    """In a model that is in eval mode otherwise, as for an estimate by many masks."""
    fast = model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    layer = fast.encoder.layer[1]
    layer.get_submodule(path).train()
    torch.manual_seed(7)
    first, second = states(fast), states(fast)
    assert layer not in calls
    assert len(calls) == 4
    assert not torch.allclose(first, second, atol=0.1)
    torch.manual_seed(7)
    assert_near(first, in_parts(fast), dtype)
    with torch.no_grad():
        told = layer.divided(torch.zeros(1, 96, dtype=dtype))
    assert told == "one call for all of it has no dropout"


def test_training_and_gradients_run_the_parts(calls, model):
    fast = model(hidden_dropout_prob=0.1)
    fast.train()
    fast(**twins.batch()).last_hidden_state.sum().backward()
    states(fast)
    fast.eval()
    fast(**twins.batch()).last_hidden_state.sum().backward()
    assert not calls
    states(fast)
    assert len(calls) == 3


def test_explain_tells_of_it(model):
    rows = {row.part: row for row in fastbert.explain(model())}
    assert rows["its parts"].implementation == "one call"
    rows = {row.part: row for row in fastbert.explain(model().half())}
    assert rows["its parts"].implementation == "one by one"
    assert "the extension multiplies in float32 and bfloat16, not in torch.float16" in rows["its parts"].reason


def test_sequences_longer_than_said_are_an_error(model, dtype):
    fast = model()
    row = twins.batch(1, 40, "none")["input_ids"]
    offsets = torch.tensor([0, 10, 40], dtype=torch.int32)
    with torch.no_grad():
        assert fast(row, cu_seq_lens_q=offsets, max_length_q=30).last_hidden_state.isfinite().all()
        with pytest.raises(ValueError, match="max_seqlen"):
            fast(row, cu_seq_lens_q=offsets, max_length_q=20)


def test_the_number_of_threads_changes_nothing(model):
    fast = model()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(states(fast))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_text_s_states_are_the_same_in_any_batch(model):
    fast = model()
    inputs = twins.batch(20, 70, "right")
    lengths = inputs["attention_mask"].sum(1)
    whole = states(fast, inputs)
    for row, length in enumerate(lengths.tolist()):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        assert torch.equal(states(fast, alone)[0], whole[row, :length])


def head_size(layer):
    layer.attention.self.attention_head_size = 36


def norm(layer):
    layer.output.LayerNorm = nn.LayerNorm(64, dtype=layer.output.dense.weight.dtype)


@pytest.mark.parametrize("change", [head_size, norm])
def test_sizes_that_do_not_agree_with_those_of_the_states(change, model, dtype):
    layer, x = model().encoder.layer[0], torch.zeros(1, 96, dtype=dtype)
    with torch.no_grad():
        assert layer.divided(x) is None
        change(layer)
        assert layer.divided(x) == "the heads or the LayerNorms aren't those of 96 features"
