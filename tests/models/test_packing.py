"""Where the tokens of a batch are, against loops over the mask; and how many launches it takes to find out."""

import itertools

import pytest
import torch
from models import twins
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.models import packing

BATCH, SEQLEN = 5, 7
# Views launch nothing; what is read back is one copy.
VIEWS = {
    "aten::expand", "aten::flatten.using_ints", "aten::select.int", "aten::slice.Tensor", "aten::unsqueeze",
    "aten::view",
}  # fmt: skip
READS = {"aten::_local_scalar_dense", "aten::lift_fresh"}


class Launches(TorchDispatchMode):
    """The operators that launch something on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() not in VIEWS | READS | {"aten::promote_types"}:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def masks():
    made = {kind: twins.mask(kind, BATCH, SEQLEN).bool() for kind in ("full", "right", "left", "holes")}
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        made[f"random {seed}"] = torch.rand(BATCH, SEQLEN, generator=generator) < 0.5
    made["empty rows"] = made["right"].clone()
    made["empty rows"][[0, 3]] = False
    made["nothing"] = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    return made


MASKS = masks()


@pytest.mark.parametrize("name", MASKS)
def test_where_the_tokens_are(name):
    mask = MASKS[name]
    places = [(b, s) for b, s in itertools.product(range(BATCH), range(SEQLEN)) if mask[b, s]]
    lengths = [int(row.sum()) for row in mask]
    found = packing.from_mask(mask, None)
    assert found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens.is_contiguous()
    assert found.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert found.max_seqlen == max(lengths)
    assert (found.indices is None) == (len(places) == BATCH * SEQLEN)
    if found.indices is not None:
        assert found.indices.tolist() == [b * SEQLEN + s for b, s in places]
    assert found.places().tolist() == [s for _, s in places]
    x = torch.randn(BATCH, SEQLEN, 3)
    assert torch.equal(found.unpack(found.pack(x)), x * mask.unsqueeze(-1))
    static = packing.from_mask_static(mask)
    assert torch.equal(static.cu_seqlens, found.cu_seqlens)
    assert static.places().tolist()[: len(places)] == [s for _, s in places]
    # Padding stays, after the tokens, and is zero on both ways.
    packed = static.pack(x)
    assert torch.equal(packed[: len(places)], x[mask])
    assert packed[len(places) :].count_nonzero() == 0
    assert torch.equal(static.unpack(torch.randn_like(packed)) != 0, mask.unsqueeze(-1).expand_as(x))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("read_name", [None, "all", "nothing", "random 7"])
def test_padding_that_is_read_is_not_packed(name, read_first, read_name):
    mask = MASKS[name]
    read = None
    if read_name is not None:
        read = torch.ones_like(mask) if read_name == "all" else MASKS[read_name]
    lost = any(
        ((read is not None and read[b, s]) or (read_first and s == 0)) and not mask[b, s] and mask[b].any()
        for b, s in itertools.product(range(BATCH), range(SEQLEN))
    )
    assert (packing.from_mask(mask, read, read_first) is None) == lost


def test_a_row_of_several_sequences():
    found = packing.from_sequences(torch.tensor([0, 3, 3, 7]), None, 7)
    assert found.max_seqlen == 4
    _, ours = twins.twins()
    assert ours.embeddings._positions(found).tolist() == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize(("read", "read_first", "most"), [(False, False, 7), (False, True, 10), (True, True, 14)])
def test_few_launches(read, read_first, most):
    """Sorting counts as one."""
    mask = MASKS["right"]
    with Launches() as launches:
        packing.from_mask(mask, mask if read else None, read_first)
    assert len(launches.names) <= most, launches.names


@pytest.mark.parametrize("token_types", [False, True])
def test_the_embeddings_of_packed_tokens_take_four_launches(token_types):
    _, ours = twins.twins()
    inputs = twins.batch()
    found = packing.from_mask(inputs["attention_mask"].bool(), None)
    types = inputs["token_type_ids"] if token_types else None
    with torch.no_grad(), Launches() as launches:
        ours.embeddings(input_ids=inputs["input_ids"], token_type_ids=types, packing=found)
    assert len(launches.names) <= 4, launches.names


def test_every_argument_of_a_row_of_several_sequences():
    """Those that ``DataCollatorWithFlattening`` makes."""
    _, ours = twins.twins()
    ids = twins.batch(1, 12, "none")["input_ids"]
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    more = {"cu_seq_lens_k": offsets, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        expected = ours(ids, cu_seq_lens_q=offsets).last_hidden_state
        found = ours(ids, cu_seq_lens_q=offsets, **more).last_hidden_state
    twins.assert_packed(ours)
    assert torch.equal(found, expected)


def test_a_row_of_no_sequence():
    found = packing.from_sequences(torch.tensor([0]), None, 7)
    assert (found.max_seqlen, found.cu_seqlens.tolist()) == (0, [0])
