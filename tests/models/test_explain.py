"""``explain``: which implementation each part uses and why, as data and as text."""

import pytest
import torch
import transformers
from models import twins
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.backends import host_linear, onednn, select
from fastbert.models import layers, upstream, whole_layer

# Who multiplies by prepacked weights in float32.
PREPACKED = ("onednn" if host_linear.missing(torch.float32) else "extension") + " prepacked"


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
    for dtype in (torch.float32, torch.float64):  # some implementations lack the second anywhere
        rows = fastbert.explain(twins.twins()[1].to(dtype))
        assert not [row for row in rows if "it runs on cuda" in row.reason]
    (row,) = {row.reason for row in rows_of(twins.twins(hidden_dropout_prob=0.1)[1].half(), "attention")}
    assert "it computes in" in row


def test_explain_tells_of_one_call_alone():
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}
    fast = twins.twins(**sizes)[1]
    if reason := host_linear.missing(torch.float32):
        pytest.skip(reason)
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


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (transformers.RobertaConfig(hidden_size=272, num_attention_heads=2, num_hidden_layers=1, vocab_size=9), 136),
        (
            transformers.MistralConfig(
                hidden_size=32, head_dim=144, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
                intermediate_size=16, vocab_size=9,
            ),
            144,
        ),
    ],
    ids=["of the width", "of its own"],
)  # fmt: skip
def test_explain_asks_with_the_size_of_a_head(config, size, monkeypatch):
    asked, explain = [], select.Table.explain
    monkeypatch.setattr(select.Table, "explain", lambda self, request: asked.append(request) or explain(self, request))
    config._attn_implementation = "fastbert"
    fastbert.explain(transformers.AutoModel.from_config(config).eval())
    assert [request.head_size for request in asked] == [size]


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


def test_layers_that_are_alike_have_one_line(capsys):
    fast = twins.twins(num_hidden_layers=6)[1]
    for index in (2, 4, 5):
        fast.encoder.layer[index].intermediate.intermediate_act_fn = nn.ReLU()
    fastbert.explain(fast)
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[1]: line for line in lines if ".intermediate" in line}
    assert set(told) == {"model.encoder.layer.0,1,3.intermediate", "model.encoder.layer.2,4,5.intermediate"}
    assert "Hugging Face" in told["model.encoder.layer.2,4,5.intermediate"]
    assert [line.split()[1] for line in lines if "attention.self" in line] == [
        "model.encoder.layer.0-5.attention.self"
    ] * 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [{}, {"attn_implementation": "eager"}])
def test_rows_of_a_layer(changes, training):
    """Whether it is one call is told without gradients, and what is kept for a backward with them."""
    fast = twins.twins(**changes)[1].train(training)
    parts = {row.part for row in fastbert.explain(fast)}
    assert ("its parts" in parts) == (not training and not changes)
    assert ("first LayerNorm and GELU, for the backward" in parts) == (training and not changes)


def test_what_is_computed_again_for_the_backward():
    fast = twins.twins()[1].train()
    fast.encoder.layer[1].output.LayerNorm = nn.LayerNorm(64, elementwise_affine=False)
    first, second = rows_of(fast, "first LayerNorm and GELU, for the backward")
    assert (first.implementation, first.reason) == ("computed again", "one function")
    assert second.implementation == "kept"
    assert second.reason == "output: it has no weight or no bias"


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
    fast(**twins.batch())
    assert not rows_of(fast, "last forward")
    for part in ("embeddings", "query, key, value", "attention"):
        assert by_part[part].reason == reason
        assert not by_part[part].implementation.startswith(("ops.", "onednn"))


def test_explain_tells_that_the_activations_have_gone_elsewhere(monkeypatch):
    monkeypatch.setattr(upstream, "GELU", {})
    rows = [row for row in fastbert.explain(twins.twins()[1]) if row.part == "dense, GELU"]
    assert {row.implementation for row in rows} == {"Hugging Face"}
    assert {row.reason for row in rows} == {"transformers.activations has none of the GELUs that fastbert knows"}


def test_explain_names_what_is_not_fused():
    fast = twins.twins(hidden_act="relu")[1]
    fast.encoder.layer[0].attention.self.key = nn.Sequential(fast.encoder.layer[0].attention.self.key)
    by_path = {(row.path, row.part): row for row in fastbert.explain(fast)}
    row = by_path["model.encoder.layer.0.intermediate", "dense, GELU"]
    assert (row.implementation, "not of the GELU family" in row.reason) == ("Hugging Face", True)
    row = by_path["model.encoder.layer.0.attention.self", "query, key, value"]
    assert (row.implementation, "key: it is a" in row.reason) == ("modules, one by one", True)
    assert by_path["model.encoder.layer.1.attention.self", "query, key, value"].implementation == PREPACKED


def test_explain_names_parts_of_other_classes():
    fast = twins.twins()[1]
    fast.encoder.layer[0].intermediate = nn.Sequential(fast.encoder.layer[0].intermediate)
    fast.encoder.layer[1].output.dense = nn.Sequential(fast.encoder.layer[1].output.dense)
    by_path = {row.path: row for row in fastbert.explain(fast)}
    row = by_path["model.encoder.layer.0.intermediate"]
    assert (row.implementation, row.reason) == ("Hugging Face", "it is a Sequential")
    row = by_path["model.encoder.layer.1.output"]
    assert row.implementation.startswith("dense, then ops.bias_dropout_residual_layer_norm: ")
    assert row.reason.startswith("dense: it is a torch.nn.modules.container.Sequential")


def test_explain_passes_over_layers_of_other_classes():
    fast = twins.twins()[1]
    fast.encoder.layer[0] = nn.Sequential(fast.encoder.layer[0])
    paths = [row.path for row in fastbert.explain(fast) if ".encoder." in row.path]
    assert paths
    assert all(path.startswith("model.encoder.layer.1") for path in paths)


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


class Watched:
    """An implementation of an op; ``ran`` gets its name when it computes."""

    def __init__(self, module, name, ran):
        self.module, self.name, self.ran = module, name, ran

    def __getattr__(self, attribute):
        if attribute in ("forward", "output"):
            self.ran.add(self.name)
        return getattr(self.module, attribute)


@pytest.fixture
def ran(monkeypatch):
    """What has computed, by the names that ``explain`` gives it."""
    names = set()
    load = select.Table.load
    monkeypatch.setattr(
        select.Table, "load", lambda self, name: Watched(load(self, name), f"ops.{self.op}: {name}", names)
    )
    called = [(whole_layer, "forward", "one call")]
    for kernels, name in ((host_linear, "extension prepacked"), (onednn, "onednn prepacked")):
        called += [(kernels, product, name) for product in ("linear", "linear_gelu", "linear_add")]

    def watched(function, name):
        return lambda *args, **kwargs: (names.add(name), function(*args, **kwargs))[1]

    for module, function, name in called:
        monkeypatch.setattr(module, function, watched(getattr(module, function), name))
    return names


def trained(model):
    return model.train()


def in_float16(model):
    return model.half()


def irregular(model):
    attention = model.encoder.layer[0].attention
    attention.self.key = nn.Sequential(attention.self.key)
    attention.output.dense.weight.data = attention.output.dense.weight.data.t().contiguous().t()
    return model


def foreign(model):
    """A part that knows padded states only."""
    model.encoder.layer[1].intermediate = nn.Sequential(model.encoder.layer[1].intermediate)
    return model


def eager(model):
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}])
@pytest.mark.parametrize("change", [None, trained, in_float16, irregular, foreign, eager])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_what_is_told_is_what_runs(sizes, change, activation, ran):
    fast = twins.twins(**sizes, hidden_act=activation, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)[1]
    fast = change(fast) if change else fast
    told = {row.implementation.removeprefix("dense, then ") for row in fastbert.explain(fast)}
    with torch.set_grad_enabled(fast.training):
        fast(**twins.batch())
    parts = ("embedding_layer_norm", "attention", "linear_gelu", "bias_dropout_residual_layer_norm")
    kinds = (*(f"ops.{part}:" for part in parts), "one call", "onednn prepacked", "extension prepacked")
    told, found = ({name for name in names if name.startswith(kinds)} for names in (told, ran))
    assert found == told
    assert bool(told) == (change is not eager)
    # Of an irregular model the second layer is.
    regular = bool(sizes) and activation == "gelu" and change in (None, irregular)
    in_one_call = regular and host_linear.missing(torch.float32) is None
    assert ("one call" in found) == in_one_call
