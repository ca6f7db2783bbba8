"""The random numbers of dropout: Philox itself, the positions that they are drawn at, and the kept fraction."""

import pytest
import torch
from ops import problems

from fastbert import ops
from fastbert.backends import extension, philox

# The known answers for philox4x32-10 of the Random123 library of Salmon et al. (tests/kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), problems.SEED]
needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def tensors(numbers):
    return tuple(torch.tensor(number) for number in numbers)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(map(int, philox.philox4x32(tensors(counter), tensors(key)))) == expected


@needs_extension
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_the_extension(counter, key, expected):
    assert tuple(extension.module().philox4x32_10(counter, key)) == expected


def test_draws_are_halves_of_words():
    seed = torch.tensor([(0x299F31D0 << 32) | 0xA4093822])
    words = philox.philox4x32(tensors((1, 0, 0, 0)), tensors((0xA4093822, 0x299F31D0)))
    draws = philox.hidden_draws(seed, 16)[8:]
    assert draws.tolist() == [half for word in words for half in (int(word) & 0xFFFF, int(word) >> 16)]


@pytest.mark.parametrize("start", [2**31 + 5, 2**32 - 5, 2**35 - 13, 2**35, 2**40 + 3])
def test_positions_beyond_32_bits_case_19(start):
    """Element i is served by counter (lo(i >> 3), hi(i >> 3), 0, 0), in 64-bit arithmetic."""
    seed = torch.tensor([problems.SEED])
    draws = philox.hidden_draws(seed, 40, start)
    key = tensors((problems.SEED & 0xFFFFFFFF, problems.SEED >> 32))
    for i, draw in enumerate(draws.tolist(), start):
        group, j = divmod(i, 8)
        word = int(philox.philox4x32(tensors((group & 0xFFFFFFFF, group >> 32, 0, 0)), key)[j >> 1])
        assert draw == (word >> 16 if j & 1 else word & 0xFFFF)
    assert draws.tolist() != philox.hidden_draws(seed, 40, start % 2**31).tolist()


@needs_extension
@pytest.mark.parametrize("start", [0, 3, 8, 2**32 - 5, 2**35 - 13, 2**40 + 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_of_the_extension_case_19(start, seed):
    draws = philox.hidden_draws(torch.tensor([seed]), 300, start)
    compiled = torch.frombuffer(bytearray(extension.module().philox_draws(seed, start, 300)), dtype=torch.uint16)
    assert torch.equal(compiled.long(), draws)


def test_attention_positions():
    """Probability (sequence, head, query, key) is served by counter (key >> 3, query, head, sequence)."""
    seed = torch.tensor([problems.SEED])
    draws = philox.attention_draws(seed, torch.tensor([5, 2]), heads=3, queries=4, keys=19)
    assert draws.shape == (2, 3, 4, 19)
    key = tensors((problems.SEED & 0xFFFFFFFF, problems.SEED >> 32))
    for sequence, head, query, position in [(5, 0, 0, 0), (5, 2, 1, 7), (2, 1, 3, 8), (2, 0, 2, 18)]:
        word = philox.philox4x32(tensors((position >> 3, query, head, sequence)), key)[(position & 7) >> 1]
        half = int(word) >> 16 if position & 1 else int(word) & 0xFFFF
        assert draws[[5, 2].index(sequence), head, query, position] == half


@needs_extension
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 312), (2, 1023), (129, 768), (65_537, 9)])
@pytest.mark.parametrize("seed", [-1, problems.SEED])
def test_compiled_mask_is_the_oracle_s(shape, seed):
    """Bit for bit, forward and backward, for odd sizes and many rows."""
    p = 0.3
    x = torch.ones(shape, requires_grad=True)
    seed = torch.tensor([seed])
    output = ops.bias_dropout_residual(x, None, torch.zeros(shape), p=p, seed=seed, impl="cpu")
    (gradient,) = torch.autograd.grad(output.sum(), x)
    expected = philox.hidden_mask(seed, x.shape, p)
    assert torch.equal(output != 0, expected)
    assert torch.equal(gradient != 0, expected)
    assert torch.equal(output[expected].unique(), torch.tensor([philox.scale(p)]))


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.5, 1.0 - 1e-5, 1.0])
def test_threshold_and_scale_case_26(p):
    """p is quantised to a multiple of 2**-16, and the expectation of the mask is exactly one."""
    kept = philox.threshold(p)
    assert 0 <= kept <= 65536
    assert abs(kept / 65536 - (1.0 - p)) <= 2.0**-17
    assert kept * philox.scale(p) == (65536 if kept else 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_fraction_case_26(p):
    seed = torch.tensor([problems.SEED])
    hidden = philox.hidden_mask(seed, torch.Size([400, 500]), p)
    attention = philox.attention_mask(seed, torch.arange(4), 5, 100, 100, p)
    for mask in (hidden, attention):
        assert abs(mask.double().mean().item() - (1.0 - p)) < 0.01


def test_masks_of_neighbours_differ():
    """Other seeds, sequences, heads and rows get other masks, and no correlation between them."""
    one, other = (philox.hidden_mask(torch.tensor([seed]), torch.Size([100_000]), 0.5) for seed in (1, 2))
    assert abs((one == other).double().mean().item() - 0.5) < 0.01
    mask = philox.attention_mask(torch.tensor([1]), torch.arange(3), 3, 64, 64, 0.5)
    for dim in range(3):
        agreement = (mask.narrow(dim, 0, 2) == mask.narrow(dim, 1, 2)).double().mean().item()
        assert abs(agreement - 0.5) < 0.02


def test_new_seeds_follow_the_default_generator():
    torch.manual_seed(5)
    first, second = philox.new_seeds(3, torch.device("cpu")), philox.new_seeds(3, torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(philox.new_seeds(3, torch.device("cpu")), first)
    assert first.dtype == torch.int64
    assert not torch.equal(first, second)
