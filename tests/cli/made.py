"""Labelled data that a tiny BERT learns in seconds, in the formats that people have."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from cli import tiny

FILLER = [word for word in tiny.WORDS if word not in ("kernel", "token", "mask", "batch")]
CLASS_OF = {"kernel": "fast", "token": "small"}
KIND_OF = {"kernel": "TOOL", "token": "PART"}
# What goes on the entity or answer that begins with the word.
TAIL_OF = {"kernel": ["mask", "batch"], "token": []}


def _sentence(generator: random.Random, *words: str) -> list[str]:
    found = generator.choices(FILLER, k=generator.randint(3, 9))
    for word in words:
        found.insert(generator.randint(0, len(found)), word)
    return found


def classified(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): the label is that of the one word that matters."""
    generator = random.Random(seed)
    words = [generator.choice(list(CLASS_OF)) for _ in range(count)]
    return [(" ".join(_sentence(generator, word)), CLASS_OF[word]) for word in words]


def pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(text, text_pair, label): which of them holds the word "kernel"; the other holds "token"."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        words = ["kernel", "token"]
        generator.shuffle(words)
        label = "first" if words[0] == "kernel" else "second"
        found.append((*(" ".join(_sentence(generator, word)) for word in words), label))
    return found


def write_csv(path: Path, columns: list[str], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_conll(path: Path, count: int, seed: int = 0) -> Path:
    """Entities are "kernel mask batch" and "token", among other words."""
    generator = random.Random(seed)
    lines = ["-DOCSTART- -X- O", ""]
    for _ in range(count):
        for word in _sentence(generator, *generator.choices(list(KIND_OF), k=generator.randint(0, 2))):
            kind = KIND_OF.get(word)
            lines.append(f"{word} NN {f'B-{kind}' if kind else 'O'}")
            lines += [f"{tail} NN I-{kind}" for tail in TAIL_OF.get(word, [])]
        lines.append("")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_squad(path: Path, count: int, seed: int = 0, longest: int = 9, missing: float = 0.0) -> Path:
    """The answer to "the kernel of" is "kernel mask batch" in the context, that to "the token of" is "token"."""
    generator = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = generator.choices(FILLER, k=generator.randint(3, longest))
        spans = {word: " ".join([word, *tail]) for word, tail in TAIL_OF.items()}
        absent = generator.random() < missing
        asked = generator.choice(list(KIND_OF))
        for word, span in spans.items():
            if not (absent and word == asked):
                words.insert(generator.randint(0, len(words)), span)
        context = " ".join(words)
        answers = [] if absent else [{"text": spans[asked], "answer_start": context.index(spans[asked])}]
        qa = {"id": f"q{number}", "question": f"the {asked} of", "answers": answers, "is_impossible": absent}
        paragraphs.append({"context": context, "qas": [qa]})
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "made", "paragraphs": paragraphs}]}), "utf-8")
    return path
