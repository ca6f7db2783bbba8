"""Memory of a device: what a failed forward leaves behind."""

import gc

import pytest
import torch
from models import twins


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
