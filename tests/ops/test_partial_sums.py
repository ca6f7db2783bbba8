"""The second stage of the Triton kernels' sums over rows."""

import importlib

import pytest
import torch

from fastbert.backends import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASONS = list(select.needs_triton(select.Request(DEVICE, torch.float32)))

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(bool(REASONS), reason="".join(REASONS[:1])),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 600, 70), (1, 257, 32), (2, 3, 1), (1, 1, 9), (2, 0, 5), (1, 4, 0)], ids=str)
def test_sums(shape, dtype):
    """Each in its dtype, in memory of its own; the sum of no rows is 0."""
    partial = torch.randn(shape)
    found = importlib.import_module("fastbert.backends.partial_sums").add_partials(partial.to(DEVICE), dtype)
    assert len(found) == shape[0]
    assert len({x.untyped_storage().data_ptr() for x in found if x.numel() > 0}) == (shape[0] if shape[2] > 0 else 0)
    exact, terms = partial.double().sum(1), partial.double().abs().sum(1)
    # Rounded once to the dtype; in float32 a number goes through at most 3 additions of rows and 256 of a block.
    allowed = torch.finfo(dtype).eps * exact.abs() + 259 * 2.0**-24 * terms
    for result, value, bound in zip(found, exact, allowed, strict=True):
        assert result.dtype == dtype
        assert ((result.cpu().double() - value).abs() <= bound).all()
