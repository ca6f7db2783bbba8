"""Training through fastbert's models: dropout, checkpointing, autocast, frozen parts, loss curves."""

import copy

import peft
import pytest
import torch
from models import twins
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.backends import checks, philox
from fastbert.models import layer_training, layers

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def loss_of(model, inputs):
    outputs = model(**inputs)
    return outputs["loss"] if "loss" in outputs else outputs.last_hidden_state[twins.valid(inputs)].square().mean()


def gradients(model, inputs, seed=5):
    """Gradients by path; None where a parameter got none."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {path: None if p.grad is None else p.grad.clone() for path, p in model.named_parameters()}


def assert_bitwise_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    for path, gradient in expected.items():
        assert (gradient is None) == (actual[path] is None), path
        assert gradient is None or torch.equal(actual[path], gradient), path


@pytest.fixture
def layer_runs(monkeypatch):
    """Grows by one whenever the computation of a layer runs, also again for a checkpoint."""
    runs = []
    layer = layer_training.layer
    monkeypatch.setattr(layer_training, "layer", lambda *args: runs.append(1) or layer(*args))
    return runs


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("preserve_rng_state", [True, False])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_checkpointing_with_dropout_case_28(name, preserve_rng_state, use_reentrant, layer_runs):
    fast = twins.twins(name, **DROPOUT)[1].train()
    inputs = twins.head_batch(name)
    expected = gradients(fast, inputs)
    twins.assert_packed(fast)
    assert len(layer_runs) == 2
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state})
    layer_runs.clear()
    assert_bitwise_equal(gradients(fast, inputs), expected)
    twins.assert_packed(fast)
    assert len(layer_runs) == 4
    assert twins.bert(fast).embeddings.unfused() is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_frozen_base(use_reentrant):
    # Adapters and heads on frozen embeddings: the hook on the word embeddings is then what makes gradients flow.
    name = "BertForSequenceClassification"
    fast = twins.twins(name, **DROPOUT)[1].double().train()
    fast.bert.embeddings.requires_grad_(False)
    inputs = twins.head_batch(name)
    expected = gradients(fast, inputs)
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(fast, inputs)
    twins.assert_packed(fast)
    assert twins.bert(fast).embeddings.unfused() == "it has a hook"
    for path, gradient in expected.items():
        assert (gradient is None) == path.startswith("bert.embeddings")
        torch.testing.assert_close(actual[path], gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("hidden_p", [0.0, 1.0])
@pytest.mark.parametrize("attention_p", [0.0, 1.0])
def test_extreme_dropout_equals_hugging_face_case_26(hidden_p, attention_p):
    # All or nothing leaves no chance: even with dropout "on", outputs and gradients are those of Hugging Face.
    changes = {"hidden_dropout_prob": hidden_p, "attention_probs_dropout_prob": attention_p}
    reference, fast = (model.double().train() for model in twins.twins("BertForMaskedLM", **changes))
    inputs = twins.head_batch("BertForMaskedLM")
    torch.testing.assert_close(loss_of(fast, inputs), loss_of(reference, inputs), atol=0, rtol=1e-9)
    twins.assert_packed(fast)
    expected = gradients(reference, inputs)
    for path, gradient in gradients(fast, inputs).items():
        torch.testing.assert_close(gradient, expected[path], atol=1e-12, rtol=1e-9)


def test_training_mode_without_dropout_is_evaluation_case_26():
    fast = twins.twins()[1]
    inputs = twins.batch()
    expected = fast.eval()(**inputs).last_hidden_state
    assert torch.equal(fast.train()(**inputs).last_hidden_state, expected)


def test_evaluation_drops_nothing_case_26():
    reference, fast = twins.twins(**DROPOUT)
    inputs = twins.batch()
    where = twins.valid(inputs)
    actual = fast.train().eval()(**inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual[where], reference(**inputs).last_hidden_state[where], atol=1e-5, rtol=0)


@pytest.mark.parametrize("embeds", [False, True])
def test_kept_fraction_and_scale_case_26(embeds):
    p = 0.1
    fast = twins.twins(num_hidden_layers=1, hidden_dropout_prob=p)[1]
    inputs = twins.batch(24, 100, "right")
    where = twins.valid(inputs)
    if embeds:
        inputs["inputs_embeds"] = fast.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        whole = fast(**inputs, output_hidden_states=True).hidden_states[0][where]
        torch.manual_seed(1)
        dropped = fast.train()(**inputs, output_hidden_states=True).hidden_states[0][where]
        other = fast(**inputs, output_hidden_states=True).hidden_states[0][where]
        torch.manual_seed(1)
        again = fast(**inputs, output_hidden_states=True).hidden_states[0][where]
    kept = dropped != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.01
    torch.testing.assert_close(dropped[kept], whole[kept] * philox.scale(p))
    assert torch.equal(again, dropped)
    # Two masks that have nothing to do with each other agree where both keep or both drop.
    agree = (kept == (other != 0)).float().mean()
    assert abs(agree - (p * p + (1 - p) * (1 - p))) < 0.01


@pytest.mark.parametrize("needs_grad", [True, False])
def test_every_dropout_has_its_own_seed(needs_grad, monkeypatch):
    """By what the check that all of them pass gives back."""
    seen = []
    check = checks.dropout_seed

    def watched(p, seed, device):
        seen.append(check(p, seed, device).item())
        return check(p, seed, device)

    monkeypatch.setattr(checks, "dropout_seed", watched)
    fast = twins.twins(num_hidden_layers=3, **DROPOUT)[1].train()
    inputs = twins.batch()
    with torch.set_grad_enabled(needs_grad):
        fast(**inputs)
        fast(**inputs)
    # For each forward: one for the embeddings, three for each layer.
    assert len(seen) == 2 * (1 + 3 * 3)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("frozen", ["nothing", "weights", "biases", "LayerNorms", "products", "first layer"])
@pytest.mark.parametrize("autocast", [False, True])
def test_computing_again_changes_no_gradient(autocast, frozen, monkeypatch):
    """The one function from attention on, against its parts one by one."""
    fast = twins.twins(**DROPOUT)[1].train()
    patterns = {"weights": "weight", "biases": "bias", "LayerNorms": "LayerNorm", "products": "dense"}
    for path, parameter in fast.named_parameters():
        if frozen == "first layer":
            parameter.requires_grad_("layer.1." in path)
        elif frozen != "nothing" and "layer" in path:
            parameter.requires_grad_(patterns[frozen] not in path)
    inputs = twins.batch()

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients(fast, inputs)

    actual = run()
    twins.assert_packed(fast)
    calls = []
    monkeypatch.setattr(layers.BertLayer, "unfused", lambda self: calls.append(self) or "not in this test")
    del fast.encoder._plan  # nothing has changed that it could know of
    expected = run()
    assert set(calls) == set(fast.encoder.layer)
    for path, gradient in expected.items():
        assert (gradient is None) == (actual[path] is None), path
        if gradient is not None:
            bound = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(actual[path], gradient, atol=bound, rtol=0.0)


def test_second_derivative_is_refused():
    fast = twins.twins()[1].train()
    output = fast(**twins.batch()).last_hidden_state
    weight = fast.encoder.layer[1].output.dense.weight
    (gradient,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    # Also by what comes after the layer alone.
    factor = torch.ones((), requires_grad=True)
    output = fast(**twins.batch()).last_hidden_state * factor
    (gradient,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), factor)


def test_dropout_without_gradients_draws_the_same_masks():
    fast = twins.twins(**DROPOUT)[1].train()
    inputs = twins.batch()
    torch.manual_seed(2)
    expected = fast(**inputs).last_hidden_state.detach()
    torch.manual_seed(2)
    with torch.no_grad():
        actual = fast(**inputs).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def dtypes(outputs):
    return {
        key: value.dtype if isinstance(value, torch.Tensor) else [x.dtype for x in value]
        for key, value in outputs.items()
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["BertModel", *twins.HEADS])
def test_autocast_case_43(name, training):
    reference, fast = twins.twins(name)
    oracle = copy.deepcopy(reference)
    inputs = twins.batch() if name == "BertModel" else twins.head_batch(name)
    inputs["output_hidden_states"] = True
    exact = oracle(**inputs)
    results = []
    for model in (reference, fast):
        model.train(training)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            results.append(model(**inputs))
    assert (twins.bert(fast).route == "packed") == (name != "BertForQuestionAnswering")
    assert dtypes(results[1]) == dtypes(results[0])
    key = next(key for key in exact if exact[key].is_floating_point() and key != "loss")
    where = ... if exact[key].dim() < 3 else twins.valid(inputs)
    exact = exact[key][where]
    allowed, error = ((result[key].float()[where] - exact).abs().max() for result in results)
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_gradients_under_autocast_case_43():
    reference, fast = twins.twins("BertForMaskedLM")
    oracle = copy.deepcopy(reference)
    inputs = twins.head_batch("BertForMaskedLM")
    exact = gradients(oracle, inputs)
    errors = []
    for model in (reference, fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs)
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        errors.append(
            {path: (p.grad - exact[path]).abs().max() for path, p in model.named_parameters() if p.grad is not None}
        )
    twins.assert_packed(fast)
    allowed, error = errors
    assert error.keys() == allowed.keys()
    largest = max(gradient.abs().max() for gradient in exact.values() if gradient is not None)
    for path in error:
        assert error[path] <= 2 * allowed[path] + torch.finfo(torch.bfloat16).eps * largest, path


@pytest.mark.parametrize("training", [False, True])
def test_layer_norm_in_float32_inside_a_bfloat16_model_case_43(training):
    reference, fast = twins.twins()
    inputs = twins.batch()
    where = twins.valid(inputs)
    with torch.no_grad():
        exact = reference(**inputs).last_hidden_state[where]
    results = []
    for model in (reference, fast):
        model.to(torch.bfloat16).train(training)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
        with torch.set_grad_enabled(training):
            results.append(model(**inputs))
    twins.assert_packed(fast)
    assert dtypes(results[1]) == dtypes(results[0])
    allowed, error = ((result.last_hidden_state[where].float() - exact).abs().max() for result in results)
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    if training:
        results[1].last_hidden_state.sum().backward()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in fast.parameters())


FROZEN = {
    "embeddings": lambda path: "embeddings" in path,
    "embeddings and the first layer": lambda path: "embeddings" in path or "layer.0." in path,
    "all but the head": lambda path: path.startswith("bert."),
    "all but biases": lambda path: not path.endswith("bias"),
    "all but query weights": lambda path: not path.endswith("query.weight"),
    "LayerNorms": lambda path: "LayerNorm" in path,
}


@pytest.mark.parametrize("part", FROZEN)
def test_frozen_parameters(part):
    name = "BertForSequenceClassification"
    inputs = twins.head_batch(name)
    found = []
    for model in twins.twins(name):
        model.double().train()
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(not FROZEN[part](path))
        found.append(gradients(model, inputs))
    twins.assert_packed(model)
    expected, actual = found
    for path, gradient in expected.items():
        assert (gradient is None) == (actual[path] is None) == FROZEN[part](path)
        if gradient is not None:
            torch.testing.assert_close(actual[path], gradient, atol=1e-12, rtol=1e-9)


def test_gradients_of_input_embeddings():
    inputs = twins.batch()
    del inputs["input_ids"]
    where = inputs["attention_mask"].bool()
    found = []
    for model in twins.twins():
        embeds = torch.randn(5, 37, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        embeds.requires_grad_()
        states = model.double()(inputs_embeds=embeds, **inputs).last_hidden_state
        states[where].square().sum().backward()
        found.append(embeds.grad)
    twins.assert_packed(model)
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-9)


def curve(model, batches, seed=0):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def masked_lm_batches(steps):
    batches = []
    for step in range(steps):
        inputs = twins.batch(8, 24, seed=step % 4)
        target = inputs["input_ids"].masked_fill(~twins.valid(inputs), -100)
        masked = torch.rand(target.shape, generator=torch.Generator().manual_seed(step)) < 0.3
        inputs["labels"] = target.masked_fill(~masked, -100)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(masked, 100)
        batches.append(inputs)
    return batches


def test_loss_curve_is_that_of_hugging_face():
    batches = masked_lm_batches(30)
    reference, fast = twins.twins("BertForMaskedLM")
    exact = curve(copy.deepcopy(reference).double(), batches)
    expected, actual = curve(reference, batches), curve(fast, batches)
    twins.assert_packed(fast)
    assert exact[-4:].mean() < 0.9 * exact[:4].mean()
    # Rounding grows from step to step, equally fast in both: stay as near to the float64 curve as Hugging Face.
    allowed = 2 * (expected - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    assert (actual - exact).abs().max() <= allowed
    assert allowed < 1e-3


def test_loss_curve_with_dropout_is_within_chance():
    batches = masked_lm_batches(30)
    runs = 8
    late = []
    changes = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    for model in twins.twins("BertForMaskedLM", **changes):
        curves = torch.stack([curve(copy.deepcopy(model), batches, seed) for seed in range(runs)])
        late.append(curves[:, -10:].mean(1))
    expected, actual = late
    assert actual.std() > 0
    # Five standard errors of the difference of two means.
    band = 5 * ((expected.var() + actual.var()) / runs).sqrt()
    assert (actual.mean() - expected.mean()).abs() < band
    # The band is narrow enough to see dropout missing.
    without = curve(twins.twins("BertForMaskedLM")[1], batches)[-10:].mean()
    assert (without - expected.mean()).abs() > 2 * band


def test_repeats_are_bitwise_equal_case_31():
    fast = twins.twins("BertForMaskedLM", **DROPOUT)[1].train()
    inputs = twins.head_batch("BertForMaskedLM")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        expected = gradients(fast, inputs)
        for _ in range(20):
            assert_bitwise_equal(gradients(fast, inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    twins.assert_packed(fast)
    other = gradients(fast, inputs, seed=6)
    assert any(g is not None and not torch.equal(g, other[path]) for path, g in expected.items())


def test_second_derivatives_raise():
    fast = twins.twins("BertForSequenceClassification")[1]
    inputs = twins.head_batch("BertForSequenceClassification")
    weight = fast.bert.encoder.layer[0].attention.self.query.weight
    (expected,) = torch.autograd.grad(loss_of(fast, inputs), weight)
    (gradient,) = torch.autograd.grad(loss_of(fast, inputs), weight, create_graph=True)
    twins.assert_packed(fast)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("kind", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForQuestionAnswering"])
def test_a_forward_without_gradients_equals_one_with_them_case_57(name, kind, dtype, dropout, sizes):
    """Bit for bit, in training mode from the same random state: GradCache embeds a batch twice and needs that."""
    fast = twins.twins(name, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes)[1].train()
    if dtype == torch.bfloat16:
        fast.to(dtype)
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(7)
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            found.append(fast(**twins.batch(kind=kind))[0].detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def _freeze(*parts):
    def freeze(model):
        for part in parts:
            model.bert.get_submodule(part).requires_grad_(False)
        return model

    return freeze


def _with_lora(*targets):
    def adapt(model):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), lora_dropout=0.2))

    return adapt


def _checkpoint(model):
    model.gradient_checkpointing_enable()
    return model


def _chunk(model):
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 5
    return model


def _hook(model):
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: None)
    return model


PREPARED = {
    "frozen embeddings": _freeze("embeddings"),
    "a frozen layer": _freeze("embeddings", "encoder.layer.0"),
    "a frozen encoder": _freeze("embeddings", "encoder"),
    "LoRA on two products": _with_lora("query", "value"),
    "LoRA on all": _with_lora("query", "key", "value", "dense"),
    "checkpointing": _checkpoint,
    "chunks": _chunk,
    "a hook": _hook,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED)
def test_a_prepared_model_without_gradients_equals_one_with_them_case_57(prepare, dtype):
    """Those that GradCache trains: with adapters, frozen parts or recomputation."""
    fast = twins.twins("BertForSequenceClassification", **DROPOUT)[1].train()
    fast = prepare(fast.to(dtype) if dtype == torch.bfloat16 else fast)
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(7)
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            found.append(fast(**twins.batch()).logits.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])
def test_an_unknown_keyword_of_a_head_changes_nothing(name, training):
    """Neither the way nor the masks of dropout: features of sentence-transformers carry more than the model takes."""
    fast = twins.twins(name, **DROPOUT)[1].train(training)
    found, routes = [], []
    for more in ({}, {"token_embeddings": torch.ones(2, 3), "all_layer_idx": 1}):
        torch.manual_seed(7)
        found.append(fast(**twins.batch(), **more).logits)
        routes.append(fast.bert.route)
    assert torch.equal(*found)
    assert routes == ["packed"] * 2


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_an_eps_of_zero_case_61(name):
    """As first made, biases are zero: a row of zeros stays one up to the head's LayerNorm."""
    torch.manual_seed(0)
    reference = getattr(hf, name)(twins.config(layer_norm_eps=0.0))
    fast = getattr(fastbert, name)(twins.config(layer_norm_eps=0.0))
    fast.load_state_dict(reference.state_dict())
    for model in (reference, fast):
        model(**twins.head_batch(name)).loss.backward()
    for (path, p), (_, q) in zip(fast.named_parameters(), reference.named_parameters(), strict=True):
        assert q.grad.isfinite().all()
        torch.testing.assert_close(p.grad, q.grad, msg=path)


@pytest.mark.parametrize("kind", ["none", "right"])
def test_dropout_that_modules_have_switched_off_takes_no_random_numbers(kind):
    """The configuration still says 0.1: it is the modules that count, as in Hugging Face's."""
    for model in twins.twins(**DROPOUT):
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        before = torch.get_rng_state()
        states = model(**twins.batch(kind=kind)).last_hidden_state
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(states, model(**twins.batch(kind=kind)).last_hidden_state)


@pytest.mark.parametrize("part", ["embeddings", "encoder.layer.1.attention.self", "encoder.layer.1.output"])
def test_one_dropout_is_enough(part):
    fast = twins.twins()[1].train()
    fast.get_submodule(part).dropout.p = 0.5
    found = [fast(**twins.batch()).last_hidden_state for _ in range(2)]
    twins.assert_packed(fast)
    assert not torch.equal(*found)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_attention_decides_on_its_dropout(training):
    """Hugging Face asks the attention for its mode, not its dropout."""
    for model in twins.twins(attention_probs_dropout_prob=0.5):
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        model.encoder.layer[0].attention.self.training = training
        model.encoder.layer[1].attention.self.training = False
        found = [model(**twins.batch()).last_hidden_state for _ in range(2)]
        assert torch.equal(*found) == (not training)


@pytest.mark.parametrize("part", ["embeddings", "encoder.layer.1.attention.output", "encoder.layer.1.output"])
def test_a_dropout_that_is_replaced_by_another_module(part):
    """It has no probability, and is called as Hugging Face calls it."""
    found = []
    for model in twins.twins(**DROPOUT):
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.get_submodule(part).dropout = nn.Hardtanh(-1.5, 1.5)
        found.append(model(**twins.batch()).last_hidden_state[twins.valid(twins.batch())])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("training", "weights", "states", "expected"),
    [(True, False, False, 2), (False, True, False, 2), (False, False, True, 2), (False, False, False, 0)],
)
def test_layers_are_one_function(monkeypatch, training, weights, states, expected):
    """In training mode, and wherever there is a gradient: of weights, or of the states alone."""
    calls = []
    function = layer_training.layer
    monkeypatch.setattr(layer_training, "layer", lambda *args: calls.append(1) or function(*args))
    fast = twins.twins()[1].train(training).requires_grad_(weights)
    fast(inputs_embeds=torch.randn(2, 7, 64, requires_grad=states))
    assert len(calls) == expected


def test_gradients_of_weights_alone():
    """Where the embeddings are frozen, the states of the first layer need none."""
    found = []
    inputs = twins.batch()
    for model in twins.twins(hidden_size=96, num_attention_heads=3, intermediate_size=160):
        model.embeddings.requires_grad_(False)
        model(**inputs).last_hidden_state[twins.valid(inputs)].square().sum().backward()
        found.append(model.encoder.layer[0].intermediate.dense.weight.grad)
    torch.testing.assert_close(*found, atol=1e-5 * float(found[0].abs().max()), rtol=1e-4)
