"""Vocabulary logits at labelled positions only: the same loss and gradients as with all of them."""

import pytest
import torch
from models import twins

import fastbert

HEADS = ("BertForMaskedLM", "BertForPreTraining")


def labelled(name, share=0.3, **changes):
    inputs = twins.batch(**changes)
    generator = torch.Generator().manual_seed(5)
    chosen = (torch.rand(inputs["input_ids"].shape, generator=generator) < share) & inputs["attention_mask"].bool()
    labels = torch.randint(101, chosen.shape, generator=generator)
    inputs["labels"] = torch.where(chosen, labels, -100)
    if name == "BertForPreTraining":
        inputs["next_sentence_label"] = torch.arange(len(labels)) % 2
    return inputs


def logits(output):
    return output["prediction_logits" if "prediction_logits" in output else "logits"]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["full", "right", "left"])
def test_loss_and_gradients_are_those_of_all_positions(name, kind):
    theirs, ours = twins.twins(name)
    ours.sparse_prediction = True
    inputs = labelled(name, kind=kind)
    outputs = [model(**inputs) for model in (theirs, ours)]
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(outputs[1]), logits(outputs[0])[inputs["labels"] != -100], atol=2e-5, rtol=1e-4)
    assert outputs[1].keys() == outputs[0].keys()
    if name == "BertForPreTraining":
        expected, actual = (output.seq_relationship_logits for output in outputs)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    for (path, expected), actual in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, path=path: f"{path}: {m}"
        )


@pytest.mark.parametrize("name", HEADS)
def test_a_label_on_padding_counts(name):
    theirs, ours = twins.twins(name)
    ours.sparse_prediction = True
    inputs = labelled(name)
    inputs["labels"][0, -1] = 7
    assert not inputs["attention_mask"][0, -1]
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_it_is_off_unless_asked_for_and_without_labels(name):
    _, ours = twins.twins(name)
    inputs = labelled(name)
    assert logits(ours(**inputs)).shape == (5, 37, 101)
    ours.sparse_prediction = True
    assert not type(ours).sparse_prediction
    given = {key: value for key, value in inputs.items() if "label" not in key}
    assert logits(ours(**given)).shape == (5, 37, 101)


@pytest.mark.parametrize("name", HEADS)
def test_outputs_as_a_tuple_and_hidden_states(name):
    _, ours = twins.twins(name)
    ours.sparse_prediction = True
    inputs = labelled(name)
    whole = ours(**inputs, output_hidden_states=True)
    assert len(whole.hidden_states) == 3
    loss, scores, *_ = ours(**inputs, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(scores, logits(whole))


def test_positional_labels():
    _, ours = twins.twins("BertForMaskedLM")
    ours.sparse_prediction = True
    inputs = labelled("BertForMaskedLM")
    by_name = ours(**inputs).loss
    names = ("input_ids", "attention_mask", "token_type_ids")
    by_place = ours(*(inputs[name] for name in names), None, None, None, None, inputs["labels"]).loss
    assert torch.equal(by_name, by_place)


def test_one_label_of_two_gives_no_loss_as_in_hugging_face():
    theirs, ours = twins.twins("BertForPreTraining")
    ours.sparse_prediction = True
    inputs = labelled("BertForPreTraining")
    del inputs["next_sentence_label"]
    assert theirs(**inputs).loss is None
    assert ours(**inputs).loss is None


def test_no_labelled_position_is_what_hugging_face_makes_of_it():
    theirs, ours = twins.twins("BertForMaskedLM")
    ours.sparse_prediction = True
    inputs = labelled("BertForMaskedLM", share=0.0)
    assert theirs(**inputs).loss.isnan()
    assert ours(**inputs).loss.isnan()
    assert ours(**inputs).logits.shape == (0, 101)


def test_only_memory_of_labelled_positions_is_kept():
    _, ours = twins.twins("BertForMaskedLM")
    assert isinstance(ours, fastbert.BertForMaskedLM)
    kept = {}
    for sparse in (False, True):
        ours.sparse_prediction = sparse
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.shape), x)[1], lambda x: x
        ):
            ours(**labelled("BertForMaskedLM"))
        kept[sparse] = sum(shape[-1] == 101 and shape.numel() for shape in sizes if len(shape) > 1)
    assert kept[True] < 0.35 * kept[False]
