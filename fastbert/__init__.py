"""A performance-optimised BERT for PyTorch: a drop-in replacement for Hugging Face's ``BertModel`` and its heads.

``from fastbert import BertModel`` instead of ``from transformers import BertModel``; or :func:`accelerate` on a model
that is already loaded; or :func:`patch` in front of code that can't be edited. :func:`explain` tells what runs where
and why; :func:`cuda_graphs` takes the host out of small batches on a GPU. The fused operations themselves are in
:mod:`fastbert.ops`.
"""

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
