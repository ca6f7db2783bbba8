"""LoRA layers of PEFT that are switched off or merged are fused as what they call; a switch is seen at once."""

import peft
import pytest
import torch
from models import reruns, twins

import fastbert
from fastbert.models import layers

# Of which a layer is one call of the extension.
SIZES = {"intermediate_size": 160}
TARGETS = ["query", "key", "value", "dense"]


def lora_twins(dtype=torch.float32, targets=TARGETS):
    """Hugging Face's model and ours with the same adapters, neither of which is zero; and ours without."""
    found = []
    for model in twins.twins(**SIZES):
        torch.manual_seed(1)
        settings = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=4, init_lora_weights=False)
        found.append(peft.get_peft_model(model.to(dtype), settings).eval())
    return *found, twins.twins(**SIZES)[1].to(dtype)


def last(model, inputs):
    return model(**inputs).last_hidden_state[twins.valid(inputs)]


def off(model):
    model.base_model.disable_adapter_layers()


def on(model):
    model.base_model.enable_adapter_layers()


def merge(model):
    model.merge_adapter()


def unmerge(model):
    model.unmerge_adapter()


def scale(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 3.0)


def hook(model):
    model.get_submodule("base_model.model.encoder.layer.1.output.dense").register_forward_hook(lambda m, x, y: 2.0 * y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("targets", [["query"], ["dense"], TARGETS], ids="-".join)
def test_what_is_off_costs_not_a_bit(targets, dtype):
    _, ours, bare = lora_twins(dtype, targets)
    inputs = twins.batch()
    with torch.no_grad():
        expected, adapted = last(bare, inputs), last(ours, inputs)
        off(ours)
        assert torch.equal(last(ours, inputs), expected)
        on(ours)
        assert torch.equal(last(ours, inputs), adapted)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    off(ours)
    rows, others = ([(row.part, row.implementation) for row in fastbert.explain(model)] for model in (ours, bare))
    assert rows == others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_adapters_run_as_one_call_or_one_product(dtype):
    theirs, ours, _ = lora_twins(dtype)
    inputs = twins.batch()
    for model in (theirs, ours):
        merge(model)
    layer = twins.bert(ours).encoder.layer[0]
    assert layer.unfused() is layer.attention.self.unfused() is None
    with torch.no_grad():
        torch.testing.assert_close(last(ours, inputs), last(theirs, inputs), atol=twins.TOLERANCE, rtol=twins.TOLERANCE)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_switch_between_two_forwards_is_seen(dtype, training):
    theirs, ours, _ = lora_twins(dtype)
    inputs = twins.batch()
    seen = []
    for change in (None, off, on, merge, off, on, scale, merge, unmerge, off, hook):
        results = []
        for model in (theirs, ours):
            if change is not None:
                change(model)
            with torch.set_grad_enabled(training):
                last(model, inputs)
                results.append(last(model, inputs))
        assert (twins.bert(ours).route == "packed") == (change is not hook)
        expected, actual = results
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5, msg=lambda m, c=change: f"after {c}: {m}")
        seen.append(actual.detach())
        if training and expected.requires_grad:
            for model, states in zip((theirs, ours), results, strict=True):
                model.zero_grad()
                states.square().sum().backward()
            for (name, left), right in zip(theirs.named_parameters(), ours.parameters(), strict=True):
                assert (left.grad is None) == (right.grad is None), (change, name)
                if left.grad is not None:
                    error = (left.grad - right.grad).abs().max()
                    assert error <= 1e-4 * left.grad.abs().max() + 1e-6, (change, name, error)
    assert not torch.allclose(seen[-1], seen[-2], atol=1e-2), "the hook was called"


@pytest.mark.parametrize("change", [off, merge, scale, hook], ids=lambda change: change.__name__)
def test_a_switch_has_graphs_captured_again(monkeypatch, change):
    captured = reruns.install(monkeypatch)
    _, ours, _ = lora_twins()
    graphed = fastbert.cuda_graphs(twins.bert(ours), batch_sizes=(4,), lengths=(16,))
    inputs = twins.batch(4, 16)
    with torch.no_grad():
        for _ in range(2):
            graphed(**inputs)
        assert len(captured) == 1
        change(ours)
        for _ in range(2):
            graphed(**inputs)
        assert len(captured) == 2


def test_adapters_that_do_something_stay():
    _, ours, _ = lora_twins()
    dense = twins.bert(ours).encoder.layer[0].output.dense
    assert layers.without_adapter(dense) is dense
    off(ours)
    assert layers.without_adapter(dense) is dense.base_layer
    assert layers.without_adapter(dense.base_layer) is dense.base_layer
    on(ours)
    merge(ours)
    assert layers.without_adapter(dense) is dense.base_layer
    off(ours)  # it takes itself out of the weight when it is called next
    assert layers.without_adapter(dense) is dense
    last(ours, twins.batch())
    assert layers.without_adapter(dense) is dense.base_layer
    dense.forward = dense.base_layer.forward
    assert layers.without_adapter(dense) is dense
