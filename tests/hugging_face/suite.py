"""A BERT for Hugging Face's common model tests; ``test_common.py`` puts this file next to them and runs it.

The sdist of transformers has the common tests, and neither the BERT that they run on nor some modules that they import.
Both are here. The environment variable ``FASTBERT_SUITE`` says whose classes are tested: "stock" or "fastbert".
"""

import gc
import os
import random
import sys
import types
import unittest

import torch
import transformers

import fastbert


class GenerationTesterMixin:
    """Stands in for a class that the sdist lacks; ``generate`` is compared in ``models/test_libraries.py``."""


class ExportTesterMixin:
    """Stands in for a class that the sdist lacks."""


def _provide(module_name, **members):
    module = types.ModuleType(module_name)
    vars(module).update(members)
    sys.modules[module_name] = module


_provide("tests.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
_provide("tests.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
_provide(
    "tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 3,
        "architectures": ["BertModel"],
        "id2label": {0: "no", 1: "yes", 2: "perhaps"},
        "label2id": {"no": 0, "yes": 1, "perhaps": 2},
        "problem_type": "regression",
    },
)

import tests.test_modeling_common as common  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# Common tests write each tensor into the message of an assertion, whether it fails or not: a few numbers are enough.
torch.set_printoptions(threshold=4, edgeitems=1)

# What is imported stays; it needn't be looked through for garbage.
gc.freeze()

FAST = os.environ["FASTBERT_SUITE"] == "fastbert"
if FAST:
    fastbert.patch()


class TinyBert:
    """The attributes and methods that the common tests ask of a model's description."""

    is_training = True
    batch_size = 5
    seq_length = 8
    num_choices = 3
    vocab_size = 97
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, is_decoder=False):
        self.is_decoder = is_decoder

    @property
    def causal_lm_class(self):
        return transformers.BertLMHeadModel

    def get_config(self):
        return transformers.BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=44,
            max_position_embeddings=80,
            type_vocab_size=3,
            is_decoder=self.is_decoder,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        return self.get_config(), {
            "input_ids": common.ids_tensor(shape, self.vocab_size),
            "token_type_ids": common.ids_tensor(shape, 3),
            "attention_mask": common.random_attention_mask(shape),
        }


class BertTest(common.ModelTesterMixin, TrainingTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_tester = TinyBert()
    all_model_classes = (
        transformers.BertModel,
        transformers.BertLMHeadModel,
        transformers.BertForMaskedLM,
        transformers.BertForMultipleChoice,
        transformers.BertForNextSentencePrediction,
        transformers.BertForPreTraining,
        transformers.BertForQuestionAnswering,
        transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification,
    )

    def setUp(self):
        transformers.set_seed(0)
        common.global_rng = random.Random(0)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__ == "BertForPreTraining":
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = torch.zeros(self.model_tester.batch_size, dtype=torch.int64)
        return inputs

    def test_configuration(self):
        ConfigTester(self, config_class=transformers.BertConfig, hidden_size=36).run_common_tests()

    def test_classes_under_test(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            assert model_class.__module__.split(".")[0] == ("fastbert" if FAST else "transformers")
        model = transformers.AutoModel.from_config(config).eval()
        model(**inputs)
        packed = getattr(model, "route", None) == "packed"
        assert packed == (FAST and not config.is_decoder)


class BertDecoderTest(BertTest):
    model_tester = TinyBert(is_decoder=True)
    all_model_classes = (transformers.BertModel, transformers.BertLMHeadModel)
