"""The examples: each runs by itself, and does what it shows."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The ``main`` of an example, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def of(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main()

    return of


@pytest.mark.slow
def test_sequence_classification(main):
    assert main("sequence_classification") == ["cooking", "computers"]


@pytest.mark.slow
def test_token_classification(main):
    assert main("token_classification") == ["white", "green"]


@pytest.mark.slow
def test_question_answering(main):
    assert main("question_answering") == ["peter", "in the garden"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked_language_modelling", "masked_autoencoding"])
def test_losses_fall(main, name):
    before, after, *_ = main(name)
    # One thirty-thousandth each is 10.3.
    assert 6 < before < 13
    assert after < before - 1


@pytest.mark.slow
def test_sentence_embeddings(main):
    assert main("sentence_embeddings") == "A cat sits on the mat."


def test_one_import_changes():
    for name in NAMES:
        imported = [
            line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if "from fastbert import" in line
        ]
        assert len(imported) == 1
    for name in NAMES:
        assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
def test_as_a_script(tmp_path):
    script = EXAMPLES / "sentence_embeddings.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert "A cat sits on the mat." in done.stdout
