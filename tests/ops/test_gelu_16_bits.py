"""GELU and its derivative in Triton at every number of 16 bits."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastbert.backends import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASONS = list(select.needs_triton(select.Request(DEVICE, torch.float32)))
if REASONS:
    pytest.skip(f"{REASONS[0]}", allow_module_level=True)

import triton.language as tl

from fastbert.backends import triton_utils

pytestmark = [
    pytest.mark.triton,
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str),
    pytest.mark.parametrize("approximate", ["none", "tanh"]),
]

# The tail of Phi is off by 1.3e-5 of itself for its polynomial. Its exponent in base 2 is at most 126 before the tail
# is 0 in float32; rounded twice, it is off by 126 * 2 * 2^-24, and the tail by log(2) = 0.69 of that, 1.04e-5. What
# remains to 2^-15 = 3.05e-5 is 100 roundings of float32; the instructions for exp2 and rsqrt take up to 4 each.
TAIL = 2.0**-15
# The exponential may count as nothing below this, the smallest normal number of float32.
NOTHING = 2.0**-126


@triton_utils.jit
def _in_float32(x_ptr, gelu_ptr, slope_ptr, TANH: tl.constexpr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x = tl.load(x_ptr + at).to(tl.float32)
    tl.store(gelu_ptr + at, triton_utils.gelu(x, TANH, SHORT=True))
    tl.store(slope_ptr + at, triton_utils.gelu_grad(x, TANH, SHORT=True))


def every_number(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def in_float32(x, approximate):
    """GELU and its derivative before they are rounded to 16 bits."""
    results = torch.empty(2, x.numel(), device=DEVICE)
    _in_float32[(16,)](x.to(DEVICE), *results, TANH=approximate == "tanh", COUNT=x.numel() // 16)
    return results.cpu()


def by_the_op(x, approximate):
    """GELU and its derivative as the op gives them."""
    module = select.load("bias_gelu", "triton")
    rows = x.to(DEVICE).view(512, 128)
    slope, _ = module.backward(torch.ones_like(rows), rows, None, approximate, [True, False])
    return module.forward(rows, None, approximate).cpu().view(-1), slope.cpu().view(-1)


def exactly(x, approximate):
    """GELU and its derivative in float64, each with the size of its terms that come from the tail of Phi.

    Then what the exponential is multiplied by in the derivative, which is at least what it is in GELU.
    """
    x = x.double()
    a, positive = x.abs(), x > 0
    if approximate == "none":
        tail, density = 0.5 * torch.erfc(a * math.sqrt(0.5)), torch.exp(-0.5 * a.square()) / math.sqrt(2.0 * math.pi)
    else:
        scale, b = 2.0 * math.sqrt(2.0 / math.pi), a.clamp(max=100.0)
        tail = torch.sigmoid(-scale * (b + 0.044715 * b**3))  # no digits cancel, as they do in 1 - tanh
        density = tail * (1.0 - tail) * scale * (1.0 + 3.0 * 0.044715 * b.square())
    b = a.clamp(max=14.0)
    factor = 1.0 + b if approximate == "none" else 1.0 + b * scale * (1.0 + 3.0 * 0.044715 * b.square())
    gelu = x * torch.where(positive, 1.0 - tail, tail)
    slope = torch.where(positive, 1.0 - tail + a * density, tail - a * density)
    return (gelu, a * tail, factor), (slope, tail + a * density, factor)


def unit(x, dtype):
    """The unit of the last place of ``x`` in ``dtype``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(min=info.smallest_normal))
    return info.eps * torch.ldexp(torch.ones_like(x), exponent - 1)


@pytest.mark.parametrize("results", [in_float32, by_the_op])
def test_error(results, approximate, dtype):
    """Half a unit of the last place for the rounding of the result, and ``TAIL`` of what comes from the tail."""
    x = every_number(dtype)
    finite = x.isfinite()
    for result, (exact, terms, factor) in zip(results(x, approximate), exactly(x, approximate), strict=True):
        allowed = 0.5 * unit(exact, result.dtype) + TAIL * terms + NOTHING * factor
        error = (result.double() - exact).abs().nan_to_num(nan=math.inf)
        assert (error <= allowed)[finite].all(), f"off by {(error / allowed)[finite].max()} of what is allowed"


def test_not_finite(approximate, dtype):
    """NaN stays NaN, and there is no other where eager PyTorch has none. Only infinity becomes infinite."""
    x = every_number(dtype).requires_grad_()
    eager = F.gelu(x, approximate=approximate)
    (eager_slope,) = torch.autograd.grad(eager.sum(), x)
    x = x.detach()
    gelu, slope = by_the_op(x, approximate)
    for result, other in ((gelu, eager), (slope, eager_slope)):
        assert result[x.isnan()].isnan().all()
        assert not (result.isnan() & ~other.isnan()).any()
    assert torch.equal(gelu.isinf(), x == math.inf)
    assert not slope.isinf().any()
