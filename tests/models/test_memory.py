"""Memory: what a training step keeps for its backward, and what a failed forward leaves behind."""

import gc

import pytest
import torch
from models import twins

HIDDEN = 128


def kept(num_layers, sequences, dtype, **settings):
    """Bytes that the forward of a training step keeps beside the parameters, and its number of valid tokens."""
    model = twins.twins(
        num_hidden_layers=num_layers, hidden_size=HIDDEN, num_attention_heads=2, intermediate_size=4 * HIDDEN,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **settings,
    )[1].to(dtype).train()  # fmt: skip
    inputs = twins.batch(sequences, 40)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs).last_hidden_state.sum()
    twins.assert_packed(model)
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values()), int(inputs["attention_mask"].sum())


def kept_by_token_and_layer(dtype, **settings):
    """By differences: what doesn't grow with both isn't counted."""
    bytes_, tokens = {}, {}
    for sequences in (2, 8):
        for num_layers in (2, 4):
            bytes_[sequences, num_layers], tokens[sequences] = kept(num_layers, sequences, dtype, **settings)
    layers = {sequences: bytes_[sequences, 4] - bytes_[sequences, 2] for sequences in (2, 8)}
    return (layers[8] - layers[2]) / 2 / (tokens[8] - tokens[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_a_training_step_keeps_at_most_24_hidden_bytes(hidden_act, dtype):
    """No mask, no probabilities, no output of a GELU: x, query, key, value, context, z1, pre, z2 and statistics."""
    assert kept_by_token_and_layer(dtype, hidden_act=hidden_act) <= 24 * HIDDEN
    expected = 22 * HIDDEN + 4 * 2 + 2 * 8  # the log-sum-exp of two heads, and the mean and rstd of two LayerNorms
    assert kept_by_token_and_layer(dtype, hidden_act=hidden_act) == expected


@pytest.mark.gpu
def test_out_of_memory_then_a_smaller_batch_case_42():
    model = twins.twins(hidden_size=512, num_attention_heads=8, intermediate_size=2048)[1].cuda()
    small = {name: value.cuda() for name, value in twins.batch().items()}
    large = {name: value.cuda() for name, value in twins.batch(256, 512).items()}
    expected = model(**small).last_hidden_state.detach()
    before = torch.cuda.memory_allocated()
    # Room for what is there and 64 MiB: the large batch needs 2 KiB a token for one hidden state alone, in all 256 MiB.
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            model(**large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(model(**small).last_hidden_state, expected, atol=0, rtol=0)
