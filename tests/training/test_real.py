"""The commands on real text, the standard library's docstrings: what is learnt, beside what costs nothing.

``python -m benchmarks.training`` trains longer, larger and a masked autoencoder too; docs/training.md has its scores.
``cli/test_pretrain.py`` tests on made text what every objective learns.
"""

import json

import pytest

from benchmarks import training

CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "initializer_range": 0.09,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.slow
def test_pretraining_from_scratch(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    sizes = {"config": config, "vocab_size": 2048, "tokens_per_batch": 2048, "learning_rate": 3e-3}
    found = training.pretrain(tmp_path, "mlm+nsp", 600, **sizes)
    scores, baselines = found["scores"], found["baselines"]
    assert scores["masked_loss"] < min(baselines["masked_loss"].values()) - 0.05
    # Of two thousand tokens and more: two standard deviations.
    assert scores["masked_accuracy"] > max(baselines["masked_accuracy"].values()) + 0.02


@pytest.mark.slow
def test_package_of_a_docstring(tmp_path):
    """MiniLM is level with TF-IDF and logistic regression; of 160 texts, 0.15 is five standard deviations."""
    short = {"learning_rate": 5e-4, "batch_size": 16, "max_length": 32}
    found = training.classify(tmp_path, 2, at_least=250, most=800, **short)
    for score, baselines in found["baselines"].items():
        assert found["scores"][score] > max(baselines.values()) - 0.15
