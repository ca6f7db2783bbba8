"""Scores of entities and answers: published examples, and the libraries that the field compares with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import metrics
from torchmetrics.functional.text import squad
from transformers import EvalPrediction

from fastbert.training.tasks import ner, qa
from fastbert.training.tasks.encoded import Encoded

TAGS = ("O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B")


def test_entities_of_each_scheme():
    iob2 = ["O", "B-PER", "I-PER", "B-PER", "O", "B-LOC", "I-PER"]
    assert list(ner.entities(iob2)) == [("PER", 1, 3), ("PER", 3, 4), ("LOC", 5, 6), ("PER", 6, 7)]
    assert list(ner.entities(["I-PER", "I-PER", "B-PER", "O", "I-LOC"])) == [
        ("PER", 0, 2),
        ("PER", 2, 3),
        ("LOC", 4, 5),
    ]
    assert list(ner.entities(["B-X", "I-X", "E-X", "S-X", "S-X"])) == [("X", 0, 3), ("X", 3, 4), ("X", 4, 5)]
    assert list(ner.entities(["PER", "PER", "O", "LOC"])) == [("PER", 0, 2), ("LOC", 3, 4)]
    assert list(ner.entities([])) == []


def test_published_entities():
    """seqeval's own example (pypi.org/project/seqeval/1.2.0): F1 0.50."""
    expected = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert ner.entity_scores(expected, predicted) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


# It warns of what we say 0 for: a division by no entities.
@pytest.mark.filterwarnings("ignore")
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=300)
def test_entity_scores_are_those_of_conlleval(sentences):
    expected, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    found = ner.entity_scores(expected, predicted)
    assert found["precision"] == pytest.approx(metrics.precision_score(expected, predicted, zero_division=0))
    assert found["recall"] == pytest.approx(metrics.recall_score(expected, predicted, zero_division=0))
    assert found["f1"] == pytest.approx(metrics.f1_score(expected, predicted, zero_division=0))


@pytest.mark.parametrize(
    ("predicted", "expected", "exact", "f1"),
    [
        ("1976", "1976", 1, 1),
        ("The Kernel!", "kernel", 1, 1),
        ("Beyonce", "Beyonc\u00e9 and Bruno Mars", 0, 0),
        ("the big red kernel", "a red kernel", 0, 0.8),
        ("", "kernel", 0, 0),
        ("", "", 1, 1),
        ("the", "", 1, 1),
    ],
)
def test_answers(predicted, expected, exact, f1):
    assert qa.exact_match(predicted, expected) == exact
    assert qa.token_f1(predicted, expected) == pytest.approx(f1)


WORDS = st.lists(
    st.sampled_from(["the", "A", "kernel", "Kernel,", "row", "row-sum", "an", "1976.", "caf\u00e9"]), max_size=6
)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_answer_scores_are_those_of_squad(predicted, expected):
    told, answers = " ".join(predicted), [" ".join(words) for words in expected]
    found = squad(
        [{"prediction_text": told, "id": "q"}],
        [{"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "q"}],
    )
    assert 100 * max(qa.exact_match(told, a) for a in answers) == pytest.approx(float(found["exact_match"]))
    assert 100 * max(qa.token_f1(told, a) for a in answers) == pytest.approx(float(found["f1"]), abs=1e-4)
    assert isinstance(found["f1"], torch.Tensor)


def test_words_of_a_text():
    sentence = ner.split_words("\u4eca\u5929 Hello, w\u00f6rld-2.")
    assert sentence.words == ["\u4eca", "\u5929", "Hello", ",", "w\u00f6rld", "-", "2", "."]
    assert [sentence.text[start:end] for start, end in sentence.spans] == sentence.words
    assert ner.split_words("").words == []


def test_the_best_of_several_answers_counts():
    context = "the red kernel of the row"
    question = qa.Question("q", "what", context, (("kernel", 8), ("red kernel", 4)))
    spans = [None, None, (0, 3), (4, 7), (8, 14), (15, 17), (18, 21), (22, 25), None]
    encoded = Encoded([{"input_ids": [0] * 9, "question": 0, "spans": spans}])
    starts, ends = np.zeros((1, 9)), np.zeros((1, 9))
    starts[0, 3] = ends[0, 4] = 5
    prediction = EvalPrediction((starts, ends), None)
    found = qa.QuestionAnswering().scores([question], encoded, None, prediction)
    assert found == {"exact_match": 1.0, "f1": 1.0}
    # Ends before it begins, or too far behind: neither is an answer.
    assert qa.best_answers([question], encoded, [(starts[0], ends[0])])[0]["answer"] == "red kernel"
    assert qa.best_answers([question], encoded, [(ends[0], starts[0])])[0]["answer"] != ""


def test_a_word_without_pieces_and_a_long_sentence(tmp_path):
    from cli import tiny
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint(tmp_path / "tiny"))
    words = ["kernel", "\u200b", *["row"] * 20, "token"]
    tags = ["B-X", "O", *["O"] * 20, "I-X"]
    task = ner.NamedEntities()
    encoded = task.encode([ner.Sentence(words, tags)], tokenizer, 10, ["O", "B-X", "I-X"])
    assert [len(example["input_ids"]) for example in encoded.examples] == [10, 10, 8]
    assert [word for example in encoded.examples for _, word in example["words"]] == [0, *range(2, 23)]
    chosen = [[label if label >= 0 else 1 for label in example["labels"]] for example in encoded.examples]
    assert ner._tags([ner.Sentence(words, tags)], encoded, ["O", "B-X", "I-X"], chosen) == [tags]
