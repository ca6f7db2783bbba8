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

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SEEDS = (5, -12345678901234567, 2**62 + 7)


@triton_utils.jit
def _hidden(out, seed, first_group, threshold, COUNT: tl.constexpr):
    group = first_group + tl.arange(0, COUNT // 8).to(tl.int64)
    keep = triton_utils.hidden_keep(tl.load(seed), group, threshold)
    tl.store(out + tl.arange(0, COUNT), keep.to(tl.int8))


@triton_utils.jit
def _attention(out, seed, sequence, head, threshold, M: tl.constexpr, N: tl.constexpr):
    query, key = tl.arange(0, M), tl.arange(0, N)
    keep = triton_utils.attention_keep(tl.load(seed), sequence, head, query, tl.arange(0, N // 8), threshold)
    tl.store(out + query[:, None] * N + key[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**33, 2**40 + 64])
def test_hidden(seed, first):
    out = torch.full((64,), 9, dtype=torch.int8, device=DEVICE)
    seed = torch.tensor([seed], device=DEVICE)
    _hidden[(1,)](out, seed, first // 8, philox.threshold(0.3), COUNT=64)
    assert torch.equal(out, (philox.hidden_draws(seed, 64, first) < philox.threshold(0.3)).to(torch.int8))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("sequence", "head"), [(0, 0), (3, 2), (70_000, 11)])
def test_attention(seed, sequence, head):
    out = torch.full((16, 32), 9, dtype=torch.int8, device=DEVICE)
    seed = torch.tensor([seed], device=DEVICE)
    _attention[(1,)](out, seed, sequence, head, philox.threshold(0.3), M=16, N=32)
    expected = philox.attention_mask(seed, torch.tensor([sequence], device=DEVICE), head + 1, 16, 32, 0.3)[0, head]
    assert torch.equal(out, expected.to(torch.int8))
