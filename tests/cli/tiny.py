"""Checkpoints of a small random BERT, made on the fly; texts for it; and calls of the commands."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, BertConfig
from transformers.models.bert import modeling_bert as hf
from typer.testing import CliRunner, Result

from fastbert.cli import app

WORDS = ("the", "of", "and", "to", "in", "kernel", "token", "batch", "length", "mask", "row", "sum")
_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *WORDS]


def checkpoint(folder: Path, kind: str = "BertModel", seed: int = 0, **changes: Any) -> Path:
    """Save a random BERT, its vocabulary and a length limit of 48 tokens in ``folder``."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        # Larger than the usual 0.02, so that texts differ by far more than rounding.
        "initializer_range": 0.3,
        **changes,
    }
    torch.manual_seed(seed)
    getattr(hf, kind)(BertConfig(**settings)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 48})
    )
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 60 words, so that some are cut, all different but the empty ones."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=min(60, int(generator.expovariate(1 / 8))))) for _ in range(count)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def load(path: Path) -> torch.Tensor:
    """The rows of a ``.npy`` or ``.parquet`` file."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    column = pq.read_table(path).column("embedding").combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


def embeddings(folder: Path, lines: list[str], pooling: str = "mean", normalize: bool = False) -> torch.Tensor:
    """What ``fastbert embed`` must give: Hugging Face's model, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = hf.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = []
    for line in lines:
        with torch.no_grad():
            states = model(**tokenizer(line, truncation=True, return_tensors="pt")).last_hidden_state[0]
        rows.append(states.mean(0) if pooling == "mean" else states[0])
    found = torch.stack(rows)
    return found / found.norm(dim=1, keepdim=True) if normalize else found


def run(*arguments: object, input: bytes | None = None) -> Result:
    """The command in this process; an exception that isn't turned into an exit code is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*arguments: object, input: bytes | None = None) -> str:
    """The one line on stderr with which the command refuses."""
    result = run(*arguments, input=input)
    assert result.exit_code == 2, result.output
    assert result.stdout == "", result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fastbert: ")
    return lines[0]


def start(*arguments: object, prelude: str = "", **settings: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, which runs the statements ``prelude`` first."""
    # A shell's background jobs ignore Ctrl-C, and so would this, started by one.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{interruptible}\n{prelude}\nfrom fastbert.cli import app\napp()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


_IN_TURN = """
import json, os, sys
from fastbert.cli import app

ends = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(sys.argv[2], f"{number}.{name}"), os.O_WRONLY | os.O_CREAT), stream)
        sys.argv[1:] = arguments
        try:
            app()
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code or 0)
    _, status, usage = os.wait4(child, 0)
    ends.append((os.waitstatus_to_exitcode(status), 1024 * usage.ru_maxrss))
print(json.dumps(ends))
"""


class Done(NamedTuple):
    """How a call of the command ended: what it printed, and the bytes of memory that it held at most."""

    returncode: int
    peak: int
    stdout: str
    stderr: str


def in_turn(*calls: Sequence[object], prelude: str = "", **settings: Any) -> list[Done]:
    """Calls of the command, each in a fork of one process that runs ``prelude`` before it imports the package."""
    arguments = [[str(argument) for argument in call] for call in calls]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", prelude + _IN_TURN, json.dumps(arguments), folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300, **settings)
        printed = [
            [Path(folder, f"{number}.{name}").read_text() for name in ("out", "err")] for number in range(len(calls))
        ]
    return [Done(*end, *texts) for end, texts in zip(json.loads(done.stdout), printed, strict=True)]


def scores(folder: Path) -> dict[str, float]:
    """The log's last evaluation."""
    log = json.loads((folder / "log.json").read_text("utf-8"))
    return next(entry for entry in reversed(log) if "eval_loss" in entry)
