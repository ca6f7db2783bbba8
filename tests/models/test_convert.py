"""Ways into fastbert from code that doesn't import it: accelerate and patch."""

import copy
import gc
import inspect
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import transformers
from models import twins
from torch import nn
from transformers.models import bert as hf_package
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.models import bert, layers, upstream

ALL_MODELS = ("BertModel", "BertLMHeadModel", *twins.HEADS)
# transformers makes its top module anew while it is imported; those who imported it early hold another one.
NAMESPACES = (transformers, sys.modules["transformers"], hf_package, hf)


def some_batch(name):
    if name in ("BertModel", "BertLMHeadModel"):
        return twins.batch()
    return twins.head_batch(name)


def assert_same_outputs(actual, expected, inputs):
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    for key, right in expected.items():
        left = actual[key]
        if right.dim() == 3:
            left, right = left[twins.valid(inputs)], right[twins.valid(inputs)]
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_accelerate(name, training):
    model = twins.twins(name)[0].train(training)
    inputs = some_batch(name)
    with torch.no_grad():
        expected = model(**inputs)
    state = model.state_dict()
    tree = [(path, id(module)) for path, module in model.named_modules()]
    addresses = {path: p.data_ptr() for path, p in model.named_parameters()}

    assert fastbert.accelerate(model) is model
    assert type(model) is getattr(fastbert, name)
    assert model.training == training
    assert [(path, id(module)) for path, module in model.named_modules()] == tree
    assert {path: p.data_ptr() for path, p in model.named_parameters()} == addresses
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        actual = model(**inputs)
    assert (twins.bert(model).route == "packed") == (name != "BertForQuestionAnswering")
    assert_same_outputs(actual, expected, inputs)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_accelerated_and_constructed_models_are_made_of_the_same_classes(name):
    reference, fast = twins.twins(name)
    fastbert.accelerate(reference)
    assert [type(module) for module in reference.modules()] == [type(module) for module in fast.modules()]


def test_accelerate_twice():
    model = fastbert.accelerate(twins.twins("BertForMaskedLM")[0])
    classes = [type(module) for module in model.modules()]
    assert fastbert.accelerate(model, strict=True) is model
    assert bert.fuse(model) == []
    assert [type(module) for module in model.modules()] == classes


def test_accelerate_keeps_hooks_and_checkpointing():
    model = twins.twins("BertForSequenceClassification")[0].train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    model.bert.pooler.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    fastbert.accelerate(model)
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)
    model(**twins.head_batch("BertForSequenceClassification")).loss.backward()
    twins.assert_packed(model)
    assert seen == [(5, 64)]


class Transformer(nn.Module):
    """A BERT somewhere inside, the way sentence-transformers holds one."""

    def __init__(self, auto_model):
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features):
        states = self.auto_model(**features).last_hidden_state
        mask = features["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)


def test_accelerate_a_wrapper():
    wrapper = nn.Sequential(Transformer(twins.twins()[0]), nn.Linear(64, 8)).eval()
    inputs = twins.batch()
    with torch.no_grad():
        expected = wrapper(inputs)
        assert fastbert.accelerate(wrapper, strict=True) is wrapper
        torch.testing.assert_close(wrapper(inputs), expected, atol=1e-5, rtol=0)
    twins.assert_packed(wrapper)
    assert type(wrapper[1]) is nn.Linear


def test_accelerate_several_models_and_leave_others_alone():
    other = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=101, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    )
    nest = nn.ModuleDict(
        {"first": twins.twins()[0], "deep": nn.ModuleList([twins.twins("BertForMaskedLM", seed=1)[0]]), "other": other}
    )
    untouched = [type(module) for module in other.modules()]
    inputs = twins.batch()
    with torch.no_grad():
        expected = nest["first"](**inputs), nest["deep"][0](**inputs)
        fastbert.accelerate(nest, strict=True)
        actual = nest["first"](**inputs), nest["deep"][0](**inputs)
    for left, right in zip(actual, expected, strict=True):
        assert_same_outputs(left, right, inputs)
    assert nest["first"].route == nest["deep"][0].bert.route == "packed"
    assert [type(module) for module in other.modules()] == untouched


def test_accelerate_after_fine_tuning_of_subclasses():
    # A user's own subclass keeps its class and its forward; the BERT inside it is fused.
    class Custom(hf.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = hf.BertModel(config)
            self.head = nn.Linear(config.hidden_size, 3)
            self.post_init()

        def forward(self, **inputs):
            return self.head(self.bert(**inputs).pooler_output)

    model = Custom(twins.config()).eval()
    inputs = twins.batch()
    with torch.no_grad():
        expected = model(**inputs)
        actual = fastbert.accelerate(model, strict=True)(**inputs)
    assert type(model) is Custom
    twins.assert_packed(model)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: nn.Linear(2, 2), "holds no BERT of Hugging Face's to fuse; it is Linear"),
        (
            lambda: transformers.RobertaModel(
                transformers.RobertaConfig(
                    vocab_size=11,
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=8,
                )
            ),
            r"holds no BERT of Hugging Face's to fuse; it is RobertaModel \(roberta\)",
        ),
        (
            lambda: hf.BertLMHeadModel(twins.config(is_decoder=True)),
            "no BERT in model can be packed: bert: the model is a decoder",
        ),
        (
            lambda: hf.BertModel(twins.config(attn_implementation="eager")),
            "no BERT in model can be packed: the model: attn_implementation='eager' was asked for",
        ),
    ],
    ids=["linear", "roberta", "decoder", "eager"],
)
def test_strict_says_why_nothing_is_fused(build, told):
    model = build()
    assert fastbert.accelerate(model) is model
    with pytest.raises(ValueError, match=told):
        fastbert.accelerate(model, strict=True)


def namespaces():
    return [dict(vars(module)) for module in NAMESPACES]


def assert_unchanged(before):
    for now, then in zip(namespaces(), before, strict=True):
        assert now.keys() == then.keys()
        assert all(now[name] is value for name, value in then.items())


@pytest.fixture
def before():
    """The namespaces that patch changes; the test must leave them so."""
    fastbert.unpatch()
    # A lazy module keeps the names that it has been asked for.
    assert_stock()
    found = namespaces()
    yield found
    fastbert.unpatch()
    assert_unchanged(found)


def assert_patched():
    for module in NAMESPACES:
        for name in ALL_MODELS:
            assert getattr(module, name) is getattr(fastbert, name)


def assert_stock():
    for module in NAMESPACES:
        for name in ALL_MODELS:
            assert getattr(module, name).__module__ == hf.__name__
            assert not issubclass(getattr(module, name), bert.Head | fastbert.BertModel)


def test_patch_and_unpatch_case_48(before):
    fastbert.patch()
    assert_patched()
    fastbert.patch()
    assert_patched()
    fastbert.unpatch()
    assert_unchanged(before)
    assert_stock()
    fastbert.unpatch()
    assert_unchanged(before)


def test_patch_finds_what_the_garbage_collector_no_longer_shows(monkeypatch):
    """A server calls ``gc.freeze`` before it forks."""
    early = upstream.LazyModule("transformers", transformers.__file__, {"models.bert": ["BertModel"]})
    monkeypatch.setitem(globals(), "early", early)
    assert early.BertModel is hf.BertModel
    gc.freeze()
    with fastbert.patched():
        assert early.BertModel is fastbert.BertModel
    assert early.BertModel is hf.BertModel


def test_patched_restores_after_an_exception_case_48(before):
    def fail():
        with fastbert.patched():
            assert_patched()
            raise KeyError("in between")

    with pytest.raises(KeyError, match="in between"):
        fail()
    assert_unchanged(before)


def test_patched_blocks_nest_case_48(before):
    with fastbert.patched():
        with fastbert.patched():
            assert_patched()
        assert_patched()
    assert_unchanged(before)
    fastbert.patch()
    with fastbert.patched():
        assert_patched()
    assert_patched()
    fastbert.unpatch()
    assert_unchanged(before)


def test_unpatch_inside_a_block_case_48(before):
    with fastbert.patched():
        fastbert.unpatch()
        assert_stock()
    assert_unchanged(before)


def test_names_that_nobody_has_looked_up_case_48():
    # transformers fills its namespace when a name is first asked for: a fresh process has not asked for BertModel.
    code = """
        import sys
        import transformers
        stock = transformers.BertModel
        import fastbert
        from transformers.models import bert
        from transformers.models.bert import modeling_bert

        modules = (transformers, sys.modules["transformers"], bert, modeling_bert)
        before = [dict(vars(module)) for module in modules]
        assert "BertModel" in before[0]
        assert not any("BertForMaskedLM" in names for names in before[:3])
        try:
            with fastbert.patched():
                assert transformers.BertModel is bert.BertModel is fastbert.BertModel
                assert transformers.BertForMaskedLM is bert.BertForMaskedLM is fastbert.BertForMaskedLM
                from transformers import BertForMaskedLM
                assert BertForMaskedLM is fastbert.BertForMaskedLM
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        for module, then in zip(modules, before):
            now = dict(vars(module))
            assert now.keys() == then.keys(), now.keys() ^ then.keys()
            assert all(now[name] is value for name, value in then.items())
        assert transformers.BertModel is stock
        assert transformers.BertForMaskedLM is modeling_bert.BertForMaskedLM
        assert modeling_bert.BertForMaskedLM.__module__ == "transformers.models.bert.modeling_bert"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_auto_classes_under_patch():
    # Outside the fixture: looking an Auto class up materialises names of its own.
    config = twins.config()
    with fastbert.patched():
        model = transformers.AutoModel.from_config(config)
        head = transformers.AutoModelForMaskedLM.from_config(config)
    assert type(model) is fastbert.BertModel
    assert type(head) is fastbert.BertForMaskedLM
    assert type(head.bert) is fastbert.BertModel
    assert type(transformers.AutoModel.from_config(config)) is hf.BertModel
    assert type(transformers.AutoModelForMaskedLM.from_config(config).bert) is hf.BertModel


def test_stock_models_made_before_a_patch_stay_stock(before):
    reference = twins.twins("BertForMaskedLM")[0]
    inputs = twins.head_batch("BertForMaskedLM")
    expected = reference(**inputs).logits
    with fastbert.patched():
        copied = copy.deepcopy(reference)
        assert type(copied).__module__ == hf.__name__
        assert torch.equal(reference(**inputs).logits, expected)
        assert torch.equal(copied(**inputs).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "fastbert"])
def test_implementations_that_are_packed(implementation):
    fast = twins.twins(attn_implementation=implementation)[1]
    fast(**twins.batch())
    twins.assert_packed(fast)


def test_explicit_eager_attention_is_honoured():
    reference, fast = twins.twins(attn_implementation="eager")
    inputs = twins.batch()
    with torch.no_grad():
        expected, actual = reference(**inputs), fast(**inputs)
    assert fast.route == "attn_implementation='eager' was asked for"
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    fast.set_attn_implementation("sdpa")
    fast(**inputs)
    twins.assert_packed(fast)
    fast.set_attn_implementation("eager")
    fast(**inputs)
    assert fast.route == "attn_implementation='eager' was asked for"


def test_accelerate_warns_where_it_fused_nothing():
    model = nn.Sequential(nn.Linear(2, 2))
    told = r"nothing was fused: model holds no BERT of Hugging Face's to fuse; it is Sequential \(Sequential\)"
    with pytest.warns(UserWarning, match=told) as warned:
        assert fastbert.accelerate(model) is model
    assert [one.filename for one in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbert.accelerate(fastbert.accelerate(twins.twins("BertForMaskedLM")[0]))


DECODER = {"is_decoder": True, "add_cross_attention": True}
EAGER = {"attn_implementation": "eager"}
ASKED = "attn_implementation='eager' was asked for"


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("BertModel", EAGER, f"the model: {ASKED}"),
        ("BertForMaskedLM", EAGER, f"bert: {ASKED}"),
        ("BertLMHeadModel", DECODER | EAGER, f"bert: {ASKED}"),
        ("BertForMaskedLM", {}, None),
        ("BertForMaskedLM", {"is_causal": True}, None),
        ("BertLMHeadModel", DECODER, None),
        ("BertLMHeadModel", DECODER | {"hidden_act": "relu"}, None),
    ],
    ids=str,
)
def test_accelerate_warns_where_no_kernel_would_run(name, changes, told):
    """As ``explain`` has it: a decoder is padded, and parts of it are fused all the same."""
    model = getattr(hf, name)(twins.config(**changes)).eval()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fastbert.accelerate(model)
    rows = fastbert.explain(model)
    fused = [row for row in rows if "ops." in row.implementation or "prepacked" in row.implementation]
    assert bool(fused) == (told is None)
    expected = [] if told is None else [f"nothing was fused: {told}"]
    assert [str(one.message) for one in warned] == expected
    assert all(one.filename == __file__ for one in warned)


@pytest.mark.parametrize("part", [hf.BertEncoder, hf.BertLayer, hf.BertEmbeddings])
def test_accelerate_does_not_warn_for_parts_alone(part):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fastbert.accelerate(part(twins.config()))
    assert type(fused) is layers.FUSED[part]


def test_accelerate_does_not_warn_where_attention_alone_is_fused():
    model = hf.BertModel(twins.config(hidden_act="relu")).eval()
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.bias = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbert.accelerate(model)
    assert all(part.unfused() for part in model.modules() if isinstance(part, layers.CONFIGURED))
    model(**twins.batch())
    twins.assert_packed(model)


def test_public_names():
    assert sorted(fastbert.__all__) == fastbert.__all__
    for name in fastbert.__all__:
        thing = getattr(fastbert, name)
        if name != "__version__":
            assert inspect.getdoc(thing), name
    for name in fastbert.ops.__all__:
        assert inspect.getdoc(getattr(fastbert.ops, name)), name
    assert {part.__name__ for part in layers.FUSED.values()} == {part.__name__ for part in layers.FUSED}
