"""What is known of a model's modules is known again after a change; see also test_joined.py and test_graphs.py."""

import copy
import pickle
import weakref

import pytest
import torch
from models import twins
from transformers.models.bert import modeling_bert as hf

from fastbert.models import bert
from fastbert.models.snapshot import Snapshot

LAYER = "encoder.layer.1"


def double(module, args, output):
    return 2.0 * output


def replace_layer(model):
    model.encoder.layer[1] = hf.BertLayer(model.config).eval()
    model.encoder.layer[1].load_state_dict(model.encoder.layer[0].state_dict())


def replace_part(model):
    model.encoder.layer[1].output = hf.BertOutput(model.config).eval()
    model.encoder.layer[1].output.load_state_dict(model.encoder.layer[0].output.state_dict())


def change_class(model):
    model.encoder.layer[1].intermediate.__class__ = hf.BertIntermediate


def hook(model):
    model.encoder.layer[1].output.dropout.register_forward_hook(double)


def hook_embeddings(model):
    model.embeddings.LayerNorm.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))


def hook_gradients(model):
    model.encoder.layer[0].attention.self.query.register_full_backward_hook(lambda module, before, after: None)


def hook_gradients_before(model):
    model.encoder.layer[0].attention.register_full_backward_pre_hook(lambda module, after: None)


CHANGES = {
    replace_layer: f"{LAYER} is a transformers.models.bert.modeling_bert.BertLayer, which knows padded states only",
    replace_part: f"{LAYER}.output is a transformers.models.bert.modeling_bert.BertOutput",
    change_class: f"{LAYER}.intermediate is a transformers.models.bert.modeling_bert.BertIntermediate",
    hook: "a Dropout has a hook (double)",
    hook_embeddings: "a LayerNorm has a hook (hook_embeddings.<locals>.<lambda>)",
    hook_gradients: "a Linear has a hook",
    hook_gradients_before: "a BertAttention has a hook",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_forwards_is_seen(change):
    theirs, ours = twins.twins()
    inputs = twins.batch()
    with torch.no_grad():
        for _ in range(2):
            ours(**inputs)
            assert ours.route == bert.PACKED
        for model in (theirs, ours):
            change(model)
        actual, expected = (model(**inputs).last_hidden_state[twins.valid(inputs)] for model in (ours, theirs))
    assert CHANGES[change] in ours.route
    torch.testing.assert_close(actual, expected, atol=twins.TOLERANCE, rtol=twins.TOLERANCE)


def test_a_hook_that_goes_and_comes_again():
    _, ours = twins.twins()
    for _ in range(2):
        with torch.no_grad():
            ours(**twins.batch())
        assert ours.route == bert.PACKED
        handle = ours.encoder.layer[0].attention.register_forward_hook(lambda module, args, output: None)
        with torch.no_grad():
            ours(**twins.batch())
        assert "a BertAttention has a hook" in ours.route
        handle.remove()


def test_hooks_in_a_table_that_took_the_place_of_another():
    _, ours = twins.twins()
    part = ours.encoder.layer[0].output
    with torch.no_grad():
        ours(**twins.batch())
        part._forward_hooks = type(part._forward_hooks)()
        ours(**twins.batch())
        assert ours.route == bert.PACKED
        part.register_forward_hook(double)
        ours(**twins.batch())
    assert "a BertOutput has a hook" in ours.route


def test_the_configuration_and_the_device_are_read_each_time():
    _, ours = twins.twins()
    assert bert.static_padded_reason(ours) is None
    ours.config.is_decoder = True
    assert "the model is a decoder" in bert.static_padded_reason(ours)
    ours.config.is_decoder = False
    assert bert.static_padded_reason(ours) is None
    ours.config._attn_implementation = "flex_attention"
    assert bert.static_padded_reason(ours) == "attn_implementation='flex_attention' was asked for"
    ours.config._attn_implementation = "sdpa"
    assert "the tensors are on meta" in bert.static_padded_reason(ours.to("meta"))


def test_a_copy_has_no_snapshot_of_the_original():
    _, ours = twins.twins()
    with torch.no_grad():
        ours(**twins.batch())
    kept = ours._looked_through
    for one in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert one._looked_through is None
        with torch.no_grad():
            one(**twins.batch())
        assert one._looked_through.holds(one)
        assert not kept.holds(one)
    assert ours._looked_through is kept


def test_nothing_is_found_again_while_nothing_changes(monkeypatch):
    _, ours = twins.twins()
    found = []
    look = bert._look_through
    monkeypatch.setattr(bert, "_look_through", lambda model: found.append(model) or look(model))
    with torch.no_grad():
        for seed in range(3):
            ours(**twins.batch(seed=seed), output_hidden_states=seed == 1)
            ours.load_state_dict(ours.state_dict())
            ours.to(torch.float64).to(torch.float32)
    # Hidden states are collected by hooks, which stay.
    assert len(found) == 2


def test_a_snapshot_does_not_keep_its_root():
    _, ours = twins.twins()
    snapshot = Snapshot(ours, ours.modules(), tensors=True)
    assert snapshot.holds(ours)
    assert ours not in snapshot._below


def test_a_tensor_that_takes_the_id_of_another_is_seen():
    """Tensors are told apart by their ids, so a snapshot keeps those that it has seen: no id is given again."""
    _, ours = twins.twins()
    snapshot = Snapshot(ours, ours.modules(), tensors=True)
    replaced = weakref.ref(ours.pooler.dense.weight)
    snapshot.tensors.clear()
    ours.pooler.dense.weight = torch.nn.Parameter(torch.zeros(64, 64))
    assert replaced() is not None
    assert not snapshot.holds(ours)
