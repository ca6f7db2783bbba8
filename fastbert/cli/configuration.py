"""A BERT's configuration, refused where it describes none."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers.utils import logging as their_logging

from fastbert.cli.errors import Refusal
from fastbert.models import upstream

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
_MOST_LABELS = 1 << 20
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
# Where transformers finds the configuration of a model's part, and then takes it for the whole.
_PARTS = ("decoder", "generator", "text_config", "text_encoder")
# How a model is shared out over devices, which transformers reads wherever it loads one.
_PLANS = ("base_model_tp_plan", "base_model_pp_plan")
_FINITE = ("layer_norm_eps", "initializer_range")


def make(values: Mapping[str, Any], name: str) -> transformers.BertConfig:
    """The configuration that a JSON object describes, which is called ``name`` in a refusal.

    Raises:
        Refusal: a value is of another type, or no BERT has it.
    """
    labels = values.get("num_labels")
    # A name is made for each, before anything else is looked at.
    if isinstance(labels, int) and labels > _MOST_LABELS:
        raise Refusal(f"{name} isn't valid: num_labels is {labels}; it must be {_MOST_LABELS} or less")
    verbosity = their_logging.get_verbosity()
    # It logs what it raises, too.
    their_logging.set_verbosity(logging.CRITICAL)
    try:
        config = transformers.BertConfig.from_dict(dict(values))
    except Exception as error:  # transformers looks into values of any type before it checks them
        raise Refusal(f"{name} isn't valid: {' '.join(str(error).split())}") from error
    finally:
        their_logging.set_verbosity(verbosity)
    for problem in _problems(config):
        raise Refusal(f"{name} isn't valid: {problem}")
    # The commands read outputs by name, and no others than the head's own.
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False
    return config


def parameters(config: transformers.BertConfig) -> int:
    """How many parameters the encoder's tables and matrices have."""
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return rows * config.hidden_size + config.num_hidden_layers * layer


def _problems(config: transformers.BertConfig) -> Iterator[str]:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if not isinstance(value, int):
            yield f"{name} is {value!r}; it must be a whole number, {least} or more"
        elif value < least:
            yield f"{name} is {value}; it must be {least} or more"
    for name in _FINITE:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            yield f"{name} is {value}; it must be a finite number from 0 on"
    for name in _PROBABILITIES:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            yield f"{name} is {value}; it must be from 0 to 1"
    for name in _PLANS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, dict):
            yield f"{name} is {value!r}; it must be an object or null"
    if config.add_cross_attention and not config.is_decoder:
        yield "add_cross_attention is true and is_decoder is not; only a decoder has cross-attention"
    for name in _PARTS:
        if getattr(config, name, None) is not None:
            yield f"it has a {name}, and a BERT has no other configuration within its own"
    if config.hidden_size % config.num_attention_heads:
        yield (
            f"hidden_size is {config.hidden_size}, no multiple of num_attention_heads, which is "
            f"{config.num_attention_heads}"
        )
    if upstream.ACT2FN is not None and config.hidden_act not in upstream.ACT2FN:
        yield f"hidden_act is {config.hidden_act}; it must be one of {', '.join(sorted(upstream.ACT2FN))}"
    # Torch counts a negative one from the end.
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        yield f"pad_token_id is {config.pad_token_id}; it must be less than vocab_size, which is {config.vocab_size}"
