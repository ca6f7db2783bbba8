"""The names of ``fastbert``. To import them registers the ops with torch, and "fastbert" with transformers."""

from transformers import BertConfig, BertPreTrainedModel

from fastbert import ops
from fastbert._version import __version__
from fastbert.backends.select import UnsupportedError
from fastbert.models import interface
from fastbert.models.bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)
from fastbert.models.convert import accelerate, patch, patched, refresh, unpatch
from fastbert.models.explain import explain
from fastbert.models.graphs import cuda_graphs
from fastbert.models.masked_autoencoder import BertForMaskedAutoencoding

interface.register()

__all__ = [
    "BertConfig",
    "BertForMaskedAutoencoding",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "BertPreTrainedModel",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "cuda_graphs",
    "explain",
    "ops",
    "patch",
    "patched",
    "refresh",
    "unpatch",
]
