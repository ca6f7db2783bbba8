"""The masked autoencoder against Hugging Face's BERT, one sequence after the other, without a mask or padding."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import twins
from transformers import BertModel as HuggingFaceModel

import fastbert
from fastbert.models import masked_autoencoder

KINDS = ("none", "right", "left", "holes")


def autoencoder(seed=0, **changes):
    torch.manual_seed(seed)
    model = fastbert.BertForMaskedAutoencoding(twins.config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch(kind="right", seed=0, ratio=0.4):
    inputs = twins.batch(kind=kind, seed=seed)
    valid = twins.valid(inputs)
    hidden = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) < ratio
    # One sequence keeps everything, and of another nothing is left to see.
    hidden[1] = False
    hidden[2] = True
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~(hidden & valid), -100)}


def oracle(model, inputs):
    """(loss, logits) in float64, with gradients in the parameters of ``model``."""
    encoder, decoder = (hugging_face(part) for part in (model.bert, model.decoder))
    mask_token = decoder.embeddings.word_embeddings.weight[0]
    labels, valid = inputs["labels"], twins.valid(inputs)
    logits = []
    for row in range(len(labels)):
        places = valid[row].nonzero().squeeze(1)
        seen = places[labels[row, places] == -100]
        shown = mask_token.expand(len(places), -1)
        if len(seen):
            states = encoder(
                inputs["input_ids"][row, seen][None],
                token_type_ids=inputs["token_type_ids"][row, seen][None],
                position_ids=seen[None],
            ).last_hidden_state[0]
            shown = shown.index_copy(0, torch.searchsorted(places, seen), model.to_decoder(states))
        states = decoder(
            inputs_embeds=shown[None],
            token_type_ids=inputs["token_type_ids"][row, places][None],
            position_ids=places[None],
        ).last_hidden_state[0]
        logits.append(model.predictions(model.from_decoder(states[labels[row, places] != -100])))
    logits = torch.cat(logits)
    return F.cross_entropy(logits, labels[labels != -100]), logits


def hugging_face(bert):
    """Hugging Face's model with the very parameters of ``bert``."""
    copied = HuggingFaceModel(copy.deepcopy(bert.config), add_pooling_layer=False).double()
    for path, parameter in bert.named_parameters():
        parent, _, name = path.rpartition(".")
        copied.get_submodule(parent)._parameters[name] = parameter
    return copied.train(bert.training)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_logits_and_gradients(kind):
    model, inputs = autoencoder().double(), batch(kind)
    out = model(**inputs)
    out.loss.backward()
    actual = {path: p.grad for path, p in model.named_parameters()}
    model.zero_grad()
    loss, logits = oracle(model, inputs)
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.logits, logits)
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for path, parameter in model.named_parameters():
        assert (actual[path] is None) == (parameter.grad is None), path
        if parameter.grad is not None:
            torch.testing.assert_close(actual[path], parameter.grad, rtol=0, atol=1e-12 * largest, msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_both_halves_are_packed(kind):
    model = autoencoder().eval()
    model(**batch(kind))
    assert model.bert.route == model.decoder.route == "packed"


def test_what_is_masked_is_not_looked_at():
    model, inputs = autoencoder().eval(), batch()
    expected = model(**inputs).logits
    scrambled = torch.where(inputs["labels"] == -100, inputs["input_ids"], 7)
    torch.testing.assert_close(model(**{**inputs, "input_ids": scrambled}).logits, expected, rtol=0, atol=0)


def test_the_encoder_gets_visible_tokens_only():
    model, inputs = autoencoder().eval(), batch()
    pack = model.bert._pack
    sizes = []

    def counted(*args):
        packed, reason = pack(*args)
        sizes.append(packed.indices.numel())
        return packed, reason

    model.bert._pack = counted
    model(**inputs)
    assert sizes == [int((twins.valid(inputs) & (inputs["labels"] == -100)).sum())]


def test_masked_without_labels_gives_logits():
    model, inputs = autoencoder().eval(), batch()
    labels = inputs.pop("labels")
    out = model(**inputs, masked=labels != -100)
    assert out.loss is None
    torch.testing.assert_close(out.logits, model(**inputs, labels=labels).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_labels_at_some_of_the_masked_places(dtype):
    """The others are predicted too, and cost nothing."""
    model, inputs = autoencoder().eval(), batch()
    masked = inputs["labels"] != -100
    labels = inputs["labels"].clone()
    labels[:, ::2] = -100
    found = model(**{**inputs, "labels": labels}, masked=masked.to(dtype))
    expected = model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, F.cross_entropy(expected.logits, labels[masked]))


def test_dropout_and_checkpointing_give_the_same_gradients():
    model = autoencoder(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_saved_loaded_and_handed_over(tmp_path):
    model, inputs = autoencoder().eval(), batch()
    model.save_pretrained(tmp_path)
    again = fastbert.BertForMaskedAutoencoding.from_pretrained(tmp_path)
    assert again.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    del inputs["labels"]
    wanted = model.bert(**inputs).last_hidden_state
    for kind in (fastbert.BertModel, HuggingFaceModel):
        encoder, report = kind.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
        assert not report["missing_keys"]
        found = encoder.eval()(**inputs).last_hidden_state
        valid = twins.valid(inputs)
        torch.testing.assert_close(found[valid], wanted[valid], rtol=0, atol=twins.TOLERANCE)


def test_an_encoder_is_taken_over(tmp_path):
    _, bert = twins.twins("BertModel")
    bert.save_pretrained(tmp_path)
    model, report = fastbert.BertForMaskedAutoencoding.from_pretrained(tmp_path, output_loading_info=True)
    assert not [key for key in report["missing_keys"] if key.startswith("bert.")]
    weight = "encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(model.bert.get_parameter(weight), bert.get_parameter(weight), rtol=0, atol=0)


def test_decoder_sizes():
    model = autoencoder(decoder_num_hidden_layers=1, decoder_hidden_size=48, decoder_num_attention_heads=3)
    assert len(model.decoder.encoder.layer) == 1
    assert model.to_decoder.out_features == 48
    assert model.config.decoder_intermediate_size == 192
    assert model.decoder.config.num_attention_heads == 3
    assert autoencoder().decoder.config.num_attention_heads == 2
    layer = autoencoder(decoder_intermediate_size=40).decoder.encoder.layer[0]
    assert layer.intermediate.dense.out_features == 40
    # One head at least, of however few features.
    assert autoencoder(decoder_hidden_size=8).decoder.config.num_attention_heads == 1


def test_the_decoder_knows_one_word():
    """It is learnt: no id of it is padding."""
    decoder = autoencoder().decoder
    words = decoder.embeddings.word_embeddings
    assert words.weight.shape == (1, 32)
    assert words.padding_idx is None


def test_forms_of_the_output():
    model, inputs = autoencoder().eval(), batch()
    loss, logits = model(**inputs, return_dict=False)
    found = model(**inputs)
    assert torch.equal(found.loss, loss)
    assert torch.equal(found.logits, logits)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)
    assert torch.equal(model(**inputs, return_dict=True).logits, logits)


def test_positions_of_ones_own():
    model, inputs = autoencoder().eval(), batch()
    places = torch.arange(37)[None]
    assert torch.equal(model(**inputs, position_ids=places).logits, model(**inputs).logits)
    assert not torch.allclose(model(**inputs, position_ids=places + 1).logits, model(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "neither labels nor masked is given"),
        ({"masked": torch.zeros(5, 37, dtype=torch.bool)}, "a place that masked doesn't mark"),
        ({"masked": torch.zeros(5, 36, dtype=torch.bool)}, r"masked has shape \(5, 36\), and input_ids"),
        ({"labels": torch.zeros(5, 36).long()}, r"labels has shape \(5, 36\), and input_ids"),
        ({"labels": None, "masked": torch.ones(5, 36, dtype=torch.bool)}, r"masked has shape \(5, 36\), and input_ids"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder()(**{**batch(), **changes})


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="decoder_hidden_size is 50, no multiple of decoder_num_attention_heads"):
        autoencoder(decoder_hidden_size=50, decoder_num_attention_heads=4)


@pytest.mark.parametrize("features", [7, 8])
def test_positions_are_sinusoids(features):
    """Vaswani et al., arXiv:1706.03762, section 3.5."""
    found = masked_autoencoder._sinusoids(50, features)
    assert found.shape == (50, features)
    for position in (0, 1, 49):
        for feature in range(features):
            angle = position / 10000 ** (2 * (feature // 2) / features)
            expected = math.cos(angle) if feature % 2 else math.sin(angle)
            assert float(found[position, feature]) == pytest.approx(expected, abs=1e-5)


def test_a_masked_token_in_padding_is_computed_as_in_hugging_face():
    """Its state is read, so that the batch of the decoder stays padded."""
    model, inputs = autoencoder().eval(), batch()
    inputs["labels"][0, -1] = 7
    assert not inputs["attention_mask"][0, -1]
    model(**inputs)
    assert model.decoder.route == "the head or the pooler uses the states of padded positions"
    assert model.bert.route == "packed"


def test_the_vocabulary_can_grow():
    model = autoencoder()
    model.resize_token_embeddings(107)
    assert model.get_output_embeddings().weight is model.bert.embeddings.word_embeddings.weight
    assert model.predictions.bias is model.predictions.decoder.bias
    assert model.predictions.bias.shape == (107,)
    assert model(**batch()).logits.shape[1] == 107


def test_another_product_with_the_vocabulary():
    model, other = autoencoder(), torch.nn.Linear(64, 107)
    model.set_output_embeddings(other)
    assert model.get_output_embeddings() is other
    assert model.predictions.bias is other.bias
