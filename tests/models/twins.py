"""A Hugging Face model and its fastbert twin with the same weights, and batches to compare them on."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

import fastbert

# The largest difference that section 6 of the design allows a 12-layer model in float32 on a CPU.
TOLERANCE = 1e-5

HEADS = (
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)


def config(**changes: Any) -> transformers.BertConfig:
    """A BERT of two layers, small enough to run in milliseconds; dropout off unless asked for."""
    small = {
        "vocab_size": 101,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 148,
        "max_position_embeddings": 600,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
    }
    return transformers.BertConfig(**{**small, **changes})


def twins(name: str = "BertModel", seed: int = 0, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """(Hugging Face's model, fastbert's), in eval mode, every parameter random and equal."""
    torch.manual_seed(seed)
    reference = getattr(hf, name)(config(**changes)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                # Biases are zero and LayerNorm weights one after initialisation: swap-ups would go unseen.
                parameter.add_(torch.randn_like(parameter) * 0.2)
    fast = getattr(fastbert, name)(copy.deepcopy(reference.config)).eval()
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def mask(kind: str, batch: int, seqlen: int) -> Tensor | None:
    """A 2-D int64 mask: "none", "full", "right", "left" or "holes"; every row has a valid token."""
    if kind == "none":
        return None
    if kind == "full":
        return torch.ones(batch, seqlen, dtype=torch.int64)
    lengths = torch.linspace(1, seqlen, batch).round().long()
    place = torch.arange(seqlen)
    if kind == "right":
        return (place < lengths[:, None]).long()
    if kind == "left":
        return (place >= seqlen - lengths[:, None]).long()
    assert kind == "holes"
    holes = torch.rand(batch, seqlen, generator=torch.Generator().manual_seed(1)) < 0.6
    holes[:, 0] = True
    return holes.long()


def batch(
    batch_size: int = 5, seqlen: int = 37, kind: str = "right", vocab_size: int = 101, seed: int = 0
) -> dict[str, Tensor]:
    """Random ids and segments with a mask of the given kind."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "input_ids": torch.randint(1, vocab_size, (batch_size, seqlen), generator=generator),
        "token_type_ids": torch.randint(0, 2, (batch_size, seqlen), generator=generator),
    }
    attention_mask = mask(kind, batch_size, seqlen)
    return inputs if attention_mask is None else {**inputs, "attention_mask": attention_mask}


def valid(inputs: dict[str, Tensor]) -> Tensor:
    """bool ``[B, S]``: where tokens are."""
    attention_mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if attention_mask is None else attention_mask.bool()


def labels(name: str, inputs: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Labels for a head; those of padded positions are to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, seqlen = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    def tokens(high: int) -> Tensor:
        return draw(high, batch_size, seqlen).masked_fill(~valid(inputs), -100)

    return {
        "BertForPreTraining": lambda: {"labels": tokens(101), "next_sentence_label": draw(2, batch_size)},
        "BertForMaskedLM": lambda: {"labels": tokens(101)},
        "BertForNextSentencePrediction": lambda: {"labels": draw(2, batch_size)},
        "BertForSequenceClassification": lambda: {"labels": draw(2, batch_size)},
        "BertForMultipleChoice": lambda: {"labels": draw(3, batch_size)},
        "BertForTokenClassification": lambda: {"labels": tokens(2)},
        "BertForQuestionAnswering": lambda: {
            "start_positions": draw(seqlen, batch_size),
            "end_positions": draw(seqlen, batch_size),
        },
    }[name]()


def head_batch(name: str, kind: str = "right") -> dict[str, Tensor]:
    """A batch with labels for a head."""
    inputs = batch(kind=kind)
    wanted = labels(name, inputs)
    if name == "BertForMultipleChoice":
        inputs = {key: value.unsqueeze(1).repeat(1, 3, 1) for key, value in inputs.items()}
        inputs["input_ids"] = (inputs["input_ids"] + torch.arange(3)[:, None]) % 101
    return {**inputs, **wanted}


def assert_gradients_match(fast: nn.Module, reference: nn.Module, oracle: nn.Module) -> None:
    """Every gradient of ``fast`` is at most twice as far from the float64 oracle as Hugging Face's, and a rounding.

    The rounding is relative to the largest gradient of the model: that of a key bias is zero in exact arithmetic, the
    sum of terms that aren't.
    """
    exact = {path: p.grad for path, p in oracle.named_parameters()}
    largest = max(grad.abs().max().item() for grad in exact.values() if grad is not None)
    assert largest > 0
    for (path, p), (_, q) in zip(fast.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            error, allowed = ((x.grad.double() - exact[path]).abs().max().item() for x in (p, q))
            # Of a few numbers Hugging Face may have the exact ones by luck: then four rounding steps, as elsewhere.
            steps = 4 if p.numel() <= 8 else 1
            assert error <= 2 * allowed + steps * torch.finfo(p.dtype).eps * largest, path


def bert(model: nn.Module) -> fastbert.BertModel:
    """The ``BertModel`` inside a model."""
    return next(module for module in model.modules() if isinstance(module, fastbert.BertModel))


def assert_packed(model: nn.Module) -> None:
    """Fail unless the last forward of ``model`` was packed: a test of the fused path must have run it."""
    assert bert(model).route == "packed"
