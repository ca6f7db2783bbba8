"""``attn_implementation="fastbert"`` for models of Hugging Face's whose code is left as it is."""

import pytest
import torch
import transformers
from models import twins
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.models import interface, upstream


def run_interface(model, inputs, **changes):
    """States of a model with its attention by fastbert, and the number of calls of the op."""
    calls = []
    attention = fastbert.ops.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastbert.ops, "attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs))
        model.set_attn_implementation("fastbert")
        states = model(**inputs, **changes).last_hidden_state
    return states, len(calls)


@pytest.mark.parametrize("kind", ["none", "full", "right", "left", "holes"])
def test_attention_interface_of_a_stock_bert(kind):
    reference, fast = twins.twins()
    stock = hf.BertModel(twins.config(attn_implementation="fastbert")).eval()
    stock.load_state_dict(reference.state_dict())
    inputs = twins.batch(kind=kind)
    where = twins.valid(inputs)
    with torch.no_grad():
        expected = reference(**inputs).last_hidden_state
        actual, calls = run_interface(stock, inputs)
        own = fast(**inputs).last_hidden_state
    assert calls == 2
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual[where], own[where], atol=1e-5, rtol=0)
    if kind == "right":
        with torch.no_grad():
            ignored = stock(inputs["input_ids"], token_type_ids=inputs["token_type_ids"]).last_hidden_state
        assert not torch.allclose(ignored[where], expected[where], atol=1e-2)


def test_gradients_through_the_attention_interface():
    inputs = twins.batch()
    found = []
    for implementation in ("sdpa", "fastbert"):
        model = twins.twins()[0].double().train()
        model.set_attn_implementation(implementation)
        model(**inputs).last_hidden_state[twins.valid(inputs)].square().sum().backward()
        found.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    for path, gradient in found[0].items():
        torch.testing.assert_close(found[1][path], gradient, atol=1e-8, rtol=1e-8)


TINY = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("build", "calls"),
    [
        (lambda: transformers.RobertaModel(transformers.RobertaConfig(**TINY, pad_token_id=0)), 2),
        (
            lambda: transformers.DistilBertModel(
                transformers.DistilBertConfig(vocab_size=101, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
            ),
            2,
        ),
        # Causal attention, and fewer heads of keys than of queries: torch's own attention serves them.
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**TINY, num_key_value_heads=2)), 0),
        (lambda: hf.BertModel(twins.config(is_decoder=True)), 0),
    ],
    ids=["roberta", "distilbert", "llama", "decoder"],
)
@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_attention_interface_of_other_models(build, calls, kind):
    model = build().eval()
    inputs = twins.batch(kind=kind)
    where = twins.valid(inputs)
    del inputs["token_type_ids"]
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(**inputs).last_hidden_state
        actual, made = run_interface(model, inputs)
    assert made == calls
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize("mask", ["none", "2-D", "4-D"])
@pytest.mark.parametrize(
    "other", ["module", "more keys", "fewer keys", "narrow values", "wide values", "position_bias"]
)
def test_attention_interface_equals_torch_s(other, mask, is_causal):
    """With keys of another length or values of another width, or in a module that says nothing of itself."""
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    if other.endswith("keys"):
        key, value = torch.randn(2, 2, 3, 7 if other == "more keys" else 4, 8)
    if other.endswith("values"):
        value = torch.randn(2, 3, 5, 4 if other == "narrow values" else 12)
    keys = key.shape[2]
    attend = torch.arange(keys) < torch.tensor([[keys], [3]])
    given = {"none": None, "2-D": attend, "4-D": attend[:, None, None, :].expand(2, 1, 5, keys)}[mask]
    wide = None if given is None else attend[:, None, None, :].expand(2, 1, 5, keys)
    more = {"is_causal": is_causal, "scaling": 0.3}
    if other == "position_bias":
        more["position_bias"] = torch.randn(1, 3, 5, 5)
    module = nn.Module()
    expected, _ = upstream.sdpa_attention_forward(module, query, key, value, wide, **more)
    found, _ = interface.attention(module, query, key, value, given, **more)
    where = attend if mask == "2-D" and keys == 5 else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(found[where], expected[where], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_through_the_interface(masked):
    """The op's own, of packed tokens, from the same random state."""
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    lengths = torch.tensor([5, 3]) if masked else torch.tensor([5, 5])
    mask = torch.arange(5) < lengths[:, None]
    torch.manual_seed(3)
    found, _ = interface.attention(nn.Module(), query, key, value, mask if masked else None, 0.4, is_causal=False)
    torch.manual_seed(3)
    qkv = torch.stack([query, key, value], 1).permute(0, 3, 1, 2, 4)[mask]
    offsets = torch.tensor([0, 5, 5 + int(lengths[1])], dtype=torch.int32)
    expected = fastbert.ops.attention(qkv, offsets, 5, dropout_p=0.4)
    assert torch.equal(found[mask], expected)
    without, _ = interface.attention(nn.Module(), query, key, value, mask if masked else None, is_causal=False)
    assert not torch.allclose(without[mask], expected)


def test_nothing_is_registered_where_transformers_has_no_such_interface(monkeypatch):
    def fail(name, function):
        raise AssertionError(name)

    for registry in (upstream.AttentionInterface, upstream.AttentionMaskInterface):
        monkeypatch.setattr(registry, "register", fail)
    monkeypatch.setattr(upstream, "HAS_INTERFACE", False)
    interface.register()
    monkeypatch.setattr(upstream, "HAS_INTERFACE", True)
    with pytest.raises(AssertionError, match="fastbert"):
        interface.register()
