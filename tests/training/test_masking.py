"""Which tokens are masked, and what stands in their place."""

import numpy as np
import pytest

from fastbert.training import vocabulary
from fastbert.training.masking import Masking, labels

TEXTS = ["the unbelievable tokenization of transformers", "the kernels of the transformers tokenize", "unbelievable"]


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.learn(TEXTS, 60, 64)


def ids_of(tokenizer, count=400):
    return np.asarray(tokenizer(" ".join(TEXTS * count))["input_ids"])


def test_vocabulary(tokenizer):
    assert len(tokenizer) <= 60
    assert tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])[0] == "[CLS]"
    assert tokenizer.decode(tokenizer("The Kernels", add_special_tokens=False)["input_ids"]) == "the kernels"


def test_the_same_texts_give_the_same_vocabulary():
    vocabularies = [vocabulary.learn(TEXTS, 70, 64).get_vocab() for _ in range(8)]
    assert all(found == vocabularies[0] for found in vocabularies)


def test_cased_vocabulary():
    tokenizer = vocabulary.learn(["Caf\u00e9 caf\u00e9"], 60, 64, lowercase=False)
    assert tokenizer.decode(tokenizer("Caf\u00e9", add_special_tokens=False)["input_ids"]) == "Caf\u00e9"


def test_chinese_characters_are_words():
    tokenizer = vocabulary.learn(["\u4eca\u5929\u5929\u6c14\u5f88\u597d"] * 3, 60, 64)
    assert tokenizer.tokenize("\u4eca\u5929") == ["\u4eca", "\u5929"]


@pytest.mark.parametrize("whole_word", [False, True])
def test_chosen(tokenizer, whole_word):
    masking = Masking(tokenizer, 0.15, whole_word)
    ids = ids_of(tokenizer)
    chosen = masking.choose(ids, np.random.default_rng(0))
    assert (np.diff(chosen) > 0).all()
    assert not set(ids[chosen]) & set(tokenizer.all_special_ids)
    wanted = round(0.15 * (len(ids) - 2))
    assert len(chosen) == wanted if not whole_word else wanted - 20 < len(chosen) <= wanted


def test_whole_words_are_chosen_whole(tokenizer):
    ids = ids_of(tokenizer)
    chosen = set(Masking(tokenizer, 0.3, whole_word=True).choose(ids, np.random.default_rng(0)).tolist())
    goes_on = [piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(ids.tolist())]
    assert sum(goes_on[place] for place in chosen) > 100
    for place in range(1, len(ids)):
        if goes_on[place]:
            assert (place in chosen) == (place - 1 in chosen)


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_chosen(tokenizer, whole_word):
    ids = np.asarray(tokenizer("the", "of")["input_ids"])
    masking = Masking(tokenizer, 0.9, whole_word)
    for seed in range(20):
        chosen = masking.choose(ids, np.random.default_rng(seed))
        assert set(ids[chosen]).isdisjoint(tokenizer.all_special_ids)


@pytest.mark.parametrize("whole_word", [False, True])
def test_one_token_at_least(tokenizer, whole_word):
    ids = np.asarray(tokenizer("the")["input_ids"])
    assert len(Masking(tokenizer, 0.15, whole_word).choose(ids, np.random.default_rng(0))) >= 1


def test_replaced(tokenizer):
    masking = Masking(tokenizer, 0.15)
    ids = ids_of(tokenizer, 4000)
    generator = np.random.default_rng(1)
    chosen = masking.choose(ids, generator)
    before = ids.copy()
    replaced = masking.replace(ids, chosen, generator)
    np.testing.assert_array_equal(ids, before)
    assert (np.delete(replaced, chosen) == np.delete(ids, chosen)).all()
    new = replaced[chosen]
    # Standard deviations: 0.4% and less of 13,000 tokens; a random token is the old one with a chance of 1 in 55.
    assert abs((new == tokenizer.mask_token_id).mean() - 0.8) < 0.02
    assert abs((new == ids[chosen]).mean() - 0.1) < 0.02
    others = new[(new != ids[chosen]) & (new != tokenizer.mask_token_id)]
    assert not set(others) & set(tokenizer.all_special_ids)
    assert len(set(others)) > 40


def test_labels(tokenizer):
    found = labels(np.array([5, 6, 7]), np.array([1]))
    assert found.tolist() == [-100, 6, -100]
