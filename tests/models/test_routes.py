"""Every route through the model once, against stock Hugging Face, forward and backward: quick enough for any version.

``tests/models/test_transformers_versions.py`` runs this file with the oldest and the newest transformers.
"""

import inspect

import pytest
import torch
import transformers
from models import twins
from transformers.models.bert import modeling_bert as hf

import fastbert


def agree(actual, expected, where=...):
    torch.testing.assert_close(actual[where], expected[where], atol=twins.TOLERANCE, rtol=twins.TOLERANCE)


def hook_a_layer(model):
    model.get_submodule("encoder.layer.1.output.dense").register_forward_hook(lambda module, args, output: output * 1.5)


def four_dimensional(inputs):
    """``inputs`` with its mask as the boolean ``[B, 1, S, S]`` that means the same."""
    valid = inputs["attention_mask"].bool()
    return {**inputs, "attention_mask": valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)}


# Name: kind of padding, the configuration's changes, the forward's arguments, what is done to the models and to the
# inputs, and what the route says.
PADDED = {
    "left padding with a pooler": ("left", {}, {}, None, None, "pooler uses the states of padded positions"),
    "output_attentions": ("right", {}, {"output_attentions": True}, None, None, "output_attentions is given"),
    "eager": ("right", {"attn_implementation": "eager"}, {}, None, None, "attn_implementation='eager'"),
    "4-D mask": ("right", {}, {}, None, four_dimensional, "a 4-D attention_mask is given"),
    "hook": ("right", {}, {}, hook_a_layer, None, "has a hook"),
    "decoder": ("right", {"is_decoder": True}, {}, None, None, "the model is a decoder"),
    "causal": ("right", {"is_causal": True}, {}, None, None, "the configuration has is_causal=True"),
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_route(name):
    kind, changes, arguments, change_model, change_inputs, reason = PADDED[name]
    models = twins.twins(**changes)
    inputs = twins.batch(kind=kind)
    where = twins.valid(inputs)
    if change_model:
        for model in models:
            change_model(model)
    if change_inputs:
        inputs = change_inputs(inputs)
    expected, actual = (model(**inputs, **arguments, output_hidden_states=True) for model in models)
    assert reason in models[1].route
    agree(actual.last_hidden_state, expected.last_hidden_state, where)
    agree(actual.pooler_output, expected.pooler_output)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    assert (actual.attentions is None) == (expected.attentions is None) == (name != "output_attentions")
    for attention, stock in zip(actual.attentions or (), expected.attentions or (), strict=True):
        agree(attention.transpose(1, 2), stock.transpose(1, 2), where)
    compare_gradients(models, [output.last_hidden_state[where].square().sum() for output in (expected, actual)])


def compare_gradients(models, losses):
    for loss in losses:
        loss.backward()
    for (path, stock), (_, fused) in zip(*(model.named_parameters() for model in models), strict=True):
        assert (stock.grad is None) == (fused.grad is None), path
        if stock.grad is not None:
            torch.testing.assert_close(fused.grad, stock.grad, atol=1e-3, rtol=1e-3, msg=path)


def test_question_answering_with_padding():
    models = twins.twins("BertForQuestionAnswering")
    inputs = twins.head_batch("BertForQuestionAnswering")
    expected, actual = (model(**inputs) for model in models)
    assert "uses the states of padded positions" in twins.bert(models[1]).route
    where = twins.valid(inputs)
    agree(actual.start_logits, expected.start_logits, where)
    agree(actual.end_logits, expected.end_logits, where)
    agree(actual.loss, expected.loss)
    compare_gradients(models, [expected.loss, actual.loss])


def test_a_decoder_generates_with_its_cache():
    reference, fast = twins.twins("BertLMHeadModel", is_decoder=True, pad_token_id=0)
    inputs = twins.batch(4, 9, "left")
    del inputs["token_type_ids"]
    expected, actual = (model.generate(**inputs, max_new_tokens=6, use_cache=True) for model in (reference, fast))
    assert "the model is a decoder" in twins.bert(fast).route
    assert expected.shape == (4, 15)
    assert torch.equal(actual, expected)


def test_a_decoder_goes_on_from_its_cache():
    reference, fast = twins.twins("BertLMHeadModel", is_decoder=True)
    ids = twins.batch(3, 12, "none")["input_ids"]
    cache = "cache" if "cache" in inspect.signature(hf.BertModel.forward).parameters else "past_key_values"
    with torch.no_grad():
        expected = reference(ids).logits
        first = fast(ids[:, :7], use_cache=True)
        rest = fast(ids[:, 7:], use_cache=True, **{cache: first[cache]})
    assert rest[cache].get_seq_length() == 12
    agree(torch.cat([first.logits, rest.logits], dim=1), expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(name):
    reference, fast = twins.twins("BertLMHeadModel", is_decoder=True, pad_token_id=0)
    ids = twins.batch(3, 12, "none")["input_ids"]
    with torch.no_grad():
        cache = fast.bert(ids[:, :7], use_cache=True)[1 if fast.bert.pooler is None else 2]
        assert cache.get_seq_length() == 7
        states = fast.bert(ids[:, 7:], **{name: cache}).last_hidden_state
        expected = reference.bert(ids).last_hidden_state[:, 7:]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_cross_attention():
    models = twins.twins("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    inputs = twins.batch(4, 9)
    states = torch.randn(4, 13, 64)
    mask = twins.mask("right", 4, 13)
    expected, actual = (m(**inputs, encoder_hidden_states=states, encoder_attention_mask=mask).logits for m in models)
    agree(actual, expected, twins.valid(inputs))


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
def test_packed(kind):
    models = twins.twins()
    inputs = twins.batch(kind=kind)
    where = twins.valid(inputs)
    expected, actual = (model(**inputs, output_hidden_states=True) for model in models)
    twins.assert_packed(models[1])
    agree(actual.pooler_output, expected.pooler_output)
    for states, stock in zip(actual.hidden_states, expected.hidden_states, strict=True):
        agree(states, stock, where)
    with torch.no_grad():
        agree(models[1](**inputs).last_hidden_state, expected.last_hidden_state, where)
    compare_gradients(models, [output.last_hidden_state[where].square().sum() for output in (expected, actual)])


@pytest.mark.parametrize("name", [name for name in twins.HEADS if name != "BertForQuestionAnswering"])
def test_packed_head(name):
    models = twins.twins(name)
    inputs = twins.head_batch(name)
    expected, actual = (model(**inputs).loss for model in models)
    twins.assert_packed(models[1])
    agree(actual, expected)
    compare_gradients(models, [expected, actual])


def test_training_with_dropout_and_checkpointing():
    """The masks are our own, so two runs of ours are compared: with gradient checkpointing, and without."""
    gradients = []
    for checkpointing in (False, True):
        _, model = twins.twins(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        model(**twins.batch()).last_hidden_state.square().sum().backward()
        twins.assert_packed(model)
        gradients.append([parameter.grad for parameter in model.encoder.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_save_and_load(name, tmp_path):
    reference, fast = twins.twins(name)
    inputs = twins.batch()
    fast.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    ours = getattr(fastbert, name).from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs) is getattr(hf, name)
    with torch.no_grad():
        expected, *found = (model(**inputs)[0] for model in (reference, theirs, ours))
    for actual in found:
        where = twins.valid(inputs) if name == "BertModel" else ...
        agree(actual, expected, where)


def test_patch_and_accelerate(tmp_path):
    reference, _ = twins.twins("BertForSequenceClassification")
    inputs = twins.batch()
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = reference(**inputs).logits
        with fastbert.patched():
            patched = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        accelerated = fastbert.accelerate(reference, strict=True)
        for model in (patched, accelerated):
            agree(model(**inputs).logits, expected)
            twins.assert_packed(model)
