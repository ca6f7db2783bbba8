"""Named entities: a tag for each word, from the state of its first piece (arXiv:1810.04805, section 5.3)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

import fastbert
from fastbert.models.bert import IGNORED_LABEL
from fastbert.training import files
from fastbert.training.batches import Collator
from fastbert.training.errors import DataError
from fastbert.training.tasks.encoded import Encoded, label_names, logits

_OUTSIDE = "O"
_DOCUMENT = "-DOCSTART-"
# A Chinese character, a run of other letters and digits, or a mark.
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


class Sentence(NamedTuple):
    """Words with their tags (where they are known) and their places in a text: (first character, one past the last)."""

    words: list[str]
    tags: list[str] | None
    text: str | None = None
    spans: list[tuple[int, int]] | None = None


class Entity(NamedTuple):
    """A kind, and the words from ``start`` up to but not with ``end``."""

    kind: str
    start: int
    end: int


class NamedEntities:
    """Entities in sentences, by tags of the schemes IOB1, IOB2 or IOBES, or of no scheme (one kind, one entity)."""

    head = fastbert.BertForTokenClassification
    pipeline_tag = "token-classification"
    best = "f1"
    keys = ("input_ids", "labels")
    title = "named entities"

    def read(self, path: Path, split: str) -> list[Sentence]:
        """Sentences of a CoNLL file: a word a line, its tag in the last column, blank lines between sentences.

        Columns are separated by spaces or tabs; lines that begin with ``-DOCSTART-`` are left out.

        Raises:
            DataError: a line has a word and no tag, or another number of columns than the first; or there is no word.
        """
        found: list[Sentence] = []
        words: list[str] = []
        tags: list[str] = []
        columns = None
        for number, line in enumerate([*files.lines(path), ""], 1):
            fields = line.split()
            if not fields or fields[0] == _DOCUMENT:
                if words:
                    found.append(Sentence(words, tags))
                    words, tags = [], []
                continue
            columns = columns or len(fields)
            if len(fields) < 2:
                raise DataError(f"{path}, line {number} has one column, {fields[0]!r}; the last must be the word's tag")
            if len(fields) != columns:
                raise DataError(f"{path}, line {number} has {len(fields)} columns, and the lines before it {columns}")
            words.append(fields[0])
            tags.append(fields[-1])
        if not found:
            raise DataError(f"{path} holds no examples")
        return found

    def read_unlabelled(self, path: Path) -> list[Sentence]:
        """The lines of a file, cut into words: at spaces, around marks and around each Chinese character."""
        return [split_words(line) for line in files.lines(path)]

    def labels(self, examples: Sequence[Sentence]) -> list[str]:
        """The tags, sorted, "O" first."""
        found = {tag for example in examples for tag in example.tags or ()}
        if found <= {_OUTSIDE}:
            raise DataError(f"all words have the tag {_OUTSIDE!r}; there must be entities to learn from")
        return [_OUTSIDE, *sorted(found - {_OUTSIDE})]

    def encode(
        self,
        examples: Sequence[Sentence],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str],
    ) -> Encoded:
        """Ids and labels; a sentence of more than ``max_length`` tokens becomes several, cut between words.

        ``labels`` holds the tag of each word at its first piece, or 0 where there are no tags; ``words`` where those
        words are: (sentence, word).

        Raises:
            DataError: a tag that isn't one of ``labels``.
        """
        number = {label: index for index, label in enumerate(labels)}
        room = max_length - 2
        all_words = [word for example in examples for word in example.words]
        # A tokenizer takes no empty list.
        pieces = iter(tokenizer(all_words, add_special_tokens=False, verbose=False)["input_ids"] if all_words else [])
        found: list[dict[str, Any]] = []
        for at, example in enumerate(examples):
            ids: list[int] = []
            wanted: list[int] = []
            words: list[tuple[int, int]] = []
            for word in range(len(example.words)):
                tag = labels[0] if example.tags is None else example.tags[word]
                if tag not in number:
                    raise DataError(
                        f"sentence {at + 1} has the tag {tag!r}, which no training sentence has; "
                        f"they have {', '.join(map(repr, labels))}"
                    )
                of_word = next(pieces)[:room]
                # A word of no piece (a mere control character) has no state to tag.
                if not of_word:
                    continue
                if len(ids) + len(of_word) > room:
                    found.append(_sequence(ids, wanted, words, tokenizer))
                    ids, wanted, words = [], [], []
                ids += of_word
                wanted += [number[tag], *[IGNORED_LABEL] * (len(of_word) - 1)]
                words.append((at, word))
            if words:
                found.append(_sequence(ids, wanted, words, tokenizer))
        return Encoded(found)

    def scores(
        self, examples: Sequence[Sentence], encoded: Encoded, labels: Sequence[str], prediction: EvalPrediction
    ) -> dict[str, float]:
        """Precision, recall and F1 of whole entities, right in kind and in both ends."""
        chosen = np.asarray(prediction.predictions).argmax(-1)
        predicted = _tags(examples, encoded, labels, list(chosen))
        return entity_scores([example.tags or [] for example in examples], predicted)

    def predict(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Sentence], max_length: int
    ) -> list[dict[str, Any]]:
        """Each text with its entities: kind, text, and the places of its first character and one past its last."""
        labels = label_names(model)
        encoded = self.encode([e._replace(tags=None) for e in examples], tokenizer, max_length, labels)
        collator = Collator(tokenizer.pad_token_id, ("input_ids",))
        chosen = [row.argmax(-1).numpy() for (row,) in logits(model, encoded, collator)]
        found = []
        for example, tags in zip(examples, _tags(examples, encoded, labels, chosen), strict=True):
            assert example.text is not None
            assert example.spans is not None
            told = []
            for entity in entities(tags):
                start, end = example.spans[entity.start][0], example.spans[entity.end - 1][1]
                told.append({"entity": entity.kind, "text": example.text[start:end], "start": start, "end": end})
            found.append({"text": example.text, "entities": told})
        return found


def split_words(text: str) -> Sentence:
    """A text as words."""
    matches = list(_WORD.finditer(text))
    return Sentence([match.group() for match in matches], None, text, [match.span() for match in matches])


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities that a sentence's tags stand for, as the CoNLL-2000 shared task's evaluation reads them.

    A tag "B-kind" or "S-kind" begins an entity; so does "I-kind" or "E-kind" after another kind, "O" or an end.
    """
    kind, start, ended = "", 0, True
    for place, tag in enumerate([*tags, _OUTSIDE]):
        prefix, _, this = tag.partition("-")
        if tag == _OUTSIDE:
            this = ""
        elif not this:
            prefix, this = "I", tag
        if kind and (ended or this != kind or prefix in ("B", "S")):
            yield Entity(kind, start, place)
            kind = ""
        if this and not kind:
            kind, start = this, place
        ended = prefix in ("E", "S")


def entity_scores(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all sentences; 0 where there are none to be right about."""
    wanted = {(at, entity) for at, tags in enumerate(expected) for entity in entities(tags)}
    found = {(at, entity) for at, tags in enumerate(predicted) for entity in entities(tags)}
    right = len(wanted & found)
    return {
        "precision": right / len(found) if found else 0.0,
        "recall": right / len(wanted) if wanted else 0.0,
        "f1": 2 * right / (len(wanted) + len(found)) if wanted or found else 0.0,
    }


def _sequence(
    ids: list[int], wanted: list[int], words: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    return {
        "input_ids": [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id],
        "labels": [IGNORED_LABEL, *wanted, IGNORED_LABEL],
        "words": words,
    }


def _tags(
    examples: Sequence[Sentence], encoded: Encoded, labels: Sequence[str], chosen: Sequence[Any]
) -> list[list[str]]:
    """Tags of each sentence's words, from the numbers chosen for each sequence's tokens."""
    found = [[_OUTSIDE] * len(example.words) for example in examples]
    for sequence, numbers in zip(encoded.examples, chosen, strict=True):
        places = [place for place, label in enumerate(sequence["labels"]) if label != IGNORED_LABEL]
        for (at, word), place in zip(sequence["words"], places, strict=True):
            found[at][word] = labels[int(numbers[place])]
    return found
