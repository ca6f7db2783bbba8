"""Extractive question answering, as on SQuAD (arXiv:1810.04805, sections 4.2 and 4.3)."""

from __future__ import annotations

import collections
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

import fastbert
from fastbert.training import files
from fastbert.training.batches import Collator
from fastbert.training.errors import DataError
from fastbert.training.tasks.encoded import Encoded, logits

_Value = TypeVar("_Value", str, int)

# Tokens by which the windows of a long context overlap at most, tokens of an answer at most, and how many of the
# likeliest starts and ends are paired: those of the original implementation.
_STRIDE, _LONGEST_ANSWER, _BEST = 128, 30, 20


class Question(NamedTuple):
    """A question on a context. ``answers`` are (text, first character); () if there is none; None if not known."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None


class QuestionAnswering:
    """The span of a context that answers a question."""

    head = fastbert.BertForQuestionAnswering
    pipeline_tag = "question-answering"
    best = "f1"
    keys = ("input_ids", "token_type_ids", "start_positions", "end_positions")
    title = "question answering"

    def read(self, path: Path, split: str) -> list[Question]:
        """Questions with their answers from SQuAD's JSON, of version 1.1 or 2.0.

        Raises:
            DataError: the file isn't that, or an answer isn't where it is said to be; the question is named.
        """
        return self._read(path, answered=True)

    def read_unlabelled(self, path: Path) -> list[Question]:
        """Questions from SQuAD's JSON, or from a table with the columns "question" and "context"."""
        if path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
            rows = enumerate(files.rows(path, ("question", "context")))
            return [
                Question(str(row.values.get("id", number)), row.values["question"], row.values["context"], None)
                for number, row in rows
            ]
        return self._read(path, answered=False)

    def _read(self, path: Path, answered: bool) -> list[Question]:
        text = "\n".join(files.lines(path))
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no JSON: {error}") from None
        found = []
        try:
            for article in data["data"]:
                for paragraph in article["paragraphs"]:
                    for qa in paragraph["qas"]:
                        answers = None
                        if answered:
                            answers = tuple((_of(a, "text", str), _of(a, "answer_start", int)) for a in qa["answers"])
                        asked, context = _of(qa, "question", str), _of(paragraph, "context", str)
                        found.append(Question(str(qa["id"]), asked, context, answers))
        except (KeyError, TypeError, UnicodeEncodeError) as error:
            raise DataError(
                f"{path} is not in SQuAD's format: after {found[-1].id if found else 'its beginning'} "
                f"{error} is missing or of another type"
            ) from None
        for question in found:
            for text, start in question.answers or ():
                there = question.context[max(start, 0) : max(start + len(text), 0)]
                if not text or start < 0 or there != text:
                    raise DataError(
                        f"{path}, question {question.id}: the answer {text!r} is not in its context at character "
                        f"{start}, where {there!r} is"
                    )
        if not found:
            raise DataError(f"{path} holds no examples")
        return found

    def labels(self, examples: Sequence[Question]) -> None:
        """There are none."""

    def encode(
        self, examples: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: object = None
    ) -> Encoded:
        """Windows of ``max_length`` tokens over each context, each with the whole question before it.

        ``start_positions`` and ``end_positions`` are the first answer's tokens, or 0, the place of ``[CLS]``, in a
        window that doesn't hold it whole. ``question`` is the example's number, ``spans`` the characters of the context
        that each token stands for, None outside it.

        Raises:
            DataError: a question leaves no room for a context.
        """
        encoded = self._windows(examples, tokenizer, max_length)
        found: list[dict[str, Any]] = []
        for window, number in enumerate(encoded["overflow_to_sample_mapping"]):
            sequence = encoded.sequence_ids(window)
            offsets = encoded["offset_mapping"][window]
            spans = [tuple(o) if s == 1 else None for o, s in zip(offsets, sequence, strict=True)]
            example: dict[str, Any] = {
                "input_ids": encoded["input_ids"][window],
                "token_type_ids": encoded["token_type_ids"][window],
                "question": number,
                "spans": spans,
            }
            answers = examples[number].answers
            if answers is not None:
                start, end = _answer_tokens(answers, spans)
                example.update(start_positions=start, end_positions=end)
            found.append(example)
        return Encoded(found)

    def _windows(self, examples: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
        questions = [example.question.strip() for example in examples]
        lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
        stride = min(_STRIDE, max_length // 3)
        # [CLS] question [SEP] context [SEP], and each window must go on by a token at least.
        room = max_length - 3 - stride - 1
        for example, length in zip(examples, lengths, strict=True):
            if length > room:
                raise DataError(
                    f"question {example.id} has {length} tokens; with a length of {max_length} it may have {room}, so "
                    "that a part of the context fits beside it"
                )
        return tokenizer(
            questions,
            [example.context for example in examples],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )

    def scores(
        self, examples: Sequence[Question], encoded: Encoded, labels: object, prediction: EvalPrediction
    ) -> dict[str, float]:
        """Exact match and F1, each the mean over the questions of the best over a question's answers."""
        predicted: Any = prediction.predictions
        starts, ends = predicted[:2]
        rows = [
            (np.asarray(start)[: len(e["input_ids"])], np.asarray(end)[: len(e["input_ids"])])
            for e, start, end in zip(encoded.examples, starts, ends, strict=True)
        ]
        found = best_answers(examples, encoded, rows)
        pairs = [
            (answer["answer"], [text for text, _ in example.answers or ()] or [""])
            for example, answer in zip(examples, found, strict=True)
        ]
        return {
            "exact_match": float(np.mean([max(exact_match(told, a) for a in answers) for told, answers in pairs])),
            "f1": float(np.mean([max(token_f1(told, a) for a in answers) for told, answers in pairs])),
        }

    def predict(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Question], max_length: int
    ) -> list[dict[str, Any]]:
        """Each question with its answer, "" if there is none, where it stands, and its score (of logits)."""
        encoded = self.encode([e._replace(answers=None) for e in examples], tokenizer, max_length)
        collator = Collator(tokenizer.pad_token_id, self.keys[:2])
        rows = [(start.numpy(), end.numpy()) for start, end in logits(model, encoded, collator)]
        impossible = bool(getattr(model.config, "fastbert", {}).get("answers_may_be_missing"))
        answers = best_answers(examples, encoded, rows, impossible)
        return [
            {"id": example.id, "question": example.question, **answer}
            for example, answer in zip(examples, answers, strict=True)
        ]


def _of(values: Any, name: str, kind: type[_Value]) -> _Value:
    """A value of that type; a text is one that UTF-8 can encode."""
    value = values[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name!r}, which is {value!r},")
    if isinstance(value, str):
        value.encode()
    return value


def best_answers(
    examples: Sequence[Question],
    encoded: Encoded,
    rows: Sequence[tuple[Any, Any]],
    may_be_missing: bool | None = None,
) -> list[dict[str, Any]]:
    """For each question the span of the highest start and end logit together, over all windows of its context.

    A span lies in the context, ends no earlier than it begins, and has 30 tokens at most. Where answers may be missing
    (None: where one of the examples has none) the answer is "" if ``[CLS]`` has more than the best span in each window.
    """
    if may_be_missing is None:
        may_be_missing = any(example.answers == () for example in examples)
    best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(examples)
    missing = [np.inf] * len(examples)
    for window, (starts, ends) in zip(encoded.examples, rows, strict=True):
        number, spans = window["question"], window["spans"]
        missing[number] = min(missing[number], float(starts[0] + ends[0]))
        context = np.array([span is not None for span in spans])
        first = [int(i) for i in np.argsort(-np.where(context, starts, -np.inf), kind="stable")[:_BEST] if context[i]]
        last = [int(i) for i in np.argsort(-np.where(context, ends, -np.inf), kind="stable")[:_BEST] if context[i]]
        for start in first:
            for end in last:
                if start <= end < start + _LONGEST_ANSWER:
                    score = float(starts[start] + ends[end])
                    if score > best[number][0]:
                        best[number] = (score, spans[start][0], spans[end][1])
    found = []
    for example, (score, start, end), nothing in zip(examples, best, missing, strict=True):
        if may_be_missing and nothing > score:
            found.append({"answer": "", "start": None, "end": None, "score": nothing})
        else:
            found.append({"answer": example.context[start:end], "start": start, "end": end, "score": score})
    return found


def normalise(answer: str) -> str:
    """Small letters, no marks, no articles, single spaces: as SQuAD's evaluation compares answers."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(predicted: str, expected: str) -> float:
    """1 if both answers are the same but for case, marks and articles, else 0."""
    return float(normalise(predicted) == normalise(expected))


def token_f1(predicted: str, expected: str) -> float:
    """F1 of the words that two answers share (Rajpurkar et al., arXiv:1606.05250, section 6.1)."""
    told, wanted = normalise(predicted).split(), normalise(expected).split()
    if not told or not wanted:
        return float(told == wanted)
    shared = (collections.Counter(told) & collections.Counter(wanted)).total()
    return 2 * shared / (len(told) + len(wanted))


def _answer_tokens(answers: Sequence[tuple[str, int]], spans: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    if not answers:
        return 0, 0
    text, first = answers[0]
    # No token stands for spaces around it.
    first += len(text) - len(text.lstrip())
    past = first + len(text.strip())
    inside = [(*span, i) for i, span in enumerate(spans) if span is not None and span[0] < past and span[1] > first]
    # At a window's edge a piece of the answer may lie in the next one only.
    if not inside or inside[0][0] > first or inside[-1][1] < past:
        return 0, 0
    return inside[0][2], inside[-1][2]
