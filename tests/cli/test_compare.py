"""``fastbert compare``: parity first, then time."""

import json
import math

import pytest
import torch
from cli import tiny
from transformers import BertConfig

from fastbert.cli import parity
from fastbert.models import whole_layer
from fastbert.ops.bias_dropout_residual_layer_norm import cpu as fused
from fastbert.ops.layer_norm import torch as layer_norm


@pytest.fixture
def compare(checkpoint, tmp_path):
    """(result, figures of the JSON file) of a comparison on the CPU, by default of the tiny checkpoint."""
    lines = tiny.write(tmp_path / "texts.txt", tiny.texts(40))

    def run(*options, model=checkpoint, texts=lines):
        out = tmp_path / "figures.json"
        chosen = ["--model", model] if model else []
        chosen += ["--texts", texts] if texts else []
        result = tiny.run("compare", "--device", "cpu", "--repeats", 3, "--json", out, *chosen, *options)
        return result, json.loads(out.read_text(), parse_constant=pytest.fail)

    return run


def _spoil(monkeypatch, change):
    """Make fastbert's LayerNorm wrong, forward: alone, after a residual, and in a layer that is one call.

    Which of them runs depends on the dtype and the processor.
    """

    def spoilt(forward):
        def run(*args):
            output, *saved = forward(*args)
            return change(output), *saved

        return run

    whole = whole_layer.forward
    monkeypatch.setattr(layer_norm, "forward", spoilt(layer_norm.forward))
    monkeypatch.setattr(fused, "forward", spoilt(fused.forward))
    monkeypatch.setattr(whole_layer, "forward", lambda *args: change(whole(*args)))


def test_the_real_checkpoint_on_docstrings(compare):
    result, figures = compare("--limit", 12, "--batch-size", 4, "--max-length", 128, model=None, texts=None)
    assert result.exit_code == 0, result.output
    agreement, speed, work = figures["parity"], figures["speed"], figures["work"]
    assert agreement["passed"]
    assert 0 < agreement["difference"] <= agreement["tolerance"] == 1e-5
    assert agreement["cosine_min"] == pytest.approx(1.0, abs=1e-6)
    assert agreement["neighbours_kept"] == 1.0
    assert (work["texts"], work["batches"]) == (12, 3)
    assert work["padding_ratio"] == pytest.approx(1 - work["valid_tokens"] / work["padded_tokens"])
    theirs, ours = speed["hugging_face"]["seconds"], speed["fastbert"]["seconds"]
    for seconds in (theirs, ours, speed["speedup"]):
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
    assert speed["fastbert"]["sentences_per_second"] == pytest.approx(12 / ours["median"])
    assert speed["hugging_face"]["valid_tokens_per_second"] == pytest.approx(work["valid_tokens"] / theirs["median"])
    assert figures["model"]["name"] == "all-MiniLM-L6-v2"
    assert figures["model"]["layers"] == 6
    assert figures["last_layout"] == "packed"
    # Each of the six layers as one call, or where the processor has no kernels for that its parts.
    layers = [row for row in figures["ran"] if row["part"] == "its parts"]
    assert [row["copies"] for row in layers] == [6]
    assert layers[0]["implementation"] in ("one call", "one by one")
    for shown in (
        "speed-up",
        "sentences/s",
        "all-MiniLM-L6-v2",
        "padding",
        "packed",
        torch.__version__,
        "its parts",
    ):
        assert shown in result.stdout


def test_the_users_texts(compare, tmp_path):
    lines = tiny.write(tmp_path / "few.txt", ["the sum", "", "of the row", "kernel"])
    result, figures = compare("--limit", 2, texts=lines)
    assert result.exit_code == 0, result.output
    # [CLS] the sum [SEP]; [CLS] of the row [SEP]
    assert (figures["work"]["valid_tokens"], figures["work"]["padded_tokens"]) == (9, 10)
    assert figures["work"]["source"] == str(lines)


def test_the_arguments_and_versions_are_written(compare):
    result, figures = compare("--batch-size", 7, "--max-length", 9, "--limit", 30)
    assert result.exit_code == 0
    assert figures["arguments"]["batch_size"] == 7
    assert figures["arguments"]["dtype"] == "float32"
    assert figures["work"]["max_length"] == 9
    assert figures["work"]["batches"] == 5
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["device"]["type"] == "cpu"
    assert figures["device"]["cpu_threads"] == torch.get_num_threads()


def test_threads(compare):
    _, figures = compare("--threads", 2)
    assert figures["device"]["cpu_threads"] == torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_types_are_judged_by_float32(compare, dtype):
    result, figures = compare("--dtype", dtype)
    agreement = figures["parity"]
    assert result.exit_code == 0, result.output
    assert agreement["hugging_face_difference"] > 1e-4
    assert agreement["tolerance"] > 2 * agreement["hugging_face_difference"]
    assert agreement["difference"] > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_op_fails_parity_and_gets_no_times(compare, monkeypatch, dtype):
    _spoil(monkeypatch, lambda output: output + 2.0)
    result, figures = compare("--dtype", dtype)
    assert result.exit_code == 1
    assert not figures["parity"]["passed"]
    assert figures["speed"] is None
    assert "FAILED" in result.stdout
    assert "not measured" in result.stdout
    assert "sentences/s" not in result.stdout


def test_an_error_of_a_hundred_thousandth_fails_parity(compare, monkeypatch):
    _spoil(monkeypatch, lambda output: output + 3e-5)
    result, figures = compare()
    assert result.exit_code == 1
    assert 1e-5 < figures["parity"]["difference"] < 1e-3


def test_nan_fails_parity(compare, monkeypatch):
    def change(output):
        output = output.clone()
        output[-1, -1] = math.nan
        return output

    _spoil(monkeypatch, change)
    result, figures = compare()
    assert result.exit_code == 1
    assert figures["parity"]["difference"] is None


def test_a_checkpoint_that_is_not_finite_can_not_be_compared(tmp_path):
    folder = tiny.checkpoint(tmp_path / "infinite", initializer_range=1e38)
    assert "aren't finite" in tiny.refusal("compare", "--model", folder, "--limit", 4, "--device", "cpu")


def test_a_masked_language_model(compare, tmp_path):
    result, _ = compare(model=tiny.checkpoint(tmp_path / "head", "BertForMaskedLM"))
    assert result.exit_code == 0, result.output


def test_what_can_not_be_packed_is_told(compare, tmp_path):
    result, figures = compare(model=tiny.checkpoint(tmp_path / "decoder", is_decoder=True))
    assert result.exit_code == 0, result.output
    assert "decoder" in figures["last_layout"]
    assert figures["last_layout"] in result.stdout


def test_json_into_a_folder_that_is_not_there(tmp_path):
    told = tiny.refusal("compare", "--json", tmp_path / "absent" / "figures.json")
    assert "--json" in told
    assert "doesn't exist" in told


@pytest.mark.parametrize(
    ("name", "told"), [("folder", "is a folder; it must be a file"), ("texts.txt", "is the file of the texts itself")]
)
def test_json_to_what_is_there(tmp_path, name, told):
    """Before anything is done."""
    (tmp_path / "folder").mkdir()
    lines = tiny.write(tmp_path / "texts.txt", ["the sum"])
    line = tiny.refusal("compare", "--texts", lines, "--model", "./absent", "--json", tmp_path / name)
    assert f"--json {tmp_path / name} {told}" in line
    assert lines.read_text() == "the sum\n"


def test_json_that_can_not_be_written(checkpoint, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    result = tiny.run("compare", "--model", checkpoint, "--limit", 4, "--repeats", 1, "--json", tmp_path / "loop")
    assert result.exit_code == 2
    assert "Too many levels of symbolic links" in result.stderr


@pytest.mark.parametrize(
    ("layers", "hidden", "expected"),
    [(6, 384, 1e-5), (12, 768, 1e-5), (24, 768, 2e-5), (12, 3072, 2e-5), (24, 3072, 4e-5)],
)
def test_deeper_and_wider_models_may_differ_more(layers, hidden, expected):
    tolerance, _ = parity.float32_tolerance(BertConfig(num_hidden_layers=layers, hidden_size=hidden))
    assert tolerance == pytest.approx(expected)


def test_neighbours_kept():
    directions = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    assert parity._neighbours_kept(directions.double(), directions.double()) == 1.0
    assert parity._neighbours_kept(directions.double(), directions[[0, 2, 1, 3]].double()) == 0.0
    assert parity._neighbours_kept(directions[:2], directions[:2]) is None
