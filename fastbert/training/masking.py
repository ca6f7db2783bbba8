"""Which tokens are masked, and what stands in their place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fastbert.models.bert import IGNORED_LABEL

# Of the tokens that are chosen: replaced by [MASK]; replaced by a random token; the rest stay as they are.
_MASKED, _RANDOM = 0.8, 0.1

Ids = npt.NDArray[np.int64]


class Masking:
    """Devlin et al., "BERT", arXiv:1810.04805, section 3.1, task 1.

    Args:
        tokenizer: gives the id of ``[MASK]``, the special tokens, which are never chosen, and what goes on a word.
        probability: the part of a sequence's tokens that is chosen: the nearest whole number, one at least.
        whole_word: choose words with all of their pieces, until the number is reached or the next would exceed it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15, whole_word: bool = False) -> None:
        self.tokenizer = tokenizer
        self.probability = probability
        self.whole_word = whole_word
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        self._special, self._goes_on = np.zeros(size, bool), np.zeros(size, bool)
        self._special[tokenizer.all_special_ids] = True
        self._goes_on[[index for piece, index in vocabulary.items() if piece.startswith("##")]] = True
        self._ordinary = np.flatnonzero(~self._special)

    def has_ordinary(self, ids: Ids) -> bool:
        """Whether one of ``ids`` may be chosen."""
        return not self._special[ids].all()

    def choose(self, ids: Ids, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """The places of ``ids`` ``[S]`` that are chosen, in order."""
        candidates = np.flatnonzero(~self._special[ids])
        count = max(1, round(self.probability * len(candidates)))
        if not self.whole_word:
            return np.sort(generator.permutation(candidates)[:count])
        # A word begins at each candidate that doesn't go on the one right before it.
        begins = ~self._goes_on[ids[candidates]]
        begins[1:] |= np.diff(candidates) > 1
        begins[:1] = True
        words = np.split(candidates, np.flatnonzero(begins)[1:])
        chosen: list[int] = []
        for index in generator.permutation(len(words)):
            if not chosen or len(chosen) + len(words[index]) <= count:
                chosen.extend(words[index])
            if len(chosen) >= count:
                break
        return np.sort(np.asarray(chosen, np.int64))

    def replace(self, ids: Ids, chosen: npt.NDArray[np.int64], generator: np.random.Generator) -> Ids:
        """``ids`` with 80% of the chosen places masked, 10% random and 10% as they were."""
        replaced = ids.copy()
        draw = generator.random(len(chosen))
        replaced[chosen[draw < _MASKED]] = self.tokenizer.mask_token_id
        random = chosen[(draw >= _MASKED) & (draw < _MASKED + _RANDOM)]
        replaced[random] = generator.choice(self._ordinary, len(random))
        return replaced


def labels(ids: Ids, chosen: npt.NDArray[np.int64]) -> Ids:
    """The tokens at the chosen places, and -100 elsewhere."""
    found = np.full_like(ids, IGNORED_LABEL)
    found[chosen] = ids[chosen]
    return found
