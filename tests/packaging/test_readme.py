"""The Python code of README.md runs as it stands, with tiny checkpoints under the names that it gives."""

import itertools
import textwrap

import huggingface_hub
import pytest
import torch
import transformers
from builds import ROOT
from cli import tiny
from models import reruns, twins
from transformers.models.bert import modeling_bert as hf

import fastbert

README = (ROOT / "README.md").read_text("utf-8")


def python_blocks():
    """(the heading above it, the code) of each block."""
    heading, found = "", []
    lines = iter(README.splitlines())
    for line in lines:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.lstrip().startswith("```"):
            language = line.strip("` ")
            code = "\n".join(itertools.takewhile(lambda one: one.strip() != "```", lines))
            assert language in ("python", "sh"), f"line {line!r} begins a block in neither of the two"
            if language == "python":
                found.append((heading, textwrap.dedent(code)))
    return found


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """In the present folder, where a name means a checkpoint first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tiny.checkpoint(tmp_path / "bert-base-uncased", "BertForMaskedLM")
    tiny.checkpoint(tmp_path / "all-MiniLM-L6-v2")
    yield
    fastbert.unpatch()


@pytest.fixture
def gpu(monkeypatch):
    """What is moved to one stays on the CPU, and so do graphs."""
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, device=None: self)
    monkeypatch.setattr(transformers.BatchEncoding, "to", lambda self, device: self)
    reruns.install(monkeypatch)


def serve(run):
    found = run({})
    assert type(found["unmasker"].model) is fastbert.BertForMaskedLM
    assert not issubclass(transformers.BertForMaskedLM, fastbert.models.bert.Head)
    twins.assert_packed(found["encoder"])
    assert found["graphed"].route.startswith("graph 1x")


def train(run):
    item = {"input_ids": [2, 9, 3], "attention_mask": [1, 1, 1]}
    found = run({"data": [{**item, "labels": label} for label in (0, 1, 1, 0)]})
    assert found["trainer"].state.global_step == 3
    twins.assert_packed(found["model"])
    tuned = hf.BertForSequenceClassification.from_pretrained("tuned").state_dict()
    assert all(torch.equal(tuned[name], x.cpu()) for name, x in found["model"].state_dict().items())


def write_kernels(run):
    found = run({})
    assert found["out"].shape == (300, 12, 64)
    assert found["qkv"].grad.isfinite().all()


# By the heading, how the code is run and what is then to be seen.
KNOWN = [
    ("For those who serve models", serve),
    ("For those who train", train),
    ("For those who write kernels", write_kernels),
]


def test_every_block_is_known():
    assert [heading for heading, _ in python_blocks()] == [heading for heading, _ in KNOWN]


@pytest.mark.parametrize("index", range(len(KNOWN)), ids=[heading for heading, _ in KNOWN])
def test_it_runs(index, checkpoints, gpu, one_thread):
    heading, code = python_blocks()[index]

    def run(names):
        exec(compile(code, f"README.md, {heading}", "exec"), names)
        return names

    KNOWN[index][1](run)
