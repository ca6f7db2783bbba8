"""The whole BERT, forward and backward, through the Triton kernels: on a GPU, or with ``--triton``."""

import parity
import pytest
import torch
from models import twins

from fastbert.backends import select
from fastbert.models import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = next(select.needs_triton(select.Request(DEVICE, torch.float32)), None)
pytestmark = [pytest.mark.triton, pytest.mark.skipif(REASON is not None, reason=f"Triton's kernels: {REASON}")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

# The ops that the model calls, less the fusion of the extension and the LayerNorm that is only computed again.
FIRST = {"embedding_layer_norm": "triton", "attention": "triton", "linear_gelu": "by_shape"}


def loss_and_gradients(model, inputs, dtype, seed=5):
    model = model.to(dtype)
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**inputs)
    outputs.loss.backward()
    twins.assert_packed(model)
    return outputs.loss.detach(), {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def runs(monkeypatch):
    """Counts which implementation of which op ran."""
    counts = {}
    load = select.load

    def counting(op, name):
        counts[op, name] = counts.get((op, name), 0) + 1
        return load(op, name)

    monkeypatch.setattr(select, "load", counting)
    return counts


# In float32 a program has sequences of up to 32 tokens whole, in 16 bits of up to 128.
@pytest.mark.parametrize(
    ("dtype", "seqlen"), [(torch.float32, 20), (torch.float32, 70), (torch.bfloat16, 50), (torch.float16, 140)], ids=str
)
def test_loss_and_every_gradient(dtype, seqlen, runs, monkeypatch):
    """With dropout, whose masks are the oracle's: bound to the same seeds, all draw the same ones."""
    name = "BertForPreTraining"
    model = twins.twins(
        name, hidden_size=48, num_attention_heads=3, intermediate_size=192, max_position_embeddings=160,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )[1].train().to(DEVICE)  # fmt: skip
    inputs = twins.batch(3, seqlen)
    inputs = {key: value.to(DEVICE) for key, value in (inputs | twins.labels(name, inputs)).items()}
    model.to(dtype)
    loss, gradients = loss_and_gradients(model, inputs, dtype)
    assert {op: [impl for ran, impl in runs if ran == op and impl in FIRST.values()] for op in FIRST} == {
        op: [impl] for op, impl in FIRST.items()
    }
    monkeypatch.setattr(select.Table, "choose", lambda self, impl, request: "reference")
    monkeypatch.setattr(layers.BertLayer, "unfused", lambda self: "the oracle differentiates each part by itself")
    eager_loss, eager = loss_and_gradients(model, inputs, dtype)
    exact_loss, exact = loss_and_gradients(model, inputs, torch.float64)
    assert gradients.keys() == exact.keys() == eager.keys()
    assert len(exact) == len(list(model.parameters()))
    parity.compare("loss", loss, exact_loss, eager_loss)
    for path, gradient in gradients.items():
        if path.endswith("key.bias"):
            # Zero but for rounding: one number added to every key shifts all scores of a query alike. The errors of as
            # many terms add up as in the query's bias, whose gradient has the size of those terms.
            terms = inputs["attention_mask"].sum().item() ** 0.5
            scale = exact[path.replace("key", "query")].abs().max().item()
            assert parity.distance(gradient, exact[path]) <= terms * torch.finfo(dtype).eps * scale
            continue
        # In float32 the gradients of attention have rounding steps of their own (ops/problems.py), and pass them on. Of
        # two numbers eager's largest error is small by luck: as many steps again.
        steps = 4 if dtype == torch.float32 else 1
        parity.compare(path, gradient, exact[path], eager[path], 2 * steps if gradient.numel() <= 2 else steps)
