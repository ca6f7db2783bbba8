"""What the training commands learn from the docstrings of the standard library, run as a user runs them.

``python -m benchmarks.training`` writes ``results/training.json``, of which docs/training.md shows a table; a test runs
the same and holds the scores against what costs nothing: frequencies, a coin, and TF-IDF with logistic regression.
"""

from __future__ import annotations

import collections
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
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
# A model that two cores train in minutes. Weights begin at the size that keeps the states' at such a width.
_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.08,
}
_PRETRAIN = {"max-length": 64, "vocab-size": 1000, "learning-rate": 2e-3, "logging-steps": 50, "eval-fraction": 0.1}


def packages() -> list[tuple[str, str]]:
    """(docstring, package) for every different docstring of the packages and modules that have a hundred."""
    package_of = {docstring.text: docstring.module.partition(".")[0] for docstring in standard_library.docstrings()}
    counts = collections.Counter(package_of.values())
    found = [(text, package) for text, package in package_of.items() if counts[package] >= _DOCSTRINGS]
    random.Random(0).shuffle(found)
    return found


def pretrain(folder: Path, objective: str, steps: int) -> dict[str, Any]:
    """Pretrain from scratch: the command, its seconds and its scores."""
    config = folder / "config.json"
    config.write_text(json.dumps(_SMALL), "utf-8")
    arguments = ["pretrain", "--objective", objective, "--config", config, "--output", folder / "out", "--steps", steps]
    for name, value in _PRETRAIN.items():
        arguments += [f"--{name}", value]
    found = _run(arguments, folder)
    entropy = float((folder / "out" / "README.md").read_text("utf-8").partition("unigram entropy of ")[2].split()[0])
    return {**found, "baselines": {"unigram entropy": entropy, "coin": 0.5}}


def classify(folder: Path, epochs: int) -> dict[str, Any]:
    """Fine-tune MiniLM to tell a docstring's package, beside TF-IDF with logistic regression on the same split."""
    examples = packages()
    count = round(_EVALUATED * len(examples))
    for name, rows in (("eval", examples[:count]), ("train", examples[count:])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    arguments = [
        *("finetune", "--task", "classification", "--train", folder / "train.csv", "--eval", folder / "eval.csv"),
        *("--output", folder / "out", "--epochs", epochs, "--max-length", 64, "--learning-rate", 2e-4),
    ]
    found = _run(arguments, folder)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    baseline = make_pipeline(words, LogisticRegression(C=30, max_iter=500))
    baseline.fit(*zip(*examples[count:], strict=True))
    texts, labels = zip(*examples[:count], strict=True)
    predicted = baseline.predict(texts)
    scores = {
        "TF-IDF accuracy": float(accuracy_score(labels, predicted)),
        "TF-IDF macro F1": float(f1_score(labels, predicted, average="macro")),
        "commonest": collections.Counter(labels).most_common(1)[0][1] / count,
    }
    return {**found, "examples": len(examples), "labels": len(set(labels)), "baselines": scores}


def _run(arguments: list[Any], folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    told = [str(argument) for argument in arguments]
    subprocess.run([sys.executable, "-m", "fastbert", *told], check=True)
    seconds = time.perf_counter() - start
    log = json.loads((folder / "out" / "log.json").read_text("utf-8"))
    evaluated = next(entry for entry in reversed(log) if "eval_loss" in entry)
    scores = {name.removeprefix("eval_"): value for name, value in evaluated.items() if name.startswith("eval_")}
    command = " ".join(["fastbert", *told]).replace(f"{folder}/", "")
    return {"command": command, "seconds": seconds, "scores": scores}


RUNS = {
    "masked tokens and next sentences": lambda folder: pretrain(folder, "mlm+nsp", 600),
    "masked autoencoder": lambda folder: pretrain(folder, "mae", 600),
    "package of a docstring": lambda folder: classify(folder, 5),
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
