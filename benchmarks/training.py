"""What the training commands learn from the docstrings of the standard library, run as a user runs them.

``python -m benchmarks.training`` writes ``results/training.json``, of which docs/training.md shows a table; a test
runs two of them, smaller, and holds the scores against frequencies, and TF-IDF with logistic regression.
"""

from __future__ import annotations

import collections
import csv
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

from fastbert.training import standard_library

from .environment import RESULTS, environment

# A package with fewer docstrings can't be learnt from a hundred of them.
_DOCSTRINGS = 100
_EVALUATED = 0.2
_PRETRAIN = {"vocab-size": 4096, "max-length": 32, "learning-rate": 1e-3, "logging-steps": 50}
_CLASSIFY = {"max-length": 64, "learning-rate": 2e-4}
_OBJECTIVES: dict[str, dict[str, Any]] = {"mlm+nsp": {}, "mae": {"mask-ratio": 0.15}}


def packages(at_least: int = _DOCSTRINGS) -> list[tuple[str, str]]:
    """(docstring, package) for every different docstring of the packages and modules that have ``at_least`` so many."""
    package_of = {docstring.text: docstring.module.partition(".")[0] for docstring in standard_library.docstrings()}
    counts = collections.Counter(package_of.values())
    found = [(text, package) for text, package in package_of.items() if counts[package] >= at_least]
    random.Random(0).shuffle(found)
    return found


def pretrain(folder: Path, objective: str, steps: int, **options: Any) -> dict[str, Any]:
    """Pretrain from scratch: the command, its seconds and its scores, beside what the frequencies of tokens give.

    ``options`` are the command's, ``vocab_size`` for ``--vocab-size``.
    """
    arguments = ["pretrain", "--objective", objective, "--output", folder / "out", "--steps", steps]
    for name, value in (_PRETRAIN | _OBJECTIVES[objective] | _flags(options)).items():
        arguments += [f"--{name}", value]
    found = _run(arguments, folder)
    entropy = float((folder / "out" / "README.md").read_text("utf-8").partition("unigram entropy of ")[2].split()[0])
    frequent = found["scores"].pop("most_frequent_token")
    baselines = {
        "masked_loss": {"unigram entropy": entropy},
        "masked_accuracy": {"most frequent token": frequent},
    }
    if objective != "mae":
        # Of the tokens to predict a tenth is left as it is and a tenth replaced, which can't be told apart: what is in
        # sight is right half the time, and beside it, as for the masked ones, there are the frequencies.
        copying = "frequencies, and copying what is in sight"
        baselines["masked_loss"][copying] = 0.8 * entropy + 0.2 * (math.log(2) + entropy / 2)
        baselines["masked_accuracy"][copying] = 0.8 * frequent + 0.1
    if "next_sentence_accuracy" in found["scores"]:
        baselines["next_sentence_accuracy"] = {"coin": 0.5}
    return {**found, "baselines": baselines}


def classify(
    folder: Path, epochs: int, at_least: int = _DOCSTRINGS, most: int | None = None, **options: Any
) -> dict[str, Any]:
    """Fine-tune MiniLM to tell a docstring's package, beside TF-IDF with logistic regression on the same split.

    ``at_least`` is for ``packages``, ``most`` limits their docstrings, ``options`` are the command's, as above.
    """
    examples = packages(at_least)[:most]
    count = round(_EVALUATED * len(examples))
    for name, rows in (("eval", examples[:count]), ("train", examples[count:])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    arguments = [
        *("finetune", "--task", "classification", "--train", folder / "train.csv", "--eval", folder / "eval.csv"),
        *("--output", folder / "out", "--epochs", epochs),
    ]
    for name, value in (_CLASSIFY | _flags(options)).items():
        arguments += [f"--{name}", value]
    found = _run(arguments, folder)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    baseline = make_pipeline(words, LogisticRegression(C=30, max_iter=500))
    baseline.fit(*zip(*examples[count:], strict=True))
    texts, labels = zip(*examples[:count], strict=True)
    predicted = baseline.predict(texts)
    name = "TF-IDF and logistic regression"
    baselines = {
        "accuracy": {name: float(accuracy_score(labels, predicted))},
        "macro_f1": {name: float(f1_score(labels, predicted, average="macro"))},
    }
    return {**found, "examples": len(examples), "labels": len(set(labels)), "baselines": baselines}


def _flags(options: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in options.items()}


def _run(arguments: list[Any], folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    told = [str(argument) for argument in arguments]
    subprocess.run([sys.executable, "-m", "fastbert", *told], check=True)
    seconds = time.perf_counter() - start
    log = json.loads((folder / "out" / "log.json").read_text("utf-8"))
    evaluated = next(entry for entry in reversed(log) if "eval_loss" in entry)
    scores = {name.removeprefix("eval_"): value for name, value in evaluated.items() if name.startswith("eval_")}
    scores = {name: value for name, value in scores.items() if "per_second" not in name and name != "runtime"}
    command = " ".join(["fastbert", *told]).replace(f"{folder}/", "")
    return {"command": command, "seconds": seconds, "scores": scores}


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "pretraining from scratch": lambda folder: pretrain(folder, "mlm+nsp", 900),
    "masked autoencoder from scratch": lambda folder: pretrain(folder, "mae", 900),
    "package of a docstring": lambda folder: classify(folder, 4),
}


def main() -> None:
    """Run all, and write what they found."""
    runs = []
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs.append({"name": name, **run(Path(folder))})
    data = {"environment": environment(torch.device("cpu")), "runs": runs}
    (RESULTS / "training.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
