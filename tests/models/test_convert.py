"""Ways into fastbert from code that doesn't import it: accelerate, patch, the attention interface; and explain."""

import copy
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
from fastbert.backends import host_linear
from fastbert.models import bert, interface, layers, upstream

ALL_MODELS = ("BertModel", "BertLMHeadModel", *twins.HEADS)
# transformers makes its top module anew while it is imported; those who imported it early hold another one.
NAMESPACES = (transformers, sys.modules["transformers"], hf_package, hf)
# Who multiplies by prepacked weights in float32.
PREPACKED = ("onednn" if host_linear.missing(torch.float32) else "extension") + " prepacked"


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
@pytest.mark.parametrize("kind", ["none", "right"])
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


def rows_of(model, part):
    return [row for row in fastbert.explain(model) if row.part == part]


def test_explain_is_data_and_text(capsys):
    fast = twins.twins("BertForMaskedLM")[1]
    rows = fastbert.explain(fast)
    printed = capsys.readouterr().out
    for row in rows:
        assert all(isinstance(field, str) for field in (row.path, row.part, row.implementation, row.reason))
        assert row.implementation in printed
        assert row.part in printed
        # Long sentences are wrapped.
        assert row.reason.split()[0] in printed
    title, _, headings, *_ = printed.splitlines()
    assert title.strip() == "fastbert.explain"
    assert headings.replace("┃", " ").split() == ["path", "part", "implementation", "why"]
    by_part = {row.part: row.implementation for row in rows}
    assert by_part["layout"] == "packed"
    assert by_part["embeddings"].startswith("ops.embedding_layer_norm: ")
    assert by_part["attention"].startswith("ops.attention: ")
    assert by_part["query, key, value"] == PREPACKED
    # For each of two layers: projections, attention, attention output, output, intermediate; and whether in one call.
    assert sum(".encoder.layer." in row.path for row in rows) == 2 * 6
    assert "last forward" not in by_part


def test_explain_tells_of_prepacked_weights():
    fast = twins.twins()[1]
    found = {row.part: (row.implementation, row.reason) for row in fastbert.explain(fast)}
    assert found["query, key, value"] == (PREPACKED, "one product")
    for part in ("dense, GELU", "dense, dropout, residual, LayerNorm"):
        # An intermediate size of 148 is none of the extension's.
        assert found[part] == ("onednn prepacked", "post-operation in the product")
    query = fast.encoder.layer[0].attention.self.query
    query.weight.data = query.weight.data.t()
    first, second = ((row.implementation, row.reason) for row in rows_of(fast, "query, key, value"))
    assert first == ("torch linear", "a weight isn't contiguous")
    assert second == (PREPACKED, "one product")
    found = {row.part: row.implementation for row in fastbert.explain(fast.train())}
    assert found["query, key, value"] == "torch linear"
    assert found["dense, GELU"].startswith("ops.linear_gelu: ")
    assert found["dense, dropout, residual, LayerNorm"].startswith("ops.bias_dropout_residual_layer_norm: ")


def test_explain_shows_the_rows_once():
    """A notebook shows what the last line returns; so does a prompt."""
    rows = fastbert.explain(twins.twins()[1])
    assert repr(rows) == f"<explanation of {len(rows)} parts>"
    assert rows._ipython_display_() is None


def test_explain_shows_brackets(capsys, monkeypatch):
    told = "Triton can't be imported: `pip install '.[gpu]'`"
    monkeypatch.setattr(layers, "unserved", lambda x: told)
    fastbert.explain(twins.twins()[1])
    assert told in capsys.readouterr().out


def test_explain_tells_of_this_device_alone():
    rows = fastbert.explain(twins.twins()[1])
    assert not [row for row in rows if "it runs on cuda" in row.reason]
    (row,) = {row.reason for row in rows_of(twins.twins(hidden_dropout_prob=0.1)[1].half(), "attention")}
    assert "it computes in" in row


def test_explain_tells_of_one_call_alone():
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}
    fast = twins.twins(**sizes)[1]
    if fast.encoder.layer[0].divided(torch.zeros(1, 96)):
        pytest.skip("this processor has no kernels for a layer in one call")
    rows = [row for row in fastbert.explain(fast) if ".encoder." in row.path]
    assert [(row.path, row.part, row.implementation) for row in rows] == [
        (f"model.encoder.layer.{index}", "its parts", "one call") for index in range(2)
    ]


@pytest.mark.parametrize("model_class", [hf.BertModel, transformers.RobertaModel, transformers.BertForMaskedLM])
def test_explain_tells_of_attention_by_name(model_class):
    config = twins.config() if "Bert" in model_class.__name__[:4] else transformers.RobertaConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )  # fmt: skip
    config._attn_implementation = "fastbert"
    rows = rows_of(model_class(config).eval(), "attention")
    assert len(rows) == 1
    assert rows[0].implementation.startswith("ops.attention: ")


def test_accelerate_warns_where_it_fused_nothing():
    model = nn.Sequential(nn.Linear(2, 2))
    told = r"nothing was fused: model holds no BERT of Hugging Face's to fuse; it is Sequential \(Sequential\)"
    with pytest.warns(UserWarning, match=told) as warned:
        assert fastbert.accelerate(model) is model
    assert [one.filename for one in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbert.accelerate(fastbert.accelerate(twins.twins("BertForMaskedLM")[0]))


def test_explain_tells_of_training():
    fast = twins.twins(hidden_dropout_prob=0.1)[1].train()
    by_part = {row.part: row for row in fastbert.explain(fast)}
    assert by_part["query, key, value"].implementation == "torch linear"
    assert by_part["query, key, value"].reason == "gradients are needed, and a prepacked weight has none"
    assert by_part["dense, GELU"].implementation.startswith("ops.linear_gelu: ")


def test_explain_tells_of_the_last_forward():
    fast = twins.twins()[1]
    fast(**twins.batch())
    (row,) = rows_of(fast, "last forward")
    assert (row.implementation, row.reason) == ("packed", "")
    fast(**twins.batch(kind="left"))
    (row,) = rows_of(fast, "last forward")
    assert (row.implementation, row.reason) == ("padded", fast.route)
    assert "padded positions" in row.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_implementation": "eager"}, "attn_implementation='eager' was asked for"),
        ({"is_decoder": True}, "the model is a decoder, which attends to the past only"),
    ],
)
def test_explain_tells_why_a_model_is_padded(changes, reason):
    fast = twins.twins(**changes)[1]
    by_part = {row.part: row for row in fastbert.explain(fast)}
    assert (by_part["layout"].implementation, by_part["layout"].reason) == ("padded", reason)
    # The padded way computes these as Hugging Face does.
    for part in ("embeddings", "query, key, value", "attention"):
        assert by_part[part].reason == reason
        assert not by_part[part].implementation.startswith(("ops.", "onednn"))


def test_explain_names_what_is_not_fused():
    fast = twins.twins(hidden_act="relu")[1]
    fast.encoder.layer[0].attention.self.key = nn.Sequential(fast.encoder.layer[0].attention.self.key)
    by_path = {(row.path, row.part): row for row in fastbert.explain(fast)}
    row = by_path["model.encoder.layer.0.intermediate", "dense, GELU"]
    assert (row.implementation, "not of the GELU family" in row.reason) == ("Hugging Face", True)
    row = by_path["model.encoder.layer.0.attention.self", "query, key, value"]
    assert (row.implementation, "key: it is a" in row.reason) == ("modules, one by one", True)
    assert by_path["model.encoder.layer.1.attention.self", "query, key, value"].implementation == PREPACKED


def test_explain_models_that_are_not_fused():
    (row,) = fastbert.explain(nn.Linear(2, 2))
    assert (row.part, row.implementation) == ("Linear", "unchanged")
    (row,) = fastbert.explain(twins.twins("BertForMaskedLM")[0])
    assert (row.path, row.implementation) == ("bert", "Hugging Face")
    assert "fastbert.accelerate" in row.reason
    stock = twins.twins()[0]
    with fastbert.patched():
        (row,) = fastbert.explain(stock)
    assert row.implementation == "Hugging Face"


def test_public_names():
    assert sorted(fastbert.__all__) == fastbert.__all__
    for name in fastbert.__all__:
        thing = getattr(fastbert, name)
        if name != "__version__":
            assert inspect.getdoc(thing), name
    for name in fastbert.ops.__all__:
        assert inspect.getdoc(getattr(fastbert.ops, name)), name
    assert {part.__name__ for part in layers.FUSED.values()} == {part.__name__ for part in layers.FUSED}
