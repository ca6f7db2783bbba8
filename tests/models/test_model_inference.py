"""Inference by what the forward before has found out: on a GPU, or with ``--triton``."""

import copy
import gc
import pickle
import weakref

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


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """Prepacked weights are for CPUs; here a CPU stands for a GPU."""
    monkeypatch.setattr(layers.prepacked, "missing", lambda dtype: "the test is of Triton's kernels")
    monkeypatch.setattr(layers.prepacked, "unsupported", lambda x, linears: "the test is of Triton's kernels")


@pytest.fixture
def known(monkeypatch):
    """What each forward of a model got from what was known: "kept", "dropped" or nothing."""
    found = []
    forward, run = model_inference.forward, model_inference._run

    def watched_run(*args):
        found.append("dropped")
        return run(*args)

    def watched(*args):
        before = len(found)
        result = forward(*args)
        if result is not None:
            found[before:] = ["kept"]
        elif len(found) == before:
            found.append("nothing")
        return result

    monkeypatch.setattr(model_inference, "_run", watched_run)
    monkeypatch.setattr(model_inference, "forward", watched)
    return found


def make(name="BertModel", **settings):
    return twins.twins(name, **{**SIZES, **settings})[1].eval().to(DEVICE)


def batch(kind="right", seed=0, sizes=(3, 7), token_types=True):
    made = {name: value.to(DEVICE) for name, value in twins.batch(*sizes, kind, seed=seed).items()}
    if not token_types:
        del made["token_type_ids"]
    return made


def outputs(model, inputs=None, **arguments):
    with torch.no_grad():
        return model(**(batch() if inputs is None else inputs), **arguments)


def usual(model, inputs=None, **arguments):
    """The outputs of a model of which nothing is known."""
    kept = [part.__dict__.pop("_inference", None) for part in model.modules()]
    found = outputs(model, inputs, **arguments)
    for part, plan in zip(model.modules(), kept, strict=True):
        if plan is not None:
            part.__dict__["_inference"] = plan
    return found


@pytest.mark.parametrize("name", ["BertModel", *twins.HEADS])
def test_every_head(name, known):
    model = make(name)
    given = twins.batch() if name == "BertModel" else twins.head_batch(name)
    inputs = {key: given[key].to(DEVICE) for key in ("input_ids", "attention_mask", "token_type_ids")}
    first = outputs(model, inputs).to_tuple()
    known.clear()
    second = outputs(model, inputs).to_tuple()
    assert all(map(torch.equal, first, second))
    assert known == (["kept"] if name != "BertForQuestionAnswering" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "full", "right", "holes", "empty rows"])
@pytest.mark.parametrize("token_types", [False, True])
def test_every_kind_of_mask(kind, token_types, dtype, known):
    model = make().to(dtype)
    outputs(model)
    known.clear()
    for seed, sizes in enumerate([(3, 7), (1, 1), (2, 12)]):
        inputs = batch("right" if kind == "empty rows" else kind, seed, sizes, token_types)
        if kind == "empty rows":
            inputs["attention_mask"][-1] = 0
        actual = outputs(model, inputs)
        assert known.pop() == "kept"
        assert model.route == "packed"
        assert all(map(torch.equal, actual.to_tuple(), usual(model, inputs).to_tuple()))
        known.clear()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_and_ids_of_other_dtypes(dtype, known):
    model, inputs = make(), batch("holes")
    wanted = outputs(model, inputs)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    inputs["input_ids"] = inputs["input_ids"].to(torch.int32)
    assert torch.equal(outputs(model, inputs).last_hidden_state, wanted.last_hidden_state)
    inputs["attention_mask"] = inputs["attention_mask"][:1]
    assert torch.equal(outputs(model, inputs).pooler_output, usual(model, inputs).pooler_output)
    assert known == ["kept", "kept"]


def test_padding_that_is_read_is_padded(known):
    model, inputs = make(), batch("left")
    outputs(model)
    actual = outputs(model, inputs)
    assert model.route == "the head or the pooler uses the states of padded positions"
    assert torch.equal(actual.pooler_output, usual(model, inputs).pooler_output)
    outputs(model)
    assert known == ["dropped", "kept"]


def test_without_a_pooler_no_padding_is_read(known):
    model, inputs = make(), batch("left")
    model.pooler = None
    outputs(model)
    actual = outputs(model, inputs)
    assert known == ["kept"]
    assert model.route == "packed"
    assert torch.equal(actual.last_hidden_state, usual(model, inputs).last_hidden_state)


@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_token_types_of_another_number_of_rows(kind, rows, known):
    """One row is for all; others are refused, before anything reads beyond them."""
    model, inputs = make(), batch(kind)
    outputs(model)
    inputs["token_type_ids"] = batch(kind, sizes=(rows, 7))["token_type_ids"]
    if rows == 1:
        assert torch.equal(outputs(model, inputs).last_hidden_state, usual(model, inputs).last_hidden_state)
    else:
        with pytest.raises((RuntimeError, ValueError)):
            outputs(model, inputs)
    assert "dropped" not in known


def test_forms_of_the_output(known):
    model = make()
    outputs(model)
    states, pooled = outputs(model, return_dict=False)
    found = outputs(model, output_hidden_states=False, output_attentions=None, something_else=torch.ones(1))
    assert torch.equal(found.last_hidden_state, states)
    assert torch.equal(found.pooler_output, pooled)
    model.config.return_dict = False
    assert isinstance(outputs(model), tuple)
    assert known == ["kept"] * 3


ARGUMENTS = {
    "output_hidden_states": lambda: {"output_hidden_states": True},
    "output_attentions": lambda: {"output_attentions": True},
    "position_ids": lambda: {"position_ids": torch.arange(7, device=DEVICE)[None]},
    "a 4-D mask": lambda: {"attention_mask": torch.ones(3, 1, 7, 7, dtype=torch.bool, device=DEVICE)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_it_does_not_take(name, known):
    model = make()
    outputs(model)
    known.clear()
    inputs = {**batch("none"), **ARGUMENTS[name]()}
    actual, wanted = outputs(model, inputs), usual(model, inputs)
    assert known == []
    assert torch.equal(actual.last_hidden_state, wanted.last_hidden_state)
    assert (actual.hidden_states is None, actual.attentions is None) == (
        wanted.hidden_states is None,
        wanted.attentions is None,
    )


def test_with_gradients_or_autocast_the_model_runs_as_usual(known):
    model = make()
    outputs(model)
    assert model(**batch()).last_hidden_state.requires_grad
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        model(**batch())
    with torch.inference_mode():
        model(**batch())
    assert known == ["nothing"] * 2 + ["kept"]


def doubled(module, args, output):
    return 2 * output


# What may happen between two forwards outside of the encoder, whose changes test_encoder_inference.py has.
CHANGES = {
    "a hook on the embeddings": lambda m: m.embeddings.register_forward_hook(doubled),
    "a hook on the words": lambda m: m.embeddings.word_embeddings.register_forward_hook(doubled),
    "a hook on the encoder": lambda m: m.encoder.register_forward_hook(lambda *args: None),
    "a hook on a layer": lambda m: m.encoder.layer[0].register_forward_pre_hook(lambda *args: None),
    "a hook on the pooler": lambda m: m.pooler.register_forward_hook(doubled),
    "another table": lambda m: setattr(m.embeddings, "word_embeddings", nn.Embedding(101, 16, device=DEVICE)),
    "another weight": lambda m: setattr(
        m.embeddings.token_type_embeddings, "weight", nn.Parameter(torch.ones(2, 16, device=DEVICE))
    ),
    "data": lambda m: setattr(m.embeddings.position_embeddings.weight, "data", torch.ones(64, 16, device=DEVICE)),
    "more rows": lambda m: setattr(m.embeddings.word_embeddings.weight, "data", torch.ones(110, 16, device=DEVICE)),
    "strides": lambda m: setattr(
        m.encoder.layer[0].attention.output.dense.weight,
        "data",
        m.encoder.layer[0].attention.output.dense.weight.data.t(),
    ),
    "in place": lambda m: m.embeddings.word_embeddings.weight.data.mul_(1.5),
    "eps": lambda m: setattr(m.embeddings.LayerNorm, "eps", 0.3),
    "another norm": lambda m: setattr(m.embeddings, "LayerNorm", nn.LayerNorm(16, eps=0.1, device=DEVICE)),
    "another class": lambda m: setattr(m.embeddings, "__class__", Shifted),
    "a forward": lambda m: setattr(m.embeddings.LayerNorm, "forward", lambda x: 2 * x),
    "dropout": lambda m: m.embeddings.dropout.train().__setattr__("p", 0.5),
    "a pooler": lambda m: setattr(m.pooler, "activation", nn.ReLU()),
    "no pooler": lambda m: setattr(m, "pooler", None),
    "another encoder": lambda m: setattr(m, "encoder", copy.deepcopy(m.encoder).apply(_scale)),
    "eager": lambda m: m.set_attn_implementation("eager"),
    "another dtype": lambda m: m.to(torch.bfloat16),
    "a module of another dtype": lambda m: m.embeddings.LayerNorm.to(torch.bfloat16),
    "a frozen layer's dtype": lambda m: m.encoder.layer[1].to(torch.float64),
}


class Shifted(layers.BertEmbeddings):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) + 1


def _scale(module):
    if isinstance(module, nn.Linear):
        module.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_forwards_is_seen(change, known):
    model = make()
    outputs(model)
    first = outputs(model)
    assert known == ["kept"]
    change(model)
    torch.manual_seed(3)
    try:
        actual = outputs(model)
    except (RuntimeError, TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            usual(model)
        return
    torch.manual_seed(3)
    wanted = usual(model)
    assert all(map(torch.equal, actual.to_tuple(), wanted.to_tuple()))
    assert len(actual.to_tuple()) == (1 if model.pooler is None else 2)
    for _ in range(2):
        torch.manual_seed(3)
        assert all(map(torch.equal, outputs(model).to_tuple(), wanted.to_tuple()))
    assert (
        change in [CHANGES[one] for one in ("a hook on the encoder", "a hook on a layer")]
        or any(
            a.dtype != b.dtype or not torch.equal(a, b)
            for a, b in zip(actual.to_tuple(), first.to_tuple(), strict=False)
        )
        or model.pooler is None
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_was_changed_before(change):
    """What was changed before the first forward is in the plan, or there is none."""
    model = make()
    change(model)
    found = []
    for run in (usual, outputs, outputs, outputs):
        torch.manual_seed(3)
        try:
            found.append(run(model).to_tuple())
        except (RuntimeError, TypeError, ValueError) as error:
            found.append(type(error))
    for other in found[1:]:
        assert other == found[0] if isinstance(other, type) else all(map(torch.equal, other, found[0]))


def test_an_adapter_that_is_switched_between_forwards(known):
    peft = pytest.importorskip("peft")
    model = make()
    bare = outputs(model).last_hidden_state
    settings = peft.LoraConfig(target_modules=["query", "key", "value", "dense"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    for switch, same in (
        (adapted.base_model.disable_adapter_layers, True),
        (adapted.base_model.enable_adapter_layers, False),
    ):
        switch()
        for _ in range(3):
            states = outputs(model).last_hidden_state
            assert torch.equal(states, usual(model).last_hidden_state)
            assert torch.equal(states, bare) == same
        assert (known[-1] == "kept") == same
    adapted.merge_adapter()
    for _ in range(3):
        states = outputs(model).last_hidden_state
    assert known[-1] == "kept"
    assert torch.equal(states, usual(model).last_hidden_state)
    assert not torch.equal(states, bare)
    adapted.unmerge_adapter()
    outputs(model)
    assert known[-1] != "kept"


def test_a_hook_runs_once_a_forward(known):
    calls = []
    model = make()
    outputs(model)
    for part in (model.embeddings, model.encoder.layer[0].output.dense, model.pooler):
        handle = part.register_forward_hook(lambda *args: calls.append(args))
        for expected in (1, 2):
            outputs(model)
            assert len(calls) == expected
        calls.clear()
        handle.remove()
        outputs(model)
        outputs(model)
        assert calls == []
    assert "kept" in known
    assert known[-1] == "kept"


def test_no_kernel_is_launched_on_tensors_of_other_shapes(known, monkeypatch):
    model = make()
    outputs(model)
    outputs(model)
    model.encoder.layer[1].output.LayerNorm.bias.data = torch.zeros(3, device=DEVICE)
    known.clear()
    with pytest.raises((RuntimeError, ValueError)):
        outputs(model)
    assert known == ["nothing"]


@pytest.fixture
def made(monkeypatch):
    """How many plans were tried to be made."""
    found = []
    new = model_inference._new_plan
    monkeypatch.setattr(model_inference, "_new_plan", lambda *args: found.append(new(*args)) or found[-1])
    return found


@pytest.mark.parametrize("part", ["embeddings", "encoder"])
def test_a_model_that_has_no_plan_is_looked_at_once(part, made):
    model = make()
    norm = model.embeddings.LayerNorm if part == "embeddings" else model.encoder.layer[0].output.LayerNorm
    handle = norm.register_forward_hook(lambda *args: None)
    handle.remove()
    norm.train()
    for _ in range(3):
        outputs(model)
    assert made == [None]
    norm.eval()
    model.encoder.layer[0].register_forward_hook(lambda *args: None).remove()
    if part == "encoder":
        outputs(model)
        assert type(made[-1]) is model_inference.Plan
    assert len(made) <= 2


def test_where_it_is_no_gpu_no_plan_is_made(made, monkeypatch):
    monkeypatch.setattr(select.Table, "choose", lambda self, impl, request: "reference")
    outputs(make())
    assert made == []


def test_copies_have_plans_of_their_own(known):
    model = make()
    first = outputs(model)
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        known.clear()
        assert torch.equal(outputs(other).pooler_output, first.pooler_output)
        assert torch.equal(outputs(other).pooler_output, first.pooler_output)
        assert known[-1] == "kept"
    other = copy.deepcopy(model)
    outputs(other)
    other.embeddings.word_embeddings.weight.data.mul_(1.5)
    assert not torch.equal(outputs(other).pooler_output, first.pooler_output)
    assert torch.equal(outputs(model).pooler_output, first.pooler_output)


def test_a_model_is_freed_with_its_last_reference():
    model = make()
    outputs(model)
    assert type(model._inference) is model_inference.Plan
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_it_calls_no_module_but_the_pooler(known, monkeypatch):
    model = make()
    outputs(model)
    called = []
    call = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a, **k: called.append(self) or call(self, *a, **k))
    outputs(model)
    assert known[-1] == "kept"
    assert called[1] is model.pooler
    assert {type(one).__name__ for one in called} == {"BertModel", "BertPooler", "Linear", "Tanh"}


def test_what_is_known_of_the_encoder_alone_is_enough_for_it(monkeypatch):
    """The encoder's own way gives the same bits."""
    model = make()
    first = outputs(model)
    monkeypatch.setattr(model_inference, "forward", lambda *args: None)
    assert torch.equal(outputs(model).last_hidden_state, first.last_hidden_state)
    monkeypatch.setattr(encoder_inference, "unserved", lambda x: "the layers are called")
    assert torch.equal(outputs(model).last_hidden_state, first.last_hidden_state)


def test_a_traced_model_knows_nothing(known):
    model = make()
    first = outputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(outputs(compiled).last_hidden_state, first.last_hidden_state, atol=1e-5)
    assert known == []
    outputs(model)
    assert known == ["kept"]


def test_two_threads_drop_a_plan_at_once(known, monkeypatch):
    """The second finds none to drop."""
    model = make()
    expected = outputs(model).pooler_output
    model.pooler.register_forward_hook(lambda *args: None)
    run = model_inference._run

    def interrupted(*args):
        found = run(*args)
        model.__dict__.pop("_inference", None)
        return found

    monkeypatch.setattr(model_inference, "_run", interrupted)
    assert torch.equal(outputs(model).pooler_output, expected)
    assert model.route == "packed"
