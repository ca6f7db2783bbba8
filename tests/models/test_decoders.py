"""Case 38: decoders, cross-attention, caches and ``generate`` give Hugging Face's results."""

import pytest
import torch
import transformers
from models import twins

import fastbert

DECODER = {"is_decoder": True, "pad_token_id": 0}


def left_padded(batch_size=4, seqlen=9):
    inputs = twins.batch(batch_size, seqlen, "left")
    del inputs["token_type_ids"]
    return inputs


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
def test_causal_outputs_and_gradients(kind):
    reference, fast = twins.twins("BertLMHeadModel", **DECODER)
    inputs = twins.batch(kind=kind)
    labels = inputs["input_ids"].masked_fill(~twins.valid(inputs), -100)
    expected, actual = reference(**inputs, labels=labels), fast(**inputs, labels=labels)
    assert twins.bert(fast).route == "the model is a decoder, which attends to the past only"
    where = twins.valid(inputs)
    torch.testing.assert_close(actual.logits[where], expected.logits[where], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    oracle = twins.twins("BertLMHeadModel", **DECODER)[0].double()
    for loss in (expected.loss, actual.loss, oracle(**inputs, labels=labels).loss):
        loss.backward()
    twins.assert_gradients_match(fast, reference, oracle)


def test_cache_gives_what_the_whole_sequence_gives():
    reference, fast = twins.twins("BertLMHeadModel", **DECODER)
    ids = twins.batch(3, 12, "none")["input_ids"]
    with torch.no_grad():
        expected = reference(ids).logits
        first = fast(ids[:, :7], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for place in range(7, 12):
            step = fast(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str)
def test_generate(options):
    reference, fast = twins.twins("BertLMHeadModel", **DECODER)
    generated = []
    for model in (reference, fast):
        torch.manual_seed(0)
        generated.append(model.generate(**left_padded(), max_new_tokens=15, **options))
    assert torch.equal(*generated)
    assert generated[0].shape == (4, 24)


def test_cross_attention():
    changes = {**DECODER, "add_cross_attention": True}
    reference, fast = twins.twins("BertLMHeadModel", **changes)
    inputs = twins.batch(4, 9)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, 13, 64, generator=generator)
    mask = twins.mask("right", 4, 13)
    with torch.no_grad():
        expected, actual = (
            model(**inputs, encoder_hidden_states=states, encoder_attention_mask=mask).logits
            for model in (reference, fast)
        )
        ignored = fast(**inputs, encoder_hidden_states=states + 1, encoder_attention_mask=mask).logits
    where = twins.valid(inputs)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=1e-5)
    assert (actual - ignored)[where].abs().max() > 1e-3


def encoder_decoders(folder):
    """(Hugging Face's, fastbert's after ``patch``) of one checkpoint with random cross-attention."""
    encoder, _ = twins.twins("BertModel")
    decoder, _ = twins.twins("BertLMHeadModel", seed=1, add_cross_attention=True, **DECODER)
    whole = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    whole.generation_config.update(decoder_start_token_id=1, pad_token_id=0)
    whole.config.decoder_start_token_id = 1
    whole.config.pad_token_id = 0
    whole.save_pretrained(folder)

    def load():
        return transformers.EncoderDecoderModel.from_pretrained(folder).eval()

    reference = load()
    with fastbert.patched():
        fast = load()
    assert type(reference.encoder) is transformers.BertModel
    assert type(fast.encoder) is fastbert.BertModel
    assert type(fast.decoder) is fastbert.BertLMHeadModel
    return reference, fast


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
def test_encoder_decoder(kind, tmp_path):
    reference, fast = encoder_decoders(tmp_path)
    inputs = twins.batch(kind=kind)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(1, 101, (5, 8), generator=generator)
    labels[0, 5:] = -100
    decoder_mask = (labels != -100).long()
    everything = {**inputs, "labels": labels, "decoder_attention_mask": decoder_mask}
    expected, actual = reference(**everything), fast(**everything)
    assert fast.encoder.route == "packed"
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    where = decoder_mask.bool()
    torch.testing.assert_close(actual.logits[where], expected.logits[where], atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    for (path, p), (_, q) in zip(fast.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=path)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_encoder_decoder_generates(options, tmp_path):
    reference, fast = encoder_decoders(tmp_path)
    inputs = twins.batch()
    del inputs["token_type_ids"]
    expected, actual = (m.generate(**inputs, max_new_tokens=12, **options) for m in (reference, fast))
    assert fast.encoder.route == "packed"
    assert torch.equal(actual, expected)


def test_accelerated_encoder_decoder(tmp_path):
    reference, _ = encoder_decoders(tmp_path)
    inputs = twins.batch()
    with torch.no_grad():
        expected = reference(**inputs, decoder_input_ids=inputs["input_ids"]).logits
        fast = fastbert.accelerate(reference, strict=True)
        actual = fast(**inputs, decoder_input_ids=inputs["input_ids"]).logits
    assert fast.encoder.route == "packed"
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
