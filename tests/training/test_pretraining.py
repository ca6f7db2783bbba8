"""The examples of each objective: what is in them, and that they depend on nothing but the seed and the key."""

import numpy as np
import pytest

from fastbert.training import pretraining, vocabulary
from fastbert.training.errors import DataError
from fastbert.training.kinds import Objective
from fastbert.training.masking import Masking
from fastbert.training.pretraining import IS_NEXT, IS_RANDOM, Examples

# Every sentence says which document it is from, and its place there.
DOCUMENTS = [[f"d{d} s{s} " + "filler " * (s % 7) for s in range(20)] for d in range(12)]
SEED = 3


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.learn([sentence for document in DOCUMENTS for sentence in document], 200, 64)


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return pretraining.encode(DOCUMENTS, tokenizer)


def examples(encoded, tokenizer, objective, max_length=48, **changes):
    return Examples(encoded, objective, Masking(tokenizer, **changes), max_length, SEED)


def original(example):
    """The ids before they were masked."""
    return np.where(example["labels"] == -100, example["input_ids"], example["labels"])


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("objective", Objective)
def test_a_key_gives_the_same_example(encoded, tokenizer, objective):
    data, again = (examples(encoded, tokenizer, objective) for _ in range(2))
    expected = [data[key] for key in range(len(data))]
    for key in reversed(range(len(data))):
        assert same(again[key], expected[key])
    other_epoch = [data[key + len(data)] for key in range(len(data))]
    assert sum(same(*pair) for pair in zip(expected, other_epoch, strict=True)) == 0


@pytest.mark.parametrize("objective", Objective)
def test_lengths(encoded, tokenizer, objective):
    data = examples(encoded, tokenizer, objective)
    for key in range(3 * len(data)):
        example = data[key]
        size = len(example["input_ids"])
        assert size <= 48
        assert all(np.ndim(x) == 0 or len(x) == size for x in example.values())
        assert example["input_ids"][0] == tokenizer.cls_token_id
        assert example["input_ids"][-1] == tokenizer.sep_token_id
        if objective != Objective.mlm_nsp:
            assert size == data.lengths[key % len(data)]


@pytest.mark.parametrize("objective", [Objective.mlm, Objective.mae])
def test_every_token_is_in_a_chunk_once(encoded, tokenizer, objective):
    data = examples(encoded, tokenizer, objective, max_length=400)
    for number, document in enumerate(encoded):
        runs = [run for at, run in data.chunks if at == number]
        np.testing.assert_array_equal(np.concatenate([s for run in runs for s in run]), np.concatenate(document))


def test_masked_tokens_are_predicted_and_an_autoencoder_sees_no_mask(encoded, tokenizer):
    for objective in (Objective.mlm, Objective.mae):
        data = examples(encoded, tokenizer, objective)
        found = [data[key] for key in range(len(data))]
        masked = sum(int((e["input_ids"] == tokenizer.mask_token_id).sum()) for e in found)
        predicted = sum(int((e["labels"] != -100).sum()) for e in found)
        assert predicted == sum(max(1, round(0.15 * (len(e["input_ids"]) - 2))) for e in found)
        assert (masked > predicted / 2) if objective == Objective.mlm else masked == 0


def test_pairs(encoded, tokenizer):
    data = examples(encoded, tokenizer, Objective.mlm_nsp)
    counts = {IS_NEXT: 0, IS_RANDOM: 0}
    for key in range(10 * len(data)):
        example = data[key]
        tokens = tokenizer.convert_ids_to_tokens(original(example).tolist())
        first_end = tokens.index("[SEP]")
        types = example["token_type_ids"]
        assert types.tolist() == [0] * (first_end + 1) + [1] * (len(tokens) - first_end - 1)
        halves = [
            tokenizer.convert_tokens_to_string(part).split()
            for part in (tokens[1:first_end], tokens[first_end + 1 : -1])
        ]
        assert all(halves)
        documents = [{word for word in half if word[0] == "d" and word[1:].isdigit()} for half in halves]
        assert all(len(found) <= 1 for found in documents)
        label = int(example["next_sentence_label"])
        counts[label] += 1
        if all(documents):
            assert (documents[0] == documents[1]) == (label == IS_NEXT)
    # Four standard deviations of a fair coin.
    assert abs(counts[IS_NEXT] / (10 * len(data)) - 0.5) < 2 / np.sqrt(10 * len(data))


def test_next_goes_on_where_the_first_ends(encoded, tokenizer):
    data = examples(encoded, tokenizer, Objective.mlm_nsp, max_length=120)
    texts = [np.concatenate(document).tolist() for document in encoded]
    checked = 0
    for key in range(5 * len(data)):
        example = data[key]
        ids = original(example)[1:-1]
        if example["next_sentence_label"] == IS_NEXT and len(ids) < 118:
            joined = [i for i in ids.tolist() if i != tokenizer.sep_token_id]
            assert any(_holds(text, joined) for text in texts)
            checked += 1
    assert checked > 20


def _holds(text, part):
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


def test_too_small(tokenizer):
    for documents in (DOCUMENTS[:1], [["one."], ["two."]]):
        with pytest.raises(DataError, match="needs them, to draw a random next sentence from another document"):
            examples(pretraining.encode(documents, tokenizer), tokenizer, Objective.mlm_nsp)
    with pytest.raises(DataError, match="no sentence of a token or more"):
        examples([[]], tokenizer, Objective.mlm)


def test_unigram_entropy():
    documents = [[np.array([1, 1]), np.array([2])], [np.array([3])]]
    assert pretraining.unigram_entropy(documents) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(4))
