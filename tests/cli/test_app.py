"""The commands' options, and the ways to call them."""

import subprocess
import sys

import pytest
import torch
from cli import tiny
from rich.table import Table

import fastbert
from fastbert.cli import machine


def test_python_m_fastbert_prints_the_version_and_loads_no_command():
    command = [sys.executable, "-X", "importtime", "-m", "fastbert", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"fastbert {fastbert.__version__}\n"
    # On stderr, a line for each import: its times, then its name.
    loaded = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    signatures = ("arguments", "errors", "options", "training")
    assert {name for name in loaded if name.startswith("fastbert.cli.")} == {f"fastbert.cli.{s}" for s in signatures}
    assert "pyarrow" not in loaded


AS_THE_COMMAND = """
import sys
sys.argv = ["/somewhere/bin/fastbert", *sys.argv[1:]]
import fastbert.cli
"""


def _as_the_command(code, *arguments):
    command = [sys.executable, "-c", AS_THE_COMMAND + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("arguments", "exit_code"), [(["embed", "--help"], 0), (["embed", "--txts", "x"], 2)])
def test_the_command_answers_without_torch(arguments, exit_code):
    code = """
try:
    fastbert.cli.app()
finally:
    assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    found = _as_the_command(code, *arguments)
    assert found.returncode == exit_code, found.stderr
    assert "Usage: fastbert embed" in found.stdout + found.stderr


def test_names_are_imported_when_the_command_uses_them():
    code = """
assert fastbert.__version__ and "torch" not in sys.modules
from fastbert import ops
assert fastbert.ops is ops and not hasattr(fastbert, "_nothing") and not hasattr(fastbert, "nothing")
from fastbert import BertModel, accelerate
assert fastbert.BertModel is BertModel and all(hasattr(fastbert, name) for name in sys.argv[1:])
from transformers import AttentionInterface
assert "fastbert" in AttentionInterface()
"""
    found = _as_the_command(code, *fastbert.__all__)
    assert found.returncode == 0, found.stderr


def test_help_names_every_command():
    result = tiny.run("--help")
    assert result.exit_code == 0
    for command in ("compare", "embed", "pretrain", "finetune", "predict", "doctor", "bench"):
        assert command in result.stdout


FINETUNE = ("finetune", "--task", "ner", "--train", "x", "--output", "x")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compare", "--dtype", "float8"], ["--dtype", "float8", "float32", "bfloat16", "float16"]),
        (["compare", "--device", "tpu"], ["--device", "tpu", "cpu", "cuda"]),
        (["compare", "--batch-size", "0"], ["--batch-size", "0 ", "1 or more"]),
        (["compare", "--repeats", "none"], ["--repeats", "integer"]),
        (["embed", "--out", "x.npy"], ["--texts"]),
        (["embed", "--texts", "x", "--out", "x.npy", "--pooling", "max"], ["--pooling", "max", "mean", "cls"]),
        (["embed", "--texts", "x", "--out", "x.npy", "--max-length", "1"], ["--max-length", "1 ", "2 or more"]),
        (["compare", "--batch-size", "9" * 30], ["--batch-size", "9" * 30, "2147483647 or less"]),
        (["compare", "--threads", "5000000"], ["--threads", "5000000 ", "1024 or less"]),
        ([*FINETUNE, "--seed", "4294967296"], ["--seed", "4294967296 ", "4294967295 or less"]),
        ([*FINETUNE, "--learning-rate", "inf"], ["--learning-rate", "inf ", "a finite number above 0"]),
        ([*FINETUNE, "--weight-decay", "nan"], ["--weight-decay", "nan ", "0 or a finite number"]),
        (["pretrain", "--output", "x", "--eval-fraction", "nan"], ["--eval-fraction", "nan ", "less than 1"]),
        (["pretrain", "--output", "x", "--eval-fraction", "-1"], ["--eval-fraction", "-1.0 ", "less than 1"]),
        (["bench", "--compare", "x", "x", "--tolerance", "nan"], ["--tolerance", "nan ", "0 or a finite number"]),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_it_may_be(arguments, named):
    result = tiny.run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    for word in named:
        assert word in result.stderr


def test_a_path_that_is_not_utf_8_is_printed_in_escapes(checkpoint, tmp_path):
    lines = tiny.write(tmp_path / "texts.txt", ["the sum"])
    out = tmp_path / "\udcff.npy"
    result = tiny.run("embed", "--model", checkpoint, "--texts", lines, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "\\udcff.npy: 1 rows of 32" in result.stdout
    assert out.exists()


def test_brackets_are_printed_as_they_are(capsys):
    """Rich takes them for its markup unless it is told not to."""
    advice = "it isn't installed: `pip install '.[gpu]'`"
    table = Table("why")
    table.add_row(advice)
    machine.console().print(table)
    machine.console().print(advice)
    assert capsys.readouterr().out.count(".[gpu]") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--limit", "4", "--texts", "LONG"],
        ["compare", "--model", "LONG"],
        ["embed", "--texts", "LONG", "--out", "out.npy"],
        ["embed", "--texts", "texts.txt", "--out", "LONG.npy"],
        ["embed", "--texts", "texts.txt", "--out", "texts.txt/out.npy"],
        ["predict", "--model", "LONG", "--texts", "texts.txt", "--json", "out.json"],
        ["predict", "--model", "absent", "--texts", "texts.txt", "--json", "LONG"],
        ["finetune", "--task", "classification", "--train", "LONG", "--output", "out"],
        ["finetune", "--task", "ner", "--train", "tags.conll", "--output", "texts.txt/out"],
        ["pretrain", "--corpus", "LONG", "--output", "out"],
        ["pretrain", "--corpus", "texts.txt", "--config", "LONG", "--output", "out", "--eval-fraction", "0"],
        ["bench", "--compare", "LONG", "LONG"],
        ["finetune", "--task", "ner", "--train", "tags.conll", "--output", "loop"],
    ],
)
def test_a_path_that_can_not_be_is_told_in_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "texts.txt", ["the sum", "of the row"])
    tiny.write(tmp_path / "tags.conll", ["the O", "kernel B-TOOL"])
    (tmp_path / "loop").symlink_to("loop")
    told = tiny.refusal(*(word.replace("LONG", "x" * 300) for word in arguments))
    problems = ("File name too long", "Not a directory", "doesn't exist", "File exists")
    assert any(words in told for words in problems)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["compare"], ["embed", "--out", "out.npy"]])
def test_cuda_without_a_gpu(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    lines = tiny.write(tmp_path / "texts.txt", ["the sum"])
    told = tiny.refusal(*command, "--model", checkpoint, "--texts", lines, "--device", "cuda")
    assert "--device is cuda" in told
    assert "cpu" in told
