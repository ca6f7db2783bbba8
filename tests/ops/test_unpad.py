"""Where the tokens of a mask are, by Triton, against loops over it: on a GPU, or with ``--triton``."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks import bench_unpad, harness, shapes
from fastbert.backends import select
from fastbert.ops.unpad import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = next(select.needs_triton(select.Request(DEVICE, torch.float32)), None)
pytestmark = [pytest.mark.triton, pytest.mark.skipif(REASON is not None, reason=f"Triton's kernels: {REASON}")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

# One row; fewer rows and positions than a block has; several blocks of both.
SHAPES = [(1, 1), (1, 40), (5, 7), (3, 2500), (1100, 3)]
DTYPES = (torch.bool, torch.int64, torch.int32, torch.float32)


def masks(batch, seqlen):
    generator = torch.Generator().manual_seed(batch)
    made = {"random": torch.rand(batch, seqlen, generator=generator) < 0.5}
    made["full"] = torch.ones(batch, seqlen, dtype=torch.bool)
    made["nothing"] = torch.zeros(batch, seqlen, dtype=torch.bool)
    made["empty rows"] = made["random"].clone()
    made["empty rows"][:: max(1, batch // 3)] = False
    return made


def expected(mask, read, read_first):
    batch, seqlen = mask.shape
    places = list(itertools.product(range(batch), range(seqlen)))
    tokens = [b * seqlen + s for b, s in places if mask[b, s]]
    padding = [b * seqlen + s for b, s in places if not mask[b, s]]
    lengths = mask.sum(1).tolist()
    lost = any(
        ((read is not None and read[b, s]) or (read_first and s == 0)) and not mask[b, s] and lengths[b]
        for b, s in places
    )
    return [0, *itertools.accumulate(lengths)], tokens + padding, [len(tokens), max(lengths)], lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype):
    from fastbert.ops.unpad import triton

    for mask in masks(*shape).values():
        values = mask.to(dtype).to(DEVICE) if dtype == torch.bool else mask.to(dtype).to(DEVICE) * 3
        cu_seqlens, indices, facts = triton.unpad(values, None, False)
        offsets, places, (tokens, longest), _ = expected(mask, None, False)
        assert (cu_seqlens.dtype, indices.dtype) == (torch.int32, torch.int64)
        assert cu_seqlens.is_contiguous()
        assert cu_seqlens.tolist() == offsets
        assert indices.tolist() == places
        assert facts.tolist() == [tokens, longest, 0]
        for found, oracle in zip((cu_seqlens, indices, facts[:2]), reference.unpad(values, None, False), strict=True):
            assert torch.equal(found, oracle)


@pytest.mark.parametrize("shape", [(5, 7), (2, 1500)], ids=str)
@pytest.mark.parametrize("read_first", [False, True])
def test_padding_that_is_read(shape, read_first):
    from fastbert.ops.unpad import triton

    made = masks(*shape)
    one_place = torch.zeros(shape, dtype=torch.bool)
    one_place[-1, -1] = True
    for mask, read in itertools.product(made.values(), (None, one_place, *made.values())):
        given = None if read is None else read.to(DEVICE)
        *_, lost = expected(mask, read, read_first)
        facts = triton.unpad(mask.to(DEVICE), given, read_first)[2].tolist()
        oracle = reference.unpad(mask.to(DEVICE), given, read_first)[2].tolist()
        assert any(facts[2:]) == any(oracle[2:]) == lost


def test_strides_of_any_kind():
    """Rows of a longer tensor, positions apart from each other, one row for all, and memory that isn't aligned."""
    from fastbert.ops.unpad import triton

    whole = torch.rand(6, 41, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = whole.to(DEVICE)
    read = whole.t()[:6, :6]
    for mask in (whole[:, 3:20], whole[1:, ::3], whole.t(), whole[2:3].expand(4, 41), whole.flatten()[1:31].view(5, 6)):
        found, oracle = (one.unpad(mask, None, True) for one in (triton, reference))
        assert all(torch.equal(a, b) for a, b in zip(found[:2], oracle[:2], strict=True))
        assert any(found[2][2:].tolist()) == any(oracle[2][2:].tolist())
    mask = whole[:, :6]
    assert any(triton.unpad(mask, read, False)[2][2:].tolist()) == any(
        reference.unpad(mask, read, False)[2][2:].tolist()
    )


def test_both_contestants_of_its_benchmark_find_the_same():
    (case, *_) = bench_unpad.cases("cuda")
    contest = bench_unpad.build(dataclasses.replace(case, device=DEVICE, batch=shapes.even(5, 40, 0.5)))
    for contestant in contest.contestants.values():
        judged = harness.judge(contestant.judged(), contest.exact, contest.eager, contest.dtype)
        assert (judged.error, judged.passed) == (0.0, True)
