"""Classes of texts, or of pairs of texts (arXiv:1810.04805, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

import fastbert
from fastbert.training import files
from fastbert.training.batches import Collator
from fastbert.training.errors import DataError
from fastbert.training.tasks.encoded import Encoded, label_names, logits

# IMDB's folder of reviews without a label (Maas et al., 2011).
_UNLABELLED = "unsup"


class Text(NamedTuple):
    """A text, or two, with the name of its class where that is known, and where it stands."""

    text: str
    text_pair: str | None
    label: str | None
    place: str


class Classification:
    """One class for a text, or for two.

    Args:
        pairs: whether they are two.
    """

    head = fastbert.BertForSequenceClassification
    pipeline_tag = "text-classification"
    best = "accuracy"
    keys = ("input_ids", "token_type_ids", "labels")

    def __init__(self, pairs: bool) -> None:
        self.pairs = pairs
        self.title = "sentence pairs" if pairs else "text classification"

    def read(self, path: Path, split: str) -> list[Text]:
        """Examples with labels.

        Args:
            path: a ``.csv``, ``.tsv`` or ``.jsonl`` file with the columns "text" (for pairs also "text_pair") and
                "label"; a folder of a saved dataset with those columns; or a folder with a folder of ``.txt`` files for
                each class, or with a folder ``split`` that has those.
            split: "train" or "test".

        Raises:
            DataError: something else, or nothing, is there.
        """
        return self._read(path, split, ("label",))

    def read_unlabelled(self, path: Path) -> list[Text]:
        """Examples from a table or dataset as above, without a label; or from the lines of another file."""
        if path.is_dir() or path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
            return self._read(path, "test", ())
        if self.pairs:
            raise DataError(f"{path} is no table; pairs come as .csv, .tsv or .jsonl with columns text and text_pair")
        return [Text(line, None, None, f"{path}, line {n}") for n, line in enumerate(files.lines(path), 1)]

    def _read(self, path: Path, split: str, label: tuple[str, ...]) -> list[Text]:
        columns = ("text", *(("text_pair",) if self.pairs else ()), *label)
        if path.is_dir():
            found = self._folder(path, split, columns)
        else:
            found = [_text(row.values, row.place) for row in files.rows(path, columns)]
        if not found:
            raise DataError(f"{path} holds no examples")
        return found

    def _folder(self, folder: Path, split: str, columns: Sequence[str]) -> list[Text]:
        dataset = files.saved_dataset(folder, split)
        if dataset is not None:
            missing = [column for column in columns if column not in dataset.column_names]
            if missing:
                raise DataError(f"{folder} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}")
            named = getattr(dataset.features.get("label"), "int2str", None)
            found = []
            for row, place in files.saved_rows(dataset, folder):
                if named is not None and "label" in columns and row["label"] is not None:
                    # Sets for a contest have -1 where they keep the class to themselves.
                    if not 0 <= row["label"] < dataset.features["label"].num_classes:
                        raise DataError(
                            f"{place} has the label {row['label']}; it may be 0 to "
                            f"{dataset.features['label'].num_classes - 1}"
                        )
                    row = {**row, "label": named(row["label"])}
                found.append(_text({**row, **{name: files.text(row[name], name, place) for name in columns}}, place))
            return found
        if self.pairs:
            raise DataError(f"{folder} is no saved dataset; pairs come as one, or as a .csv, .tsv or .jsonl file")
        root = folder / split if (folder / split).is_dir() else folder
        classes = sorted(path for path in root.iterdir() if path.is_dir() and path.name != _UNLABELLED)
        found = [
            Text("\n".join(files.lines(path)), None, of.name, str(path))
            for of in classes
            for path in sorted(of.glob("*.txt"))
        ]
        if not found:
            raise DataError(f"{root} has no folder of .txt files for each class, and is no saved dataset")
        return found

    def labels(self, examples: Sequence[Text]) -> list[str]:
        """The names of the classes, sorted.

        Raises:
            DataError: there is only one.
        """
        found = sorted({str(example.label) for example in examples})
        if len(found) < 2:
            raise DataError(f"all examples have the label {found[0]!r}; there must be two labels or more")
        return found

    def encode(
        self, examples: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]
    ) -> Encoded:
        """Ids of each example, cut at ``max_length``, and the number of its class where it has one.

        Raises:
            DataError: a class that isn't one of ``labels``.
        """
        number = {label: index for index, label in enumerate(labels)}
        encoded = tokenizer(
            [example.text for example in examples],
            [example.text_pair or "" for example in examples] if self.pairs else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        found: list[dict[str, Any]] = []
        for example, ids, types in zip(examples, encoded["input_ids"], encoded["token_type_ids"], strict=True):
            if example.label is None:
                found.append({"input_ids": ids, "token_type_ids": types})
            elif example.label not in number:
                raise DataError(
                    f"{example.place} has the label {example.label!r}, which no training example has; "
                    f"they have {', '.join(map(repr, labels))}"
                )
            else:
                found.append({"input_ids": ids, "token_type_ids": types, "labels": number[example.label]})
        return Encoded(found)

    def scores(
        self, examples: Sequence[Text], encoded: Encoded, labels: Sequence[str], prediction: EvalPrediction
    ) -> dict[str, float]:
        """Accuracy, and the mean of the classes' F1."""
        # Here, since predictions do without it.
        from sklearn.metrics import accuracy_score, f1_score

        predicted = np.asarray(prediction.predictions).argmax(-1)
        return {
            "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
            "macro_f1": float(f1_score(prediction.label_ids, predicted, average="macro")),
        }

    def predict(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Text], max_length: int
    ) -> list[dict[str, Any]]:
        """Each example with its likeliest class and the probability of every one."""
        names = label_names(model)
        encoded = self.encode([e._replace(label=None) for e in examples], tokenizer, max_length, names)
        collator = Collator(tokenizer.pad_token_id, self.keys[:-1])
        found = []
        for example, (row,) in zip(examples, logits(model, encoded, collator), strict=True):
            probabilities = torch.softmax(row, 0).tolist()
            best = int(row.argmax())
            text = {"text": example.text} | ({"text_pair": example.text_pair} if self.pairs else {})
            scores = dict(zip(names, probabilities, strict=True))
            found.append({**text, "label": names[best], "score": probabilities[best], "scores": scores})
        return found


def _text(values: dict[str, Any], place: str) -> Text:
    label = values.get("label")
    pair = values.get("text_pair")
    return Text(str(values["text"]), None if pair is None else str(pair), None if label is None else str(label), place)
