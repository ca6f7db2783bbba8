"""What a BERT is pretrained on: masked tokens, sentence pairs, and the two in one (arXiv:1810.04805, section 3.1).

The corpus is cut once into chunks of whole sentences that fill a sequence. Everything random in an example (where a
pair is split, what its second half is, which tokens are masked) is drawn when the example is asked for, from the seed
and the example's key: anew in every epoch, and the same again after an interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fastbert.training.batches import Keyed
from fastbert.training.corpus import Document
from fastbert.training.errors import DataError
from fastbert.training.kinds import Objective
from fastbert.training.masking import Ids, Masking, labels

# Devlin et al., appendix A.2: 10% of the sequences are shorter, so that the model knows such ones too.
_SHORT = 0.1
_RANDOM_NEXT = 0.5
# Labels of the next-sentence head, as in Hugging Face.
IS_NEXT, IS_RANDOM = 0, 1


KEYS = {
    Objective.mlm_nsp: ("input_ids", "token_type_ids", "labels", "next_sentence_label"),
    Objective.mlm: ("input_ids", "labels"),
    Objective.mae: ("input_ids", "labels"),
}

Chunk = tuple[int, list[Ids]]


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[list[Ids]]:
    """Each document's sentences as ids, without special tokens; sentences without a token are left out."""
    flat = [sentence for document in documents for sentence in document]
    encoded = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
    found = [[np.asarray(ids, np.int64) for ids in itertools.islice(encoded, len(document))] for document in documents]
    return [[ids for ids in document if len(ids)] for document in found]


def chunks(documents: Sequence[Sequence[Ids]], tokens: int, seed: int, at_least: int = 1) -> list[Chunk]:
    """Runs of sentences of about ``tokens`` tokens, each with the number of its document.

    A run ends with the sentence that reaches its size, which for one in ten is a random shorter one. Runs of less than
    ``at_least`` sentences are joined to the one before, or left out where there is none.
    """
    generator = np.random.default_rng(seed)
    found: list[Chunk] = []
    for number, document in enumerate(documents):
        runs: list[list[Ids]] = []
        run: list[Ids] = []
        target = tokens
        for sentence in document:
            run.append(sentence)
            if len(run) >= at_least and sum(map(len, run)) >= target:
                runs.append(run)
                run = []
                target = int(generator.integers(2, tokens + 1)) if generator.random() < _SHORT else tokens
        if len(run) >= at_least:
            runs.append(run)
        elif run and runs:
            runs[-1].extend(run)
        found += [(number, run) for run in runs]
    return found


class Examples(Keyed):
    """The examples of an objective, by key: ``epoch * len(self) + index``.

    Args:
        documents: the corpus, encoded.
        objective: which it is.
        masking: how tokens are masked.
        max_length: tokens of a sequence at most, ``[CLS]`` and ``[SEP]`` included.
        seed: of everything that is drawn.

    Raises:
        DataError: the corpus is too small for the objective.
    """

    def __init__(
        self, documents: Sequence[Sequence[Ids]], objective: Objective, masking: Masking, max_length: int, seed: int
    ) -> None:
        self.pairs = objective == Objective.mlm_nsp
        self.objective = objective
        self.masking = masking
        self.room = max_length - (3 if self.pairs else 2)
        self.seed = seed
        self.chunks = chunks(documents, self.room, seed, at_least=2 if self.pairs else 1)
        if self.pairs and len({document for document, _ in self.chunks}) < 2:
            raise DataError(
                f"the corpus has {len(documents)} documents, of which fewer than two have two sentences; objective "
                f"{objective} needs them, to draw a random next sentence from another document"
            )
        if not self.chunks:
            raise DataError("the corpus has no sentence of a token or more")
        if not any(masking.has_ordinary(ids) for _, run in self.chunks for ids in run):
            raise DataError("the corpus has no token to mask: the vocabulary knows none of its words")
        specials = max_length - self.room
        self.lengths = [min(sum(map(len, run)), self.room) + specials for _, run in self.chunks]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, key: int) -> dict[str, Any]:
        """Arrays ``[S]`` of ids and labels; and for pairs token types and whether the second half is a random one."""
        generator = np.random.default_rng((self.seed, key))
        document, run = self.chunks[key % len(self.chunks)]
        tokenizer = self.masking.tokenizer
        cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        example: dict[str, Any] = {}
        if self.pairs:
            first, second, label = self._pair(document, run, generator)
            ids = np.concatenate([cls, first, sep, second, sep])
            example["token_type_ids"] = (np.arange(len(ids)) >= len(first) + 2).astype(np.int64)
            example["next_sentence_label"] = label
        else:
            ids = np.concatenate([cls, _cut(np.concatenate(run), self.room, generator), sep])
        chosen = self.masking.choose(ids, generator)
        example["labels"] = labels(ids, chosen)
        # An autoencoder is not shown what is masked, so nothing has to stand there.
        example["input_ids"] = ids if self.objective == Objective.mae else self.masking.replace(ids, chosen, generator)
        return example

    def _pair(self, document: int, run: list[Ids], generator: np.random.Generator) -> tuple[Ids, Ids, int]:
        split = int(generator.integers(1, len(run)))
        first, second = np.concatenate(run[:split]), np.concatenate(run[split:])
        label = IS_NEXT
        if generator.random() < _RANDOM_NEXT:
            label = IS_RANDOM
            second = self._from_another(document, len(second), generator)
        return (*_cut_pair(first, second, self.room, generator), label)

    def _from_another(self, document: int, tokens: int, generator: np.random.Generator) -> Ids:
        """Sentences of another document, as many as reach ``tokens`` tokens where there are enough of them."""
        other = document
        while other == document:
            index = int(generator.integers(len(self.chunks)))
            other, run = self.chunks[index]
        start = int(generator.integers(len(run)))
        sizes = np.cumsum([len(sentence) for sentence in run[start:]])
        count = int(np.searchsorted(sizes, tokens)) + 1
        return np.concatenate(run[start : start + count])


def _cut(ids: Ids, tokens: int, generator: np.random.Generator) -> Ids:
    """A part of ``ids`` that begins at its first or ends at its last token."""
    if len(ids) <= tokens:
        return ids
    return ids[:tokens] if generator.random() < 0.5 else ids[-tokens:]


def _cut_pair(first: Ids, second: Ids, tokens: int, generator: np.random.Generator) -> tuple[Ids, Ids]:
    """Both cut until they have ``tokens`` together: the longer one down to the other's size, then both alike."""
    over = len(first) + len(second) - tokens
    if over <= 0:
        return first, second
    half = tokens // 2
    if len(first) <= half:
        return first, _cut(second, tokens - len(first), generator)
    if len(second) <= tokens - half:
        return _cut(first, tokens - len(second), generator), second
    return _cut(first, half, generator), _cut(second, tokens - half, generator)


def unigram_entropy(documents: Sequence[Sequence[Ids]]) -> float:
    """Nats of a token's surprise for who knows the corpus's frequencies only: what a loss must fall clearly below."""
    _, counts = np.unique(np.concatenate([ids for document in documents for ids in document]), return_counts=True)
    frequency: npt.NDArray[np.float64] = counts / counts.sum()
    return float(-(frequency * np.log(frequency)).sum())
