"""A BERT's configuration, refused where it describes none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers.activations import ACT2FN

from fastbert.cli.errors import Refusal

# A sequence has [CLS] and [SEP] at least.
_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 2,
    "type_vocab_size": 1,
    "chunk_size_feed_forward": 0,
}
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_FINITE = ("layer_norm_eps", "initializer_range")


def make(values: Mapping[str, Any], name: str) -> transformers.BertConfig:
    """The configuration that a JSON object describes, which is called ``name`` in a refusal.

    Raises:
        Refusal: a value is of another type, or no BERT has it.
    """
    try:
        config = transformers.BertConfig.from_dict(dict(values))
    except Exception as error:  # transformers looks into values of any type before it checks them
        raise Refusal(f"{name} isn't valid: {' '.join(str(error).split())}") from error
    for problem in _problems(config):
        raise Refusal(f"{name} isn't valid: {problem}")
    # The commands read outputs by name.
    config.return_dict = True
    return config


def parameters(config: transformers.BertConfig) -> int:
    """How many parameters the encoder's tables and matrices have."""
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return rows * config.hidden_size + config.num_hidden_layers * layer


def _problems(config: transformers.BertConfig) -> Iterator[str]:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value < least:
            yield f"{name} is {value}; it must be {least} or more"
    for name in _FINITE:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            yield f"{name} is {value}; it must be a finite number from 0 on"
    for name in _PROBABILITIES:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            yield f"{name} is {value}; it must be from 0 to 1"
    if config.hidden_size % config.num_attention_heads:
        yield (
            f"hidden_size is {config.hidden_size}, no multiple of num_attention_heads, which is "
            f"{config.num_attention_heads}"
        )
    if config.hidden_act not in ACT2FN:
        yield f"hidden_act is {config.hidden_act}; it must be one of {', '.join(sorted(ACT2FN))}"
    # Torch counts a negative one from the end.
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        yield f"pad_token_id is {config.pad_token_id}; it must be less than vocab_size, which is {config.vocab_size}"
