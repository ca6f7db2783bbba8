"""fastbert's models against Hugging Face's with the same weights: outputs, losses, gradients."""

import copy

import pytest
import torch
import transformers
from models import twins

import fastbert

MASKS = ("none", "full", "right", "left", "holes")
HEAD_OUTPUTS = ("loss", "logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits")


def assert_same_hidden(reference, fast, inputs, tolerance=twins.TOLERANCE):
    with torch.no_grad():
        expected, actual = reference(**inputs), fast(**inputs)
    where = twins.valid(inputs)
    assert torch.isfinite(expected.last_hidden_state[where]).all()
    difference = (expected.last_hidden_state - actual.last_hidden_state)[where].abs().max()
    assert difference <= tolerance
    return expected, actual


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks_case_1(kind, dtype):
    reference, fast = twins.twins()
    reference.pooler = fast.pooler = None
    inputs = twins.batch(kind=kind)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    _, actual = assert_same_hidden(reference, fast, inputs)
    twins.assert_packed(fast)
    assert (actual.last_hidden_state[~twins.valid(inputs)] == 0).all()


@pytest.mark.parametrize("kind", MASKS)
def test_pooled_output(kind):
    reference, fast = twins.twins()
    expected, actual = assert_same_hidden(reference, fast, twins.batch(kind=kind))
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    assert (fast.route == "packed") == (kind != "left")


def test_no_mask_reaches_padding_case_2():
    reference, fast = twins.twins()
    inputs = twins.batch()
    padding = ~twins.valid(inputs)
    _, clean = assert_same_hidden(reference, fast, inputs)
    inputs["input_ids"] = torch.where(padding, 7, inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).last_hidden_state, clean.last_hidden_state, atol=0, rtol=0)
    embeds = reference.embeddings.word_embeddings(inputs.pop("input_ids"))
    expected = fast(inputs_embeds=embeds, **inputs).last_hidden_state
    poisoned = embeds.detach().masked_fill(padding.unsqueeze(-1), float("nan")).requires_grad_()
    actual = fast(inputs_embeds=poisoned, **inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    actual.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fast.encoder.parameters())
    assert torch.isfinite(poisoned.grad).all()


@pytest.mark.parametrize("all_rows", [False, True])
def test_fully_masked_row_case_3(all_rows):
    reference, fast = twins.twins()
    inputs = twins.batch()
    inputs["attention_mask"][slice(None) if all_rows else 2] = 0
    outputs = fast(**inputs)
    twins.assert_packed(fast)
    assert (outputs.last_hidden_state[2] == 0).all()
    assert torch.isfinite(outputs.pooler_output).all()
    (outputs.last_hidden_state.sum() + outputs.pooler_output.sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in fast.parameters())
    if not all_rows:
        assert_same_hidden(reference, fast, inputs)


def test_alone_and_in_a_batch_case_8():
    _, fast = twins.twins()
    inputs = twins.batch(32, 60)
    with torch.no_grad():
        together = fast(**inputs).last_hidden_state
        for row in (0, 7, 31):
            length = int(inputs["attention_mask"][row].sum())
            alone = fast(
                inputs["input_ids"][row : row + 1, :length],
                token_type_ids=inputs["token_type_ids"][row : row + 1, :length],
            )
            torch.testing.assert_close(alone.last_hidden_state[0], together[row, :length], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seqlen", [1, 2, 15, 16, 17, 127, 128, 129, 511, 512])
def test_sequence_lengths_case_9(seqlen):
    assert_same_hidden(*twins.twins(), twins.batch(3, seqlen))


@pytest.mark.parametrize("head_size", [16, 32, 40, 59, 64, 80, 96, 128])
def test_head_sizes_case_10(head_size):
    changes = {"hidden_size": 2 * head_size, "num_attention_heads": 2}
    assert_same_hidden(*twins.twins(**changes), twins.batch())


@pytest.mark.parametrize(
    "hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "gelu_fast", "relu", "silu"]
)
@pytest.mark.parametrize("grad", [False, True])
def test_activations_case_24(hidden_act, grad):
    reference, fast = twins.twins(hidden_act=hidden_act)
    inputs = twins.batch()
    with torch.set_grad_enabled(grad):
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual[twins.valid(inputs)], expected[twins.valid(inputs)], atol=1e-5, rtol=0)
    assert (fast.encoder.layer[0].intermediate.unfused() is None) == hidden_act.startswith("gelu")


@pytest.mark.parametrize("hidden_states", [True, [0, -1]])
@pytest.mark.parametrize("return_dict", [True, False])
def test_output_hidden_states_case_37(hidden_states, return_dict):
    reference, fast = twins.twins()
    inputs = {**twins.batch(), "output_hidden_states": hidden_states, "return_dict": return_dict}
    with torch.no_grad():
        expected, actual = reference(**inputs), fast(**inputs)
    twins.assert_packed(fast)
    assert type(actual) is type(expected)
    assert len(actual) == len(expected)
    expected, actual = expected[2], actual[2]
    # Of chosen states, transformers 5.17 leaves the last one out.
    assert len(actual) == len(expected) >= (3 if hidden_states is True else 2)
    where = twins.valid(inputs)
    for left, right in zip(actual, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left[where], right[where], atol=1e-5, rtol=0)


def test_output_attentions_case_37():
    reference, fast = twins.twins(attn_implementation="eager")
    inputs = {**twins.batch(), "output_attentions": True}
    with torch.no_grad():
        expected, actual = reference(**inputs), fast(**inputs)
    assert fast.route != "packed"
    assert len(actual.attentions) == 2
    for left, right in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", twins.HEADS)
@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
def test_heads(name, kind):
    reference, fast = twins.twins(name, problem_type=None)
    inputs = twins.head_batch(name, kind)
    expected, actual = reference(**inputs), fast(**inputs)
    padded_way = (kind == "left" and twins.bert(fast).pooler is not None) or (
        name == "BertForQuestionAnswering" and kind != "none"
    )
    assert (twins.bert(fast).route == "packed") == (not padded_way)
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    for key in HEAD_OUTPUTS:
        if key in expected:
            left, right = actual[key], expected[key]
            if left.dim() == 3:
                left, right = left[twins.valid(inputs)], right[twins.valid(inputs)]
            torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)
    oracle = copy.deepcopy(reference).double()
    for loss in (expected.loss, actual.loss, oracle(**inputs).loss):
        loss.backward()
    twins.assert_gradients_match(fast, reference, oracle)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_on_padding_count_as_in_hugging_face(name):
    reference, fast = twins.twins(name)
    inputs = twins.head_batch(name)
    inputs["labels"] = inputs["labels"].clamp(min=0)
    torch.testing.assert_close(fast(**inputs).loss, reference(**inputs).loss, atol=1e-5, rtol=1e-5)
    assert twins.bert(fast).route != "packed"


def test_position_ids():
    reference, fast = twins.twins()
    inputs = twins.batch()
    inputs["position_ids"] = torch.arange(37).flip(0).unsqueeze(0)
    assert_same_hidden(reference, fast, inputs)
    inputs["position_ids"] = torch.randint(0, 600, (5, 37))
    assert_same_hidden(reference, fast, inputs)


def test_inputs_embeds():
    reference, fast = twins.twins()
    inputs = twins.batch()
    embeds = torch.randn(5, 37, 64)
    with torch.no_grad():
        expected = reference(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        actual = fast(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    where = twins.valid(inputs)
    torch.testing.assert_close(actual.last_hidden_state[where], expected.last_hidden_state[where], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"vocab_size": 21128}, {"vocab_size": 119547, "type_vocab_size": 2}])
def test_chinese_and_multilingual_vocabularies(changes):
    reference, fast = twins.twins(**changes)
    assert_same_hidden(reference, fast, twins.batch(vocab_size=changes["vocab_size"]))


def test_int32_ids_case_16():
    reference, fast = twins.twins()
    inputs = twins.batch()
    ids = {name: inputs[name].int() for name in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        expected = reference(**inputs).last_hidden_state
        actual = fast(**{**inputs, **ids}).last_hidden_state
    torch.testing.assert_close(actual[twins.valid(inputs)], expected[twins.valid(inputs)], atol=1e-5, rtol=0)


def test_packed_row_of_sequences():
    _, fast = twins.twins()
    inputs = twins.batch()
    where = twins.valid(inputs)
    cu_seqlens = torch.nn.functional.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0)).int()
    with torch.no_grad():
        expected = fast(**inputs).last_hidden_state[where]
        row = {name: inputs[name][where].unsqueeze(0) for name in ("input_ids", "token_type_ids")}
        actual = fast(**row, cu_seq_lens_q=cu_seqlens, max_length_q=37).last_hidden_state
    torch.testing.assert_close(actual[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_twice_hugging_face(dtype):
    reference, fast = twins.twins(initializer_range=0.1)
    inputs = twins.batch()
    where = twins.valid(inputs)
    with torch.no_grad():
        oracle = reference(**inputs).last_hidden_state[where]
        error_reference = (reference.to(dtype)(**inputs).last_hidden_state[where] - oracle).abs().max()
        output = fast.to(dtype)(**inputs).last_hidden_state
        assert output.dtype == dtype
        error_fast = (output[where] - oracle).abs().max()
    assert error_fast <= 2 * error_reference + torch.finfo(dtype).eps * oracle.abs().max()


def test_twelve_layers_stay_within_section_6():
    changes = {"num_hidden_layers": 12, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    assert_same_hidden(*twins.twins(**changes, initializer_range=0.05), twins.batch(8, 64))


def test_same_names_signatures_and_configuration():
    import inspect

    for name in ("BertModel", "BertLMHeadModel", *twins.HEADS):
        stock, fast = getattr(transformers, name), getattr(fastbert, name)
        assert fast.__name__ == name
        assert issubclass(fast, stock)
        assert list(inspect.signature(fast.forward).parameters) == list(inspect.signature(stock.forward).parameters)
    assert fastbert.BertConfig is transformers.BertConfig
    assert fastbert.BertPreTrainedModel is transformers.BertPreTrainedModel


@pytest.mark.parametrize("name", ["BertModel", *twins.HEADS])
def test_checkpoints_go_both_ways(name, tmp_path):
    reference, fast = twins.twins(name)
    stock = getattr(transformers, name)
    reference.save_pretrained(tmp_path / "stock")
    fast.save_pretrained(tmp_path / "fast")
    loaded_fast, info = getattr(fastbert, name).from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded_stock = stock.from_pretrained(tmp_path / "fast")
    for key, value in reference.state_dict().items():
        assert torch.equal(value, loaded_fast.state_dict()[key])
        assert torch.equal(value, loaded_stock.state_dict()[key])
    assert loaded_fast.config.architectures == [name]


@pytest.mark.parametrize("padding", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 9, 10, 11, 16, 17])
def test_left_padding_under_a_pooler(length, padding):
    """The pooler reads the first position: where that is padding in any row, the batch stays padded, however short."""
    reference, fast = twins.twins()
    inputs = twins.batch(3, length + padding, "none")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :padding] = 0
    with torch.no_grad():
        expected, found = reference(**inputs), fast(**inputs)
    assert fast.route == "the head or the pooler uses the states of padded positions"
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
