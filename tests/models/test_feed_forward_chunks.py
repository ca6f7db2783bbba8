"""``chunk_size_feed_forward`` on packed tokens."""

import pytest
import torch
from models import twins

CHUNKED = {"chunk_size_feed_forward": 3}


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("gradients", [False, True])
def test_chunks_change_nothing(kind, gradients):
    reference, fast = twins.twins(**CHUNKED)
    inputs = twins.batch(seqlen=36, kind=kind)
    where = twins.valid(inputs)
    with torch.set_grad_enabled(gradients):
        expected, actual = reference(**inputs).last_hidden_state, fast(**inputs).last_hidden_state
    twins.assert_packed(fast)
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=0)


def test_a_chunk_is_as_many_tokens_as_in_hugging_face():
    _, fast = twins.twins(num_hidden_layers=1, **CHUNKED)
    sizes = []
    fast.encoder.layer[0].intermediate.forward = record(fast.encoder.layer[0].intermediate, sizes)
    inputs = twins.batch(5, 36)
    fast(**inputs)
    assert max(sizes) == 3 * 5
    assert sum(sizes) == int(inputs["attention_mask"].sum())


def record(module, sizes):
    forward = module.forward

    def recording(x):
        sizes.append(x.shape[0])
        return forward(x)

    return recording


def test_chunks_draw_different_dropout_masks():
    _, fast = twins.twins(num_hidden_layers=1, hidden_dropout_prob=0.5, **CHUNKED)
    fast.train()
    layer = fast.encoder.layer[0]
    # With these, what the layer adds to its input is dropout and nothing else.
    with torch.no_grad():
        for parameter in (layer.output.dense.weight, layer.attention.output.dense.weight):
            parameter.zero_()
        layer.output.dense.bias.fill_(100.0)
    states = fast(twins.batch(2, 36, "none")["input_ids"]).last_hidden_state.flatten(0, 1)
    chunks = states.split(3 * 2)
    dropped = [chunk < chunk.mean() for chunk in chunks]
    assert len(dropped) == 12
    assert all((dropped[0] != other).float().mean() > 0.3 for other in dropped[1:])


def test_chunks_draw_no_seeds_of_their_own():
    """Theirs follow from the layer's: torch's generator is where it would be without chunks."""
    states = []
    for changes in ({}, CHUNKED):
        _, fast = twins.twins(hidden_dropout_prob=0.1, **changes)
        torch.manual_seed(3)
        fast.train()(**twins.batch(seqlen=36))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
