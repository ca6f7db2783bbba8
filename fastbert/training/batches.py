"""Which examples make a batch: the same on every run, whatever the number of processes, and resumable anywhere.

An example is asked for by a key, ``epoch * len(dataset) + index``, so that a dataset can draw anew in every epoch
(masks, sentence pairs) from nothing but its seed and the key: no state has to be kept or restored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastbert.models.bert import IGNORED_LABEL

_PADDING = {"labels": IGNORED_LABEL, "token_type_ids": 0}


class Batches(Sampler[list[int]]):
    """The batches of one process, as lists of keys; all processes together see each example once in an epoch.

    fastbert computes nothing for padding, so examples of all lengths stand together as they are shuffled; and
    processes that wait for one another at every step get about as many tokens each.

    Args:
        lengths: tokens of each example.
        seed: of the order, with the epoch.
        batch_size: examples of a batch; a step's ``batch_size * processes`` are dealt out by length.
        tokens_per_batch: or else, about as many tokens: an epoch is cut into equal parts, to the nearest example.
        processes, process: how many there are, and which this one is.

    Raises:
        ValueError: fewer examples than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        if (batch_size is None) == (tokens_per_batch is None):
            raise ValueError("exactly one of batch_size and tokens_per_batch must be given")
        if len(lengths) < processes:
            raise ValueError(f"there are {len(lengths)} examples for {processes} processes; each must have one")
        self.lengths = np.asarray(lengths, np.int64)
        self.seed = seed
        self.batch_size = batch_size
        self.processes = processes
        self.process = process
        self.epoch = 0
        if batch_size is not None:
            self.steps = -(-len(lengths) // (batch_size * processes))
        else:
            assert tokens_per_batch is not None
            wanted = -(-int(self.lengths.sum()) // (tokens_per_batch * processes))
            self.steps = min(wanted, len(lengths) // processes)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        first = self.epoch * len(self.lengths)
        deal = self._by_tokens if self.batch_size is None else self._by_count
        for members in deal(order):
            yield (first + members).tolist()

    def _by_count(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        assert self.batch_size is not None
        size = self.batch_size * self.processes
        for start in range(0, len(order), size):
            step = order[start : start + size]
            if len(step) < self.processes:
                # As DistributedSampler does: the last step borrows from the first, so that every process has one.
                step = np.concatenate([step, order[: self.processes - len(step)]])
            # There and back again: the longest to the first process, the next two to the last, ...
            rank = np.argsort(-self.lengths[step], kind="stable")
            place = np.empty_like(rank)
            place[rank] = np.arange(len(step))
            turn, seat = np.divmod(place, self.processes)
            yield step[np.where(turn % 2, self.processes - 1 - seat, seat) == self.process]

    def _by_tokens(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        parts = self.steps * self.processes
        ends = np.cumsum(self.lengths[order])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, parts) / parts) + 1
        # Each part has an example at least, even where one is longer than a part.
        cuts = np.maximum(cuts - np.arange(1, parts), 0)
        cuts = np.maximum.accumulate(cuts) + np.arange(1, parts)
        cuts = np.minimum(cuts, len(order) - np.arange(parts - 1, 0, -1))
        yield from np.split(order, cuts)[self.process :: self.processes]


class Keyed(Dataset[dict[str, Any]]):
    """Examples by key; ``lengths`` holds the tokens of each."""

    lengths: list[int]


class EpochLoader(DataLoader[Any]):
    """A ``DataLoader`` over :class:`Batches` that passes the epoch on to them."""

    def __init__(self, dataset: Keyed, batches: Batches, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **kwargs)
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch from the next iteration on."""
        self._batches.set_epoch(epoch)


class Collator:
    """Examples to a batch: arrays of S tokens are padded to the longest, numbers are stacked.

    Args:
        pad_token_id: what input_ids are padded with.
        keys: the columns to take.
    """

    def __init__(self, pad_token_id: int, keys: Sequence[str]) -> None:
        self.padding = {"input_ids": pad_token_id, **_PADDING}
        self.keys = keys

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch, with an ``attention_mask`` ``[B, S]``."""
        lengths = np.array([len(example["input_ids"]) for example in examples])
        valid = np.arange(lengths.max()) < lengths[:, None]
        batch = {"attention_mask": torch.from_numpy(valid.astype(np.int64))}
        for key in self.keys:
            values = [np.asarray(example[key]) for example in examples]
            if values[0].ndim == 0:
                batch[key] = torch.from_numpy(np.stack(values).astype(np.int64))
            else:
                padded = np.full(valid.shape, self.padding[key], np.int64)
                padded[valid] = np.concatenate(values)
                batch[key] = torch.from_numpy(padded)
        return batch
