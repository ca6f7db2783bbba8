"""The commands on real text, the standard library's docstrings: what is learnt, beside what costs nothing."""

import pytest

from benchmarks import training


@pytest.mark.slow
def test_pretraining_from_scratch(tmp_path):
    found = training.pretrain(tmp_path, 600)
    scores, baselines = found["scores"], found["baselines"]
    assert scores["masked_loss"] < baselines["masked_loss"]["unigram entropy"] - 0.2
    assert scores["masked_accuracy"] > 1.5 * baselines["masked_accuracy"]["most frequent token"]
    # Of some 350 pairs: two standard deviations above chance.
    assert scores["next_sentence_accuracy"] > 0.5 + 0.06


@pytest.mark.slow
def test_package_of_a_docstring(tmp_path):
    found = training.classify(tmp_path, 3)
    # After four epochs MiniLM is level with TF-IDF and logistic regression (docs/training.md); after three, near.
    for score, baselines in found["baselines"].items():
        assert found["scores"][score] > max(baselines.values()) - 0.06
