"""What transformers may change: its names of today and of before, keywords of others, and renames still to come."""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import transformers
from models import twins
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.cli import configuration
from fastbert.cli.errors import Refusal
from fastbert.models import layers, upstream
from fastbert.training import resume

# The names of the cache in the installed transformers and in one of the future.
_CACHE = upstream.CACHE if upstream.CACHE in upstream.FORWARD_ARGUMENTS else upstream.OLD_CACHE
_OUTPUT = "self.output(intermediate_output, attention_output"
_RESIDUAL = "input_tensor: torch.Tensor)"

# What a transformers of the future has renamed: texts of its BERT, and elsewhere names, or a module where there is no
# name. And how a forward goes there.
FUTURES = {
    "nothing": ([], [], "packed"),
    "the cache's length": ([(f"{_CACHE}_length", "memory_length")], [], "packed"),
    "query": ([("self.query", "self.q")], [], "encoder.layer.0.attention.self: the BertSelfAttention .* has no query,"),
    "scaling": ([("self.scaling", "self.scale")], [], "encoder.layer.0.attention.self: the .* has no scaling,"),
    "words": ([("word_embeddings", "tokens")], [], "embeddings: the BertEmbeddings of .* has no word_embeddings,"),
    "norm": ([("self.LayerNorm", "self.norm")], [], "embeddings: the BertEmbeddings of .* has no LayerNorm,"),
    "feed-forward": (
        [("self.intermediate", "self.up")],
        [],
        "encoder.layer.0: the BertLayer of .* has no intermediate",
    ),
    "encoder": ([("self.encoder", "self.trunk")], [], "the BertModel of .* has no encoder,"),
    "a class": ([("BertIntermediate", "BertUp")], [], r"encoder.layer.0.intermediate is a .*\.BertUp, which knows"),
    "another class": (
        [("BertEncoder", "BertTrunk")],
        [],
        r"encoder is a .*\.BertTrunk, which knows padded states only",
    ),
    "a third class": ([("BertEmbeddings", "BertTokens")], [], r"embeddings is a .*\.BertTokens, which knows padded"),
    "the head's class": ([("BertLMPredictionHead", "BertWordHead")], [], "packed"),
    "an argument": (
        [("input_tensor", "residual")],
        [],
        "encoder.layer.0.attention.output: the forward of BertSelfOutput .* doesn't begin with hidden_states, input",
    ),
    "one more argument": ([(_OUTPUT, _OUTPUT + ", None"), (_RESIDUAL, _RESIDUAL[:-1] + ", x=None)")], [], "packed"),
    "output capturing": ([], [("utils.output_capturing", "capture_outputs")], "packed"),
    "names elsewhere": (
        [],
        [
            ("activations", "FastGELUActivation"),
            ("integrations.sdpa_attention", "sdpa_attention_forward"),
            ("utils", "TransformersKwargs"),
        ],
        "packed",
    ),
    "the module of activations": ([], [("activations", "")], "packed"),
    "the module of masks": ([], [("masking_utils", "")], "packed"),
    "the module of attention": ([], [("integrations.sdpa_attention", "")], "packed"),
    "the module of output capturing": ([], [("utils.output_capturing", "")], "packed"),
    "the module of first values": ([], [("initialization", "")], "packed"),
}
# Whether a masked autoencoder can be made in some of them, or why not.
AUTOENCODERS = {
    "nothing": "made",
    "a third class": "made",
    "the head's class": r"UnsupportedError: transformers \S+ has no BertLMPredictionHead, which BertForMasked\w+ needs",
    "the module of first values": r"UnsupportedError: transformers \S+ has no initialization.copy_, which \w+ needs",
}

# Puts each of them in place before fastbert's models are imported, compares, and prints how the forwards went.
PROGRAM = """
import importlib, importlib.util, json, sys, traceback

import torch
import transformers
from transformers.models import bert

sys.path.insert(0, sys.argv[1])
NAME = "transformers.models.bert.modeling_bert"
spec = importlib.util.find_spec(NAME)
stock = open(spec.origin, encoding="utf-8").read()


def changed(texts, names):
    text = stock
    for old, new in texts:
        assert old in text, old
        text = text.replace(old, new)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = bert.modeling_bert = module
    exec(compile(text, spec.origin, "exec"), module.__dict__)
    gone = []
    for owner, name in names:
        owner = importlib.import_module(f"transformers.{owner}")
        if name:
            gone.append((owner, name, getattr(owner, name)))
            delattr(owner, name)
        else:
            gone.append((sys.modules, owner.__name__, owner))
            sys.modules[owner.__name__] = None
            parent, _, name = owner.__name__.rpartition(".")
            if name in vars(sys.modules[parent]):
                gone.append((sys.modules[parent], name, owner))
                delattr(sys.modules[parent], name)
    for name in list(sys.modules):
        if name in ("fastbert", "fastbert._public") or name.startswith(("fastbert.models", "models")):
            del sys.modules[name]
    return gone


def compare(twins):
    for name in ("BertModel", "BertForMaskedLM", "BertForQuestionAnswering"):
        reference, fast = twins.twins(name)
        for kind in ("none", "right", "left"):
            inputs = twins.batch(kind=kind)
            where = twins.valid(inputs)
            captured = {"output_hidden_states": kind != "none"}
            expected, found = (model(**inputs, **captured) for model in (reference, fast))
            for one, other in zip(expected.hidden_states or (), found.hidden_states or (), strict=True):
                torch.testing.assert_close(other[where], one[where], atol=1e-5, rtol=0)
            if name == "BertForQuestionAnswering":
                torch.testing.assert_close(found.start_logits, expected.start_logits, atol=1e-5, rtol=0)
            else:
                torch.testing.assert_close(found[0][where], expected[0][where], atol=1e-5, rtol=0)
    reference, fast = twins.twins("BertLMHeadModel", is_decoder=True, pad_token_id=0)
    ids = twins.batch(3, 12, "none")["input_ids"]
    torch.testing.assert_close(fast(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)


def autoencoder(fastbert, twins):
    try:
        model = fastbert.BertForMaskedAutoencoding(twins.config())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    weight = model.decoder.embeddings.position_embeddings.weight
    wanted = fastbert.models.masked_autoencoder._sinusoids(*weight.shape)
    return "made" if torch.equal(weight, wanted) else "its positions are random"


def routes(texts, names):
    gone = changed(texts, names)
    try:
        import fastbert
        from models import twins

        with torch.no_grad():
            compare(twins)
            model = fastbert.accelerate(twins.twins()[0])
            model(**twins.batch(kind="right"))
            found = [model.route]
            for wish in ("output_hidden_states", "output_attentions"):
                model(**twins.batch(kind="right"), **{wish: True})
                found.append(model.route)
            assert fastbert.explain(model)
            return [*found, autoencoder(fastbert, twins)]
    except Exception:
        return traceback.format_exc()
    finally:
        for owner, name, value in gone:
            if owner is sys.modules:
                owner[name] = value
            else:
                setattr(owner, name, value)


print(json.dumps({future: routes(texts, names) for future, (texts, names, _) in json.load(sys.stdin).items()}))
"""


@pytest.fixture(scope="module")
def futures():
    """How a forward went in each of them: plain, with hidden states, with attentions. And a masked autoencoder."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pathlib.Path(__file__).parents[1])],
        input=json.dumps(FUTURES),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FUTURES)
def test_a_rename_costs_speed_and_no_more(name, futures):
    assert isinstance(futures[name], list), futures[name]
    plain, with_states, with_attentions, _ = futures[name]
    assert re.match(FUTURES[name][2], plain)
    if "output capturing" in name:
        assert with_states.endswith("collects hidden states in a way that fastbert doesn't know")
    else:
        assert with_states == plain
    if plain == "packed":
        assert with_attentions == "output_attentions is given, which only the padded way serves"
    else:
        assert with_attentions == plain


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_made_or_says_what_is_missing(name, futures):
    assert re.fullmatch(AUTOENCODERS[name], futures[name][-1])


# What is imported of transformers elsewhere than in upstream.py, though it isn't at its top, and why that may be.
PUBLIC = {
    "transformers.models.bert": "where each of its models keeps its classes",
    "transformers.modeling_outputs": "documented: what a forward returns",
    "transformers.utils.logging": "documented: how little it prints",
}


def _imported(path):
    """The full names of all that a file imports, or imports from."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_inner(name):
    top, *rest = name.split(".")
    if top != "transformers" or not rest:
        return False
    return len(rest) > 1 or importlib.util.find_spec(name) is not None


def test_inner_names_stand_in_one_file():
    package = pathlib.Path(fastbert.__file__).parent
    used, misplaced = set(), []
    for path in set(package.rglob("*.py")) - {pathlib.Path(upstream.__file__)}:
        for name in filter(_is_inner, _imported(path)):
            public = {public for public in PUBLIC if f"{name}.".startswith(f"{public}.")}
            used |= public
            misplaced += [] if public else [f"{path.relative_to(package)}: {name}"]
    assert not misplaced
    assert used == set(PUBLIC)


def test_without_a_list_of_activations_none_is_refused(monkeypatch):
    values = twins.config(hidden_act="a new one").to_dict()
    with pytest.raises(Refusal, match="hidden_act is a new one; it must be one of"):
        configuration.make(values, "a configuration")
    monkeypatch.setattr(upstream, "ACT2FN", None)
    assert configuration.make(values, "a configuration").hidden_act == "a new one"


def test_without_trainer_s_list_an_archive_is_read_by_zip_alone(tmp_path, monkeypatch):
    path = tmp_path / "rng_state.pth"
    torch.save({"python": (3, (1, 2), None)}, path)
    monkeypatch.setitem(sys.modules, "transformers.trainer_pt_utils", None)
    assert resume._is_sound_archive(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert not resume._is_sound_archive(path)


@pytest.mark.parametrize("name", upstream._READ)
def test_the_installed_transformers_is_known(name):
    assert name not in upstream._CHANGED
    model = twins.twins("BertForMaskedLM")[0]
    parts = [part for part in model.modules() if type(part) is getattr(upstream, name)]
    assert parts
    assert all(upstream.unknown(part, name) is None for part in parts)
    assert upstream.uncapturable() is None
    assert upstream.HAS_INTERFACE


@pytest.mark.parametrize("keyword", ["token_embeddings", "sentence_embedding", "a_keyword_of_nobody"])
@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("training", [False, True])
def test_an_unknown_keyword_changes_nothing_case_58(keyword, kind, training):
    fast = twins.twins(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)[1].train(training)
    found = []
    for extra in ({}, {keyword: torch.ones(3)}):
        torch.manual_seed(5)
        found.append(fast(**twins.batch(kind=kind), **extra).last_hidden_state)
        twins.assert_packed(fast)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "given",
    [
        {"num_items_in_batch": torch.tensor(3)},
        {"output_router_logits": True},
        {"seq_idx": torch.zeros(5, 37).int()},
        {"use_cache": True},
        {"return_dict": True},
        {"softcap": None},
        {"output_attentions": False},
    ],
    ids=str,
)
def test_a_keyword_that_changes_nothing_is_packed(given):
    fast = twins.twins()[1]
    with torch.no_grad():
        expected = fast(**twins.batch()).last_hidden_state
        found = fast(**twins.batch(), **given).last_hidden_state
    twins.assert_packed(fast)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["is_causal", "output_attentions", "position_bias", "softcap"])
def test_a_keyword_that_attention_reads_goes_the_padded_way(name):
    fast = twins.twins()[1]
    value = torch.zeros(5, 4, 37, 37) if name == "position_bias" else True
    fast.encoder.forward = lambda *args, **kwargs: hf.BaseModelOutputWithPastAndCrossAttentions(args[0])
    fast(**twins.batch(), **{name: value})
    assert fast.route == f"{name} is given, which only the padded way serves"


def test_arguments_by_place():
    reference, fast = twins.twins(is_decoder=True, add_cross_attention=True)
    inputs = twins.batch()
    context, context_mask = torch.randn(5, 11, 64), torch.ones(5, 11)
    first = (inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], None, None)
    with torch.no_grad():
        expected, found = (model(*first, context, context_mask).last_hidden_state for model in (reference, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="each of them once"):
        fast(*first, context, context_mask, None, None, None, None)
    with pytest.raises(TypeError, match="each of them once"):
        fast(*first, context, encoder_hidden_states=context)
    with pytest.raises(TypeError, match="each of them once"):
        fast(*first, context, context_mask, encoder_hidden_states=context)


def test_the_signature_is_stock_s():
    for name in ("BertModel", *twins.HEADS, "BertLMHeadModel"):
        ours, stock = getattr(fastbert, name).forward, getattr(hf, name).forward
        assert inspect.signature(ours) == inspect.signature(stock)
        assert ours.__annotations__ == stock.__annotations__


def test_generation_mixin_is_a_base():
    assert transformers.GenerationMixin in fastbert.BertLMHeadModel.__bases__


def test_what_a_class_can_capture_is_recorded():
    """By a class of transformers that no model has been made of with the class's own constructor."""

    class Mine(fastbert.BertModel):
        pass

    original = {hf.BertModel: Mine}
    reference = twins.twins()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastbert.models.bert, "MODELS", original)
        fastbert.accelerate(reference)
    assert type(reference) is Mine
    with torch.no_grad():
        found = reference(**twins.batch(), output_hidden_states=True)
    assert reference.route == "packed"
    assert len(found.hidden_states) == 3


def test_no_layers_and_hidden_states_case_61():
    reference, fast = twins.twins(num_hidden_layers=0)
    inputs = twins.batch()
    with torch.no_grad():
        expected, found = (model(**inputs, output_hidden_states=True) for model in (reference, fast))
    twins.assert_packed(fast)
    assert len(found.hidden_states) == len(expected.hidden_states)
    where = twins.valid(inputs)
    torch.testing.assert_close(found.last_hidden_state[where], expected.last_hidden_state[where], atol=1e-5, rtol=0)


def test_fused_parts_have_a_parent():
    assert {part.__name__ for part in layers.FUSED} == set(upstream._READ) - {"BertModel"}
