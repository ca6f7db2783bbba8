"""The draws of the Triton kernels, bit for bit those of ``backends/philox.py``."""

import pytest
import torch

from fastbert.backends import philox, select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASONS = list(select.needs_triton(select.Request(DEVICE, torch.float32)))
if REASONS:
    pytest.skip(f"{REASONS[0]}", allow_module_level=True)

import triton.language as tl

from fastbert.backends import triton_utils

pytestmark = [pytest.mark.triton, *([pytest.mark.gpu] if DEVICE == "cuda" else [])]

SEEDS = (5, -12345678901234567, 2**62 + 7)


@triton_utils.jit
def _hidden(out, seed, first_group, threshold, COUNT: tl.constexpr):
    group = first_group + tl.arange(0, COUNT // 8).to(tl.int64)
    keep = triton_utils.hidden_keep(tl.load(seed), group, threshold)
    tl.store(out + tl.arange(0, COUNT), keep.to(tl.int8))


# As in the kernels no place is a constant: those of a launch with 0 or 1 would be.
@triton_utils.jit(do_not_specialize=["sequence", "head", "first_query", "first_key", "threshold"])
def _attention(
    out, seed, sequence, head, first_query, first_key, threshold,
    M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The kept of M queries and N keys, in rows of N: ones where they are kept."""
    query, key = tl.arange(0, M), tl.arange(0, N)
    place = out + query[:, None] * N + key[None, :]
    if TRANSPOSED:
        place = out + query[None, :] * N + key[:, None]
    draws = triton_utils.attention_draws(
        tl.load(seed), sequence, head, first_query, first_key, M, N, TRANSPOSED
    )  # fmt: skip
    ones = (tl.load(place) * 0 + 1).to(out.dtype.element_ty)
    tl.store(place, triton_utils.attention_drop(ones, draws, threshold))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**33, 2**40 + 64])
def test_hidden(seed, first):
    out = torch.full((64,), 9, dtype=torch.int8, device=DEVICE)
    seed = torch.tensor([seed], device=DEVICE)
    _hidden[(1,)](out, seed, first // 8, philox.threshold(0.3), COUNT=64)
    assert torch.equal(out, (philox.hidden_draws(seed, 64, first) < philox.threshold(0.3)).to(torch.int8))


def check_attention(dtype, shape, transposed, p, seed, sequence, head, first_query, first_key):
    out = torch.full(shape, 9, dtype=dtype, device=DEVICE)
    seed = torch.tensor([seed], device=DEVICE)
    _attention[(1,)](
        out, seed, sequence, head, first_query, first_key, philox.attention_threshold(p), *shape, TRANSPOSED=transposed
    )  # fmt: skip
    queries, keys = first_query + shape[0], first_key + shape[1]
    sequences = torch.tensor([sequence], device=DEVICE)
    expected = philox.attention_mask(seed, sequences, head + 1, queries, keys, p)[0, head, first_query:, first_key:]
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("sequence", "head"), [(0, 0), (3, 2), (70_000, 11)])
def test_attention(seed, transposed, sequence, head):
    check_attention(torch.float32, (16, 32), transposed, 0.3, seed, sequence, head, 48, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 64), (128, 64)])
def test_attention_in_blocks(dtype, transposed, shape):
    check_attention(dtype, shape, transposed, 0.1, SEEDS[1], 2, 3, shape[0], 3 * shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 2.0**-15, 0.02, 0.1, 0.5, 0.5 + 2.0**-15, 0.98, 1 - 2.0**-15, 1.0])
def test_every_threshold(dtype, p):
    """Near the bounds, and where the 15 bits are no float16: over both sides of one half and over nothing kept."""
    check_attention(dtype, (64, 128), False, p, SEEDS[0], 1, 0, 0, 0)
