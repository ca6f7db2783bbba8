"""The random numbers of dropout: Philox itself, the positions that they are drawn at, and the kept fraction."""

import pytest
import torch
from ops import problems

from fastbert import ops
from fastbert.backends import extension, philox

# The known answers for philox4x32 with 7 rounds of the Random123 library of Salmon et al. (tests/kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
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
    assert tuple(extension.module().philox4x32_7(counter, key)) == expected


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
    """The counter, word and half of a probability (sequence, head, query, key), each number written out."""
    seed = torch.tensor([problems.SEED])
    draws = philox.attention_draws(seed, torch.tensor([5, 2]), heads=3, queries=29, keys=37)
    assert draws.shape == (2, 3, 29, 37)
    key = tensors((problems.SEED & 0xFFFFFFFF, problems.SEED >> 32))
    for (sequence, head, query, position), counter, word, half in [
        ((5, 0, 0, 0), (0, 0, 5, 0), 0, 0),
        ((5, 2, 1, 7), (2, 3, 5, 1), 0, 1),
        ((2, 1, 3, 8), (1, 0, 2, 3), 1, 0),
        ((2, 0, 14, 18), (0, 5, 2, 6), 2, 0),
        ((5, 1, 28, 31), (1, 7, 5, 12), 3, 1),
        ((2, 2, 16, 36), (2, 10, 2, 8), 0, 0),
    ]:
        words = philox.philox4x32(tensors(counter), key)
        expected = int(words[word]) >> 16 * half & 0x7FFF
        assert draws[[5, 2].index(sequence), head, query, position] == expected


def test_no_word_serves_two_places():
    """Neighbouring pairs have words of their own: no more of 16384 are equal than chance lets be.

    n words of b bits have n² / 2 / 2**b equal pairs on average: 0.03 where b = 32, and 0.13 where it is 30, as in draws
    of attention. Three pairs have a probability of 5e-6 in the first case, and four of 9e-6 in the second.
    """
    seed = torch.tensor([problems.SEED])
    sequences, heads, queries, keys = 2, 4, 64, 64
    draws = philox.attention_draws(seed, torch.arange(sequences), heads, queries, keys)
    pairs = draws.unflatten(-1, (keys // 2, 2))
    words = pairs[..., 0] << 15 | pairs[..., 1]
    assert words.unique().numel() >= words.numel() - 3
    hidden = philox.hidden_draws(seed, 2 * words.numel()).view(-1, 2)
    assert (hidden[:, 0] << 16 | hidden[:, 1]).unique().numel() >= words.numel() - 2


@needs_extension
@pytest.mark.parametrize("shape", [(1, 1), (8, 3), (9, 16), (17, 15), (25, 65), (33, 127), (3, 1100)])
@pytest.mark.parametrize("p", [2.0**-15, 0.1, 0.5, 0.7, 0.98, 1.0])
@pytest.mark.parametrize("first_sequence", [0, 70_000])
def test_compiled_attention_mask_is_the_oracle_s(shape, p, first_sequence):
    """Bit for bit, with odd numbers of queries and keys, and on both sides of every block of 16."""
    seed = torch.tensor([-problems.SEED])
    probabilities = torch.ones(2, 3, *shape)
    extension.module().attention_dropout_host(
        extension.memory(probabilities), first_sequence, 2, 3, *shape, extension.memory(seed),
        philox.attention_threshold(p), philox.attention_scale(p), 2,
    )  # fmt: skip
    mask = philox.attention_mask(seed, torch.arange(first_sequence, first_sequence + 2), 3, *shape, p)
    assert torch.equal(probabilities, torch.where(mask, torch.tensor(philox.attention_scale(p)), 0.0))


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


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.5, 0.75, 0.98, 1.0 - 1e-5, 1.0])
def test_attention_threshold_and_scale(p):
    """As above, in multiples of 2**-15; as many of all draws are kept as it says."""
    kept = philox.attention_threshold(p)
    assert abs(kept / 32768 - (1.0 - p)) <= 2.0**-16
    assert kept * philox.attention_scale(p) == (32768 if kept else 0)


def test_of_all_draws_the_threshold_s_number_is_kept(monkeypatch):
    """For attention, on both sides of one half, with every draw once."""
    draws = torch.arange(32768)
    monkeypatch.setattr(philox, "attention_draws", lambda *_: draws)
    for p in (0.0, 0.1, 0.5, 0.5 + 2.0**-15, 0.9, 1.0):
        mask = philox.attention_mask(torch.tensor([0]), torch.arange(1), 1, 1, 32768, p)
        assert mask.sum() == philox.attention_threshold(p)


# Standard deviations beyond which a normal number lies once in 5e8 times: the tests have fixed seeds and compare a few
# hundred numbers, each close to normal, so that none fails by chance but one in a million choices of seeds.
_DEVIATIONS = 6.0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", SEEDS)
def test_kept_fraction_case_26(p, seed):
    """n independent draws keep a fraction of standard deviation sqrt(q (1 - q) / n), with q the exact probability."""
    seed = torch.tensor([seed])
    hidden = philox.hidden_mask(seed, torch.Size([400, 500]), p)
    attention = philox.attention_mask(seed, torch.arange(4), 5, 100, 100, p)
    for mask, kept in ((hidden, philox.threshold(p) / 65536), (attention, philox.attention_threshold(p) / 32768)):
        bound = _DEVIATIONS * (kept * (1.0 - kept) / mask.numel()) ** 0.5
        assert abs(mask.double().mean().item() - kept) <= bound


def correlation(one, other):
    """Of two masks as numbers of mean 0 and variance 1: over n independent places, of deviation 1 / sqrt(n)."""
    one, other = ((mask.double() - mask.double().mean()) / mask.double().std() for mask in (one, other))
    return (one * other).mean().item()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dim", range(4))
def test_neighbours_in_attention_are_independent(p, dim):
    """Sequences, heads, queries and keys at every distance up to 33: in a word, a call, a group and beyond."""
    mask = philox.attention_mask(torch.tensor([problems.SEED]), torch.arange(34), 34, 34, 34, p)
    for distance in range(1, 34):
        count = 34 - distance
        one, other = mask.narrow(dim, 0, count), mask.narrow(dim, distance, count)
        assert abs(correlation(one, other)) <= _DEVIATIONS / one.numel() ** 0.5, distance


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_elements_of_a_call_are_independent(p):
    """Of the eight halves of a call, each with each: queries 8 apart, keys 1, 8 and 9 apart, in both places."""
    mask = philox.attention_mask(torch.tensor([problems.SEED]), torch.arange(4), 8, 64, 64, p)
    halves = mask.unflatten(3, (4, 2, 4, 2)).unflatten(2, (4, 2, 8)).movedim((3, 6, 8), (0, 1, 2)).flatten(0, 2)
    for i in range(8):
        for j in range(i):
            assert abs(correlation(halves[i], halves[j])) <= _DEVIATIONS / halves[0].numel() ** 0.5


@pytest.mark.parametrize("difference", [1, 2, 1 << 31, 1 << 32, 1 << 62, -1])
def test_seeds_are_independent(difference):
    """Seeds that differ in one bit, in either word, and in all bits."""
    seeds = torch.tensor([problems.SEED]), torch.tensor([problems.SEED ^ difference])
    for draw in (
        lambda seed: philox.hidden_mask(seed, torch.Size([100_000]), 0.5),
        lambda seed: philox.attention_mask(seed, torch.arange(4), 4, 64, 64, 0.5),
    ):
        one, two = (draw(seed) for seed in seeds)
        assert abs(correlation(one, two)) <= _DEVIATIONS / one.numel() ** 0.5


def test_neighbours_in_a_hidden_state_are_independent():
    mask = philox.hidden_mask(torch.tensor([problems.SEED]), torch.Size([200_000]), 0.1)
    for distance in range(1, 65):
        one, other = mask[:-distance], mask[distance:]
        assert abs(correlation(one, other)) <= _DEVIATIONS / one.numel() ** 0.5, distance


def test_new_seeds_follow_the_default_generator():
    torch.manual_seed(5)
    first, second = philox.new_seeds(3, torch.device("cpu")), philox.new_seeds(3, torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(philox.new_seeds(3, torch.device("cpu")), first)
    assert first.dtype == torch.int64
    assert not torch.equal(first, second)
