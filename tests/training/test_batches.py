"""Batches: each example once in an epoch over all processes, as many tokens for each, and the same on every run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.training.batches import Batches, Collator

LENGTHS = np.random.default_rng(0).integers(3, 129, 500).tolist()


def all_batches(lengths, processes=1, epoch=0, **how):
    found = []
    for process in range(processes):
        batches = Batches(lengths, 7, processes=processes, process=process, **how)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    processes=st.integers(1, 4),
    how=st.one_of(
        st.fixed_dictionaries({"batch_size": st.integers(1, 9)}),
        st.fixed_dictionaries({"tokens_per_batch": st.integers(1, 400)}),
    ),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=300)
def test_every_example_once(lengths, processes, how, epoch):
    if len(lengths) < processes:
        with pytest.raises(ValueError, match="each must have one"):
            all_batches(lengths, processes, epoch, **how)
        return
    found = all_batches(lengths, processes, epoch, **how)
    assert len({len(batches) for batches in found}) == 1
    assert all(batch for batches in found for batch in batches)
    keys = [key for batches in found for batch in batches for key in batch]
    assert {key // len(lengths) for key in keys} == {epoch}
    indices = sorted(key % len(lengths) for key in keys)
    # Only the last step may borrow, so that each process has an example in it.
    assert set(indices) == set(range(len(lengths)))
    assert len(indices) - len(lengths) < processes
    if "tokens_per_batch" in how or processes == 1:
        assert len(indices) == len(lengths)


def test_epochs_differ_and_runs_do_not():
    first = all_batches(LENGTHS, batch_size=32)
    assert all_batches(LENGTHS, batch_size=32) == first
    second = all_batches(LENGTHS, epoch=1, batch_size=32)
    assert [[key - 500 for key in batch] for batch in second[0]] != first[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_steps_of_one(processes):
    alone = all_batches(LENGTHS, batch_size=32)[0]
    together = all_batches(LENGTHS, processes, batch_size=32 // processes)
    for step, batch in enumerate(alone):
        assert sorted(key for batches in together for key in batches[step]) == sorted(batch)


def test_processes_get_about_as_many_tokens():
    for how in ({"batch_size": 16}, {"tokens_per_batch": 1000}):
        found = all_batches(LENGTHS, 4, **how)
        tokens = np.array([[sum(LENGTHS[key % 500] for key in batch) for batch in batches] for batches in found])
        whole = tokens[:, :-1]
        assert (whole.max(0) / whole.mean(0)).mean() < (1.03 if "batch_size" in how else 1.1)


def test_token_budget():
    found = all_batches(LENGTHS, tokens_per_batch=1000)[0]
    tokens = [sum(LENGTHS[key] for key in batch) for batch in found]
    assert len(found) == -(-sum(LENGTHS) // 1000)
    assert max(tokens) <= 1000 + max(LENGTHS)


@pytest.mark.parametrize("how", [{}, {"batch_size": 1, "tokens_per_batch": 1}])
def test_one_of_both(how):
    with pytest.raises(ValueError, match="exactly one of batch_size and tokens_per_batch"):
        Batches(LENGTHS, 0, **how)


def test_collator():
    batch = Collator(9, ("input_ids", "token_type_ids", "labels", "next_sentence_label"))(
        [
            {"input_ids": [1, 2, 3], "token_type_ids": [0, 1, 1], "labels": [-100, 5, -100], "next_sentence_label": 1},
            {"input_ids": [4], "token_type_ids": [1], "labels": [6], "next_sentence_label": 0, "more": "left out"},
        ]
    )
    expected = {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [1, 0, 0]],
        "labels": [[-100, 5, -100], [6, -100, -100]],
        "next_sentence_label": [1, 0],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}
