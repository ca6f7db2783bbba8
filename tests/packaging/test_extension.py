"""What ``fastbert._C`` exports, called as the ops call it: with addresses and sizes."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.backends import extension, host_linear, philox

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
P = 0.1

C: Any = extension.load()
if C is None:
    pytest.fail(f"the extension must be built to test it: {extension.missing()}")

simd = pytest.mark.skipif(extension.missing_simd() is not None, reason=f"{extension.missing_simd()}")
# The memory that the host kernels take, and what errors call those in lists.
MEMORY = {
    "linear_forward": ("x", "packed", "bias", "other", "y"),
    "attention_forward": ("qkv", "cu_seqlens", "out", "lse"),
    "encoder_layer_forward": (
        *("x", "y", "cu_seqlens", "scratch", "lse"),
        *(f"{key}/{i}" for key, count in (("weights", 8), ("norms", 4)) for i in range(count)),
    ),
}
NAMES = {f"{key}/{i}": f"{key}[{i}]" for key in ("weights", "norms") for i in range(8)}


def forward(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor | None, num_threads: int = 2) -> Tensor:
    p = 0.0 if seed is None else P
    out = torch.full_like(x, torch.nan)
    C.bias_dropout_residual_forward_host(
        x=extension.memory(x),
        bias=extension.memory(bias),
        residual=extension.memory(residual),
        out=extension.memory(out),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=extension.dtype_code(x.dtype),
        seed=extension.memory(seed),
        threshold=philox.threshold(p),
        scale=philox.scale(p),
        num_threads=num_threads,
    )
    return out


def backward(dy: Tensor, seed: Tensor | None, num_threads: int = 2) -> tuple[Tensor, Tensor]:
    p = 0.0 if seed is None else P
    rows, cols = dy.shape
    dx, dbias = torch.full_like(dy, torch.nan), dy.new_full((cols,), torch.nan)
    scratch = torch.full((C.bias_dropout_residual_backward_scratch(rows, cols),), torch.nan)
    C.bias_dropout_residual_backward_host(
        dy=extension.memory(dy),
        dx=extension.memory(dx),
        dbias=extension.memory(dbias),
        scratch=extension.memory(scratch),
        rows=rows,
        cols=cols,
        dtype=extension.dtype_code(dy.dtype),
        seed=extension.memory(seed),
        threshold=philox.threshold(p),
        scale=philox.scale(p),
        num_threads=num_threads,
    )
    return dx, dbias


def fused_forward(
    x: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor, seed: Tensor | None, num_threads: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bias_dropout_residual_layer_norm without a bias: out, hidden, mean, rstd."""
    p = 0.0 if seed is None else P
    out, hidden = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    mean, rstd = torch.full((2, x.shape[0]), torch.nan)
    C.bias_dropout_residual_layer_norm_forward_host(
        x=extension.memory(x),
        bias=None,
        residual=extension.memory(residual),
        weight=extension.memory(weight),
        ln_bias=extension.memory(ln_bias),
        parameter_dtype=extension.dtype_code(weight.dtype),
        eps=1e-12,
        out=extension.memory(out),
        hidden=extension.memory(hidden),
        mean=extension.memory(mean),
        rstd=extension.memory(rstd),
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=extension.dtype_code(x.dtype),
        seed=extension.memory(seed),
        threshold=philox.threshold(p),
        scale=philox.scale(p),
        num_threads=num_threads,
    )
    return out, hidden, mean, rstd


def fused_backward(
    dy: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor | None, num_threads: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dresidual, dx, dbias, dweight, dln_bias."""
    p = 0.0 if seed is None else P
    rows, cols = dy.shape
    dresidual, dx = torch.full_like(dy, torch.nan), torch.full_like(dy, torch.nan)
    dbias = dy.new_full((cols,), torch.nan)
    dweight, dln_bias = weight.new_full((cols,), torch.nan), weight.new_full((cols,), torch.nan)
    scratch = torch.full((C.bias_dropout_residual_layer_norm_backward_scratch(rows, cols),), torch.nan)
    C.bias_dropout_residual_layer_norm_backward_host(
        dy=extension.memory(dy),
        dy2=None,
        hidden=extension.memory(hidden),
        weight=extension.memory(weight),
        parameter_dtype=extension.dtype_code(weight.dtype),
        mean=extension.memory(mean),
        rstd=extension.memory(rstd),
        dresidual=extension.memory(dresidual),
        dx=extension.memory(dx),
        dbias=extension.memory(dbias),
        dweight=extension.memory(dweight),
        dln_bias=extension.memory(dln_bias),
        scratch=extension.memory(scratch),
        rows=rows,
        cols=cols,
        dtype=extension.dtype_code(dy.dtype),
        seed=extension.memory(seed),
        threshold=philox.threshold(p),
        scale=philox.scale(p),
        num_threads=num_threads,
    )
    return dresidual, dx, dbias, dweight, dln_bias


def test_build_info() -> None:
    info = C.build_info()
    assert info["version"] == fastbert.__version__
    assert info["cuda"] == (info["cuda_absent"] is None)
    assert info["cuda"] == hasattr(C, "bias_dropout_residual_forward_device")
    assert (extension.missing_cuda() is None) == info["cuda"]


# What the kernels may use, by the word of CPUID and its bit; the names are those of Linux's /proc/cpuinfo. The levels
# are those of the System V ABI's AMD64 supplement, section 3.1.1. Of XCR0: what the operating system keeps.
FEATURES = {
    "AVX2": {
        "leaf1_ecx": {
            **{"pni": 0, "ssse3": 9, "fma": 12, "cx16": 13, "sse4_1": 19, "sse4_2": 20, "movbe": 22, "popcnt": 23},
            **{"osxsave": 27, "avx": 28, "f16c": 29},
        },
        "leaf7_ebx": {"bmi1": 3, "avx2": 5, "bmi2": 8},
        "extended1_ecx": {"lahf_lm": 0, "abm": 5},
        "xcr0": {"xmm": 1, "ymm": 2},
    },
    "AVX512": {
        "leaf7_ebx": {"avx512f": 16, "avx512dq": 17, "avx512cd": 28, "avx512bw": 30, "avx512vl": 31},
        "xcr0": {"masks": 5, "upper halves": 6, "upper registers": 7},
    },
    "AMX": {
        "leaf7_edx": {"amx_bf16": 22, "amx_tile": 24},
        "leaf7_1_eax": {"avx512_bf16": 5},
        "xcr0": {"tile configuration": 17, "tile data": 18},
    },
}
LEVELS = tuple(FEATURES)
WORDS = ("leaf1_ecx", "leaf7_ebx", "leaf7_edx", "leaf7_1_eax", "extended1_ecx", "xcr0")


@pytest.mark.parametrize(
    ("level", "word", "bit"),
    [
        pytest.param(level, word, bit, id=f"{level}-{name}")
        for level, words in FEATURES.items()
        for word, bits in words.items()
        for name, bit in bits.items()
    ],
)
def test_instructions_take_every_feature(level: str, word: str, bit: int) -> None:
    """A processor that has just what is wanted runs everything; without one feature, no level that may use it."""
    words = dict.fromkeys(WORDS, 0)
    for own in FEATURES.values():
        for name, bits in own.items():
            words[name] |= sum(1 << number for number in bits.values())
    assert C.instructions_of(**words) == dict.fromkeys(LEVELS, True)
    words[word] -= 1 << bit
    assert C.instructions_of(**words) == {name: LEVELS.index(name) < LEVELS.index(level) for name in LEVELS}


def test_instructions_of_this_processor() -> None:
    """They agree with what the kernel read in the same words."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or platform.machine() != "x86_64":
        pytest.skip("this is no Linux on x86-64")
    (flags, *_) = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    has = True
    for level, words in FEATURES.items():
        names = [name for word, bits in words.items() if word != "xcr0" for name in bits if name != "osxsave"]
        has = has and set(names) <= set(flags.split())
        assert C.instructions_of(**C.processor())[level] == has
    assert set(C.processor()) == set(WORDS)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_gives_its_authors_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known answers that Random123, the authors' own library, is tested with."""
    assert C.philox4x32_7(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_draws_are_the_oracles(seed: int) -> None:
    draws = torch.frombuffer(bytearray(C.philox_draws(seed, 0, 1001)), dtype=torch.uint16)
    assert torch.equal(draws.long(), philox.hidden_draws(torch.tensor(seed), 1001))


@pytest.mark.parametrize("start", [5, 128, 2**31 - 3, 2**35 - 11, 2**40 + 1])
def test_draws_far_into_a_tensor(start: int) -> None:
    """Element ``start`` of a tensor with more than 2**31 elements: its counter has 64 bits."""
    groups = torch.arange(start >> 3, (start >> 3) + 5)
    zero = torch.zeros_like(groups)
    counter = (groups & 0xFFFFFFFF, groups >> 32, zero, zero)
    words = torch.stack(philox.philox4x32(counter, (torch.tensor(7), torch.tensor(0))), -1)
    expected = torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[start & 7 :][:30]
    draws = torch.frombuffer(bytearray(C.philox_draws(7, start, 30)), dtype=torch.uint16)
    assert torch.equal(draws.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_written(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(0)
    out = forward(values, None, torch.zeros_like(values), None)
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out[~values.isnan()], values[~values.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    """To nearest, ties to even, over the whole range: subnormals, ties, overflow to infinity."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()]
    x = values.repeat(17, 1)
    residual = torch.stack([(values.float() * 2.0**-shift).to(dtype) for shift in range(17)])
    expected = (residual.float() + x.float()).to(dtype)
    out = forward(x, None, residual, None)
    assert expected.isinf().any()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 1023), (64, 13), (129, 768), (700, 24)])
def test_agrees_with_torch_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    seed = torch.tensor(2**40 + 3)
    mask = philox.hidden_mask(seed, x.shape, P)
    hidden = torch.where(mask, (x.float() + bias.float()) * philox.scale(P), 0.0)
    assert torch.equal(forward(x, bias, residual, seed), (residual.float() + hidden).to(dtype))
    assert torch.equal(forward(x, None, residual, None), (residual.float() + x.float()).to(dtype))
    dx, dbias = backward(x, seed)
    exact = torch.where(mask, x.double() * philox.scale(P), 0.0)
    assert torch.equal(dx, torch.where(mask, x.float() * philox.scale(P), 0.0).to(dtype))
    torch.testing.assert_close(dbias.double(), exact.sum(0), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=["float32-parameters", "same-parameters"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 1023), (64, 13), (129, 768), (700, 24)])
def test_fused_agrees_with_torch(
    shape: tuple[int, int], dtype: torch.dtype, parameter_dtype: torch.dtype | None
) -> None:
    x, residual, dy = torch.randn(3, *shape).to(dtype)
    weight, ln_bias = torch.randn(2, shape[1]).to(parameter_dtype or dtype)
    seed = torch.tensor(2**40 + 3)
    mask = philox.hidden_mask(seed, x.shape, P)
    out, hidden, mean, rstd = fused_forward(x, residual, weight, ln_bias, seed)
    expected = (residual.float() + torch.where(mask, x.float() * philox.scale(P), 0.0)).to(dtype)
    assert torch.equal(hidden, expected)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, ln_bias)]
    exact = torch.nn.functional.layer_norm(leaves[0], shape[1:], *leaves[1:], 1e-12)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=step, atol=1e-5)
    torch.testing.assert_close(mean.double(), leaves[0].mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), leaves[0].var(1, correction=0).rsqrt(), rtol=1e-5, atol=0.0)
    dhidden, dweight, dln_bias = torch.autograd.grad(exact, leaves, dy.double())
    dx = torch.where(mask, dhidden * philox.scale(P), 0.0)
    results = fused_backward(dy, hidden, weight, mean, rstd, seed)
    for result, truth in zip(results, (dhidden, dx, dx.sum(0), dweight, dln_bias), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=step, atol=2e-5)


def test_fused_result_does_not_depend_on_the_number_of_threads() -> None:
    x, seed, row = torch.randn(3000, 131), torch.tensor(5), torch.randn(131)
    results = []
    for threads in (1, 2, 3, 7):
        out, *kept = fused_forward(x, x.flip(0), row, row, seed, threads)
        results.append([out, *kept, *fused_backward(x, kept[0], row, kept[1], kept[2], seed, threads)])
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment(dtype: torch.dtype) -> None:
    x, residual = torch.randn(9 * 24 + 3).to(dtype), torch.randn(9 * 24 + 3).to(dtype)
    seed = torch.tensor(5)
    aligned = forward(x[3:].clone().view(9, 24), None, residual[3:].clone().view(9, 24), seed)
    assert torch.equal(forward(x[3:].view(9, 24), None, residual[3:].view(9, 24), seed), aligned)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    x, seed = torch.randn(3000, 131), torch.tensor(5)
    outputs = [(forward(x, x[0], x, seed, threads), *backward(x, seed, threads)) for threads in (1, 2, 3, 7)]
    for output in outputs[1:]:
        assert all(torch.equal(left, right) for left, right in zip(output, outputs[0], strict=True))


def test_wanted_gradients_only() -> None:
    dy = torch.randn(70, 24)
    dx, dbias = backward(dy, None)
    only_dx, only_dbias = torch.empty_like(dy), torch.empty(24)
    scratch = torch.empty(C.bias_dropout_residual_backward_scratch(70, 24))
    sizes = {"rows": 70, "cols": 24, "dtype": C.FLOAT32, "seed": None, "threshold": 65536, "scale": 1.0}
    memory = extension.memory
    C.bias_dropout_residual_backward_host(memory(dy), memory(only_dx), None, None, num_threads=1, **sizes)
    C.bias_dropout_residual_backward_host(memory(dy), None, memory(only_dbias), memory(scratch), num_threads=1, **sizes)
    assert torch.equal(only_dx, dx)
    assert torch.equal(only_dbias, dbias)


def test_nothing_to_do() -> None:
    """No rows: no output, and column sums of zero."""
    assert forward(torch.empty(0, 24), None, torch.empty(0, 24), None).shape == (0, 24)
    _, dbias = backward(torch.empty(0, 24), None)
    assert torch.equal(dbias, torch.zeros(24))
    assert forward(torch.empty(3, 0), None, torch.empty(3, 0), None).shape == (3, 0)
    none, row = torch.empty(0, 24), torch.ones(24)
    out, hidden, mean, rstd = fused_forward(none, none, row, row, None)
    assert out.shape == (0, 24)
    assert all(torch.equal(sums, torch.zeros(24)) for sums in fused_backward(none, hidden, row, mean, rstd, None)[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x is None; it must have 64 bytes"),
        ({"residual": (64, 60)}, "residual has 60 bytes; it must have 64"),
        ({"out": (64, 68)}, "out has 68 bytes; it must have 64"),
        ({"bias": (64, 4)}, "bias has 4 bytes; it must have 32"),
        ({"x": (0, 64)}, "x is a null address"),
        ({"x": (62, 64)}, "x is at an address that is no multiple of 4"),
        ({"rows": -1}, "rows is -1; it may be 0 or more"),
        ({"cols": -1}, "cols is -1; it may be 0 or more"),
        ({"cols": 2**31}, "cols is 2147483648; it may be 2147483647 or less"),
        ({"rows": 2**61}, "a tensor of 2305843009213693952 x 8 elements is too large"),
        ({"dtype": 3}, "dtype is 3; it may be FLOAT32, FLOAT16 or BFLOAT16"),
        ({"threshold": 65537}, "threshold is 65537; it may be 0 to 65536"),
        ({"threshold": 65535}, "seed is None; it must have 8 bytes"),
        ({"threshold": 65535, "seed": (64, 4)}, "seed has 4 bytes; it must have 8"),
        ({"scale": float("nan")}, "scale is nan; it may be any finite number"),
        ({"num_threads": 0}, "num_threads is 0; it may be 1 or more"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    tensor = torch.ones(2, 8)
    x = extension.memory(tensor)
    arguments = {"x": x, "bias": None, "residual": x, "out": x, "rows": 2, "cols": 8, "dtype": C.FLOAT32}
    arguments |= {"seed": None, "threshold": 65536, "scale": 1.0, "num_threads": 1}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        C.bias_dropout_residual_forward_host(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": (64, 60)}, "dy has 60 bytes; it must have 64"),
        ({"dx": (64, 60)}, "dx has 60 bytes; it must have 64"),
        ({"dbias": (64, 28)}, "dbias has 28 bytes; it must have 32"),
        ({"scratch": (64, 28)}, "scratch has 28 bytes; it must have 32"),
        ({"scratch": None}, "scratch is None; it must have 32 bytes"),
    ],
)
def test_bad_arguments_of_the_backward(change: dict[str, Any], message: str) -> None:
    tensors = torch.ones(2, 8), torch.ones(8)
    x, row = map(extension.memory, tensors)
    arguments = {"dy": x, "dx": x, "dbias": row, "scratch": row, "rows": 2, "cols": 8, "dtype": C.FLOAT32}
    arguments |= {"seed": None, "threshold": 65536, "scale": 1.0, "num_threads": 1}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        C.bias_dropout_residual_backward_host(**(arguments | change))


BYTES = dict.fromkeys(("dy", "dy2", "hidden", "dresidual", "dx"), 64) | dict.fromkeys(("mean", "rstd"), 8)
BYTES |= dict.fromkeys(("weight", "dbias", "dweight", "dln_bias"), 32) | {"scratch": 96}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: (64, size - 4)}, f"{name} has {size - 4} bytes; it must have {size}")
            for name, size in BYTES.items()
        ),
        *(
            ({name: None}, f"{name} is None; it must have {BYTES[name]} bytes")
            for name in ("dy", "hidden", "weight", "mean", "rstd", "dresidual", "scratch")
        ),
        ({"cols": -1}, "cols is -1; it may be 0 or more"),
        ({"parameter_dtype": 2}, "parameter_dtype is 2; it may be dtype or FLOAT32"),
        ({"dtype": 3, "parameter_dtype": 3}, "dtype is 3; it may be FLOAT32, FLOAT16 or BFLOAT16"),
        ({"threshold": 65535}, "seed is None; it must have 8 bytes"),
        ({"num_threads": 0}, "num_threads is 0; it may be 1 or more"),
    ],
)
def test_bad_arguments_of_the_fused_backward(change: dict[str, Any], message: str) -> None:
    memory = torch.ones(24)
    arguments: dict[str, Any] = {name: (memory.data_ptr(), size) for name, size in BYTES.items()}
    arguments |= {"rows": 2, "cols": 8, "dtype": C.FLOAT32, "parameter_dtype": C.FLOAT32, "num_threads": 1}
    arguments |= {"seed": None, "threshold": 65536, "scale": 1.0} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        C.bias_dropout_residual_layer_norm_backward_host(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: (64, size - 4)}, f"{name} has {size - 4} bytes; it must have {size}")
            for names, size in (
                (("x", "residual", "out", "hidden"), 64),
                (("bias", "weight", "ln_bias"), 32),
                (("mean", "rstd"), 8),
            )
            for name in names
        ),
        *(({name: None}, f"{name} is None; it must have 64 bytes") for name in ("x", "residual", "out")),
        *(({name: None}, f"{name} is None; it must have 32 bytes") for name in ("weight", "ln_bias")),
        ({"eps": float("nan")}, "eps is nan; it may be 0 or more"),
        ({"eps": -1.0}, "eps is -1.000000; it may be 0 or more"),
    ],
)
def test_bad_arguments_of_the_fused_forward(change: dict[str, Any], message: str) -> None:
    tensors = torch.ones(2, 8), torch.ones(8)
    x, row = map(extension.memory, tensors)
    arguments: dict[str, Any] = dict.fromkeys(("x", "residual", "out"), x)
    arguments |= dict.fromkeys(("weight", "ln_bias"), row) | dict.fromkeys(("bias", "hidden", "mean", "rstd", "seed"))
    arguments |= {"rows": 2, "cols": 8, "parameter_dtype": C.FLOAT32, "dtype": C.FLOAT32, "threshold": 65536}
    arguments |= {"eps": 1e-12, "scale": 1.0, "num_threads": 1} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        C.bias_dropout_residual_layer_norm_forward_host(**arguments)


def test_bad_arguments_of_attention_dropout() -> None:
    # Held by names: the first call writes to their memory.
    probabilities, one = torch.ones(2, 3, 4, 4), torch.tensor(1)
    memory, seed = extension.memory(probabilities), extension.memory(one)
    sizes = {"first_sequence": 0, "sequences": 2, "heads": 3, "queries": 4, "num_threads": 1}
    numbers = {"seed": seed, "threshold": 0, "scale": 1.0}
    C.attention_dropout_host(probabilities=memory, keys=4, **sizes, **numbers)
    assert not probabilities.any()
    with pytest.raises(ValueError, match=r"probabilities has 384 bytes; it must have 480$"):
        C.attention_dropout_host(probabilities=memory, keys=5, **sizes, **numbers)


def linear_arguments() -> dict[str, Any]:
    """A call of linear_forward: 5 rows, 32 features in, 64 out."""
    weight = torch.randn(64, 32)
    x, bias, other, y = torch.randn(5, 32), torch.randn(64), torch.randn(5, 64), torch.empty(5, 64)
    tensors = {"x": x, "packed": host_linear.pack(weight), "bias": bias, "other": other, "y": y}
    sizes = {"rows": 5, "depth": 32, "features": 64, "post": C.POST_ADD}
    return {**tensors, **sizes, "instructions": host_linear.instructions(x.dtype), "num_threads": 1}


def attention_arguments() -> dict[str, Any]:
    """A call of attention_forward: sequences of 3 and 2 rows, 2 heads of size 8."""
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    tensors = {"qkv": torch.randn(5, 3, 2, 8), "cu_seqlens": cu_seqlens}
    tensors |= {"out": torch.empty(5, 2, 8), "lse": torch.empty(2, 5)}
    sizes = {"rows": 5, "sequences": 2, "heads": 2, "size": 8, "max_seqlen": 3, "scale": 0.25}
    return {**tensors, **sizes, "instructions": host_linear.instructions(torch.float32), "num_threads": 1}


def layer_arguments() -> dict[str, Any]:
    """A call of encoder_layer_forward: sequences of 3 and 2 rows, 32 features in 2 heads, 64 in between."""
    shapes = ((96, 32), (32, 32), (64, 32), (32, 64))
    weights = [tensor for shape in shapes for tensor in (host_linear.pack(torch.randn(shape)), torch.randn(shape[0]))]
    tensors = {"x": torch.randn(5, 32), "y": torch.empty(5, 32), "cu_seqlens": torch.tensor([0, 3, 5]).int()}
    tensors |= {"scratch": torch.empty(5 * C.encoder_layer_scratch(32, 64)), "lse": torch.empty(2, 5)}
    sizes = {"rows": 5, "sequences": 2, "max_seqlen": 3, "heads": 2, "head_size": 16, "hidden": 32, "features": 64}
    numbers = {"gelu": C.POST_GELU_ERF, "scale": 0.25, "eps": [1e-12, 1e-12], "float_norms": True, "num_threads": 1}
    lists = {"weights": weights, "norms": list(torch.randn(4, 32))}
    return {**tensors, **lists, **sizes, **numbers, "instructions": host_linear.instructions(torch.float32)}


CALLS = {
    "linear_forward": linear_arguments,
    "attention_forward": attention_arguments,
    "encoder_layer_forward": layer_arguments,
}


def call_with(name: str, arguments: dict[str, Any]) -> Any:
    def converted(value: Any) -> Any:
        if isinstance(value, list):
            return [converted(item) for item in value]
        return extension.memory(value) if isinstance(value, Tensor) or value is None else value

    return getattr(C, name)(**{key: converted(value) for key, value in arguments.items()})


@simd
@pytest.mark.parametrize("name", CALLS)
def test_memory_of_the_right_size_is_taken(name: str) -> None:
    assert call_with(name, CALLS[name]()) in (True, None)


@simd
@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer"])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, key) for name, call in CALLS.items() for key in MEMORY[name]], ids="-".join
)
def test_memory_of_another_size_is_refused(name: str, argument: str, longer: bool) -> None:
    """Nothing is read or written beyond what the caller has: every length is compared with the sizes."""
    arguments = CALLS[name]()
    key, _, index = argument.partition("/")
    tensor = arguments[key][int(index)] if index else arguments[key]
    other = torch.cat([tensor.flatten(), tensor.flatten()[:1]]) if longer else tensor.flatten()[:-1].clone()
    if argument in ("packed", "y", "scratch") or (key == "weights" and int(index) % 2 == 0):
        memory = torch.empty(other.numel() + 16, dtype=other.dtype)
        other = memory[-memory.data_ptr() % 64 // 4 :][: other.numel()]
    if index:
        arguments[key][int(index)] = other
    else:
        arguments[key] = other
    if longer and argument in ("scratch", "lse") and name == "encoder_layer_forward":
        assert call_with(name, arguments)  # layers share them
        return
    size = "or more " if argument in ("scratch", "lse") and name == "encoder_layer_forward" else ""
    message = f"{NAMES.get(argument, argument)} has {other.nbytes} bytes; it must have {tensor.nbytes} {size}".strip()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call_with(name, arguments)


@simd
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear_forward", {"rows": -1}, "rows is -1; it may be 0 or more"),
        ("linear_forward", {"depth": 33}, "depth is 33; it may be a positive multiple of 32"),
        ("linear_forward", {"features": 0}, "features is 0; it may be a positive multiple of 32"),
        ("linear_forward", {"rows": 2**62}, "a tensor of 4611686018427387904 x 32 elements is too large"),
        ("linear_forward", {"post": 4}, "post is 4; it may be one of POST_*"),
        ("linear_forward", {"x": None}, "x is None; it must have 640 bytes"),
        ("linear_forward", {"other": None}, "other is None; it must have 1280 bytes"),
        ("linear_forward", {"num_threads": 0}, "num_threads is 0; it may be 1 or more"),
        ("attention_forward", {"sequences": -1}, "sequences is -1; it may be 0 or more"),
        ("attention_forward", {"heads": -1}, "heads is -1; it may be 0 or more"),
        ("attention_forward", {"size": 0}, "size is 0; it may be 1 or more"),
        ("attention_forward", {"scale": float("nan")}, "scale is nan; it may be any finite number"),
        ("attention_forward", {"scale": float("inf")}, "scale is inf; it may be any finite number"),
        ("attention_forward", {"cu_seqlens": None}, "cu_seqlens is None; it must have 12 bytes"),
        ("attention_forward", {"qkv": None}, "qkv is None; it must have 960 bytes"),
        ("encoder_layer_forward", {"hidden": 48}, "hidden is 48; it may be a positive multiple of 32"),
        ("encoder_layer_forward", {"heads": 0}, "heads is 0; it may be 1 or more"),
        ("encoder_layer_forward", {"heads": 3}, "3 heads of size 16 are not the 32 of hidden"),
        ("encoder_layer_forward", {"head_size": 8}, "2 heads of size 8 are not the 32 of hidden"),
        ("encoder_layer_forward", {"scale": float("nan")}, "scale is nan; it may be any finite number"),
        ("encoder_layer_forward", {"eps": [1e-12, -1.0]}, "eps is -1.000000; it may be 0 or more"),
        ("encoder_layer_forward", {"eps": [float("nan"), 0.0]}, "eps is nan; it may be 0 or more"),
        ("encoder_layer_forward", {"gelu": C.POST_NONE}, "gelu is 0; it may be POST_GELU_ERF or POST_GELU_TANH"),
        ("encoder_layer_forward", {"rows": -1}, "rows is -1; it may be 0 or more"),
    ],
)
def test_bad_numbers(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call_with(name, CALLS[name]() | change)


def matrices() -> tuple[Tensor, list[Tensor]]:
    """A table of one matrix for the checksums, and the tensors whose memory it names."""
    weight, samples = torch.ones(3, 5), torch.empty(8, 2, dtype=torch.int32)
    checksums = torch.empty(3, dtype=torch.int64)
    table = torch.tensor([[weight.data_ptr(), 3, 20, 4, samples.data_ptr(), 0, checksums.data_ptr()]])
    return table, [weight, samples, checksums]


def test_checksums_see_an_edit() -> None:
    table, (weight, *_) = matrices()
    C.checksums_remember(matrices=extension.memory(table), count=1)
    given = {"matrices": extension.memory(table), "count": 1, "turn": 1, "num_threads": 1}
    assert C.checksums_unchanged(**given)
    weight[1] = 0.0
    assert not C.checksums_unchanged(**given)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 0, "address is 0; it must be an address that is a multiple of 4"),
        (0, 4098, "address is 4098; it must be an address that is a multiple of 4"),
        (1, -1, "rows is -1; it may be 0 or more"),
        (1, 2**31, "rows is 2147483648; a matrix has at most 2^33 bytes"),
        (2, 3, "row_bytes is 3; it may be 4 or more"),
        (2, 22, "row_bytes is 22; it must be a multiple of 4"),
        (3, 8, "element_bytes is 8; it may be 2 or 4"),
        (4, 6, "samples is 6; it must be an address that is a multiple of 4"),
        (6, 12, "checksums is 12; it must be an address that is a multiple of 8"),
    ],
)
def test_a_bad_matrix_is_refused(column: int, value: int, message: str) -> None:
    table, _ = matrices()
    table[0, column] = value
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        C.checksums_remember(matrices=extension.memory(table), count=1)


def test_a_table_of_another_size_is_refused() -> None:
    table, _ = matrices()
    with pytest.raises(ValueError, match=r"^matrices has 56 bytes; it must have 112$"):
        C.checksums_remember(matrices=extension.memory(table), count=2)


def test_memory_is_that_of_a_contiguous_tensor() -> None:
    tensor = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert extension.memory(tensor) == (tensor.data_ptr(), 48)
    assert extension.memory(None) is None
    with pytest.raises(ValueError, match=r"a tensor of shape \(4, 3\) has strides \(6, 2\); it must be contiguous"):
        extension.memory(tensor[:, ::2])


def test_unknown_dtype() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.float64; fastbert\._C computes in torch\.float32"):
        extension.dtype_code(torch.float64)


@pytest.mark.skipif(extension.missing_cuda() is not None, reason=f"{extension.missing_cuda()}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_errors_are_raised() -> None:
    """Without a GPU, a launch raises what the CUDA runtime says, and so does the question whether one would work."""
    assert C.device_error()
    row, one = (16, 32), (16, 4)
    with pytest.raises(RuntimeError, match="cudaError"):
        C.bias_dropout_residual_backward_device(row, row, row, row, 1, 8, C.FLOAT32, None, 65536, 1.0, 0)
    with pytest.raises(RuntimeError, match="cudaError"):
        C.bias_dropout_residual_layer_norm_forward_device(
            *(row, None, row, row, row, C.FLOAT32, 1e-12, row, None, None, None),
            *(1, 8, C.FLOAT32, None, 65536, 1.0, 0),
        )
    with pytest.raises(RuntimeError, match="bias_dropout_residual_layer_norm backward: cudaError"):
        C.bias_dropout_residual_layer_norm_backward_device(
            *(row, None, row, row, C.FLOAT32, one, one, row, None, None, None, None, None),
            *(1, 8, C.FLOAT32, None, 65536, 1.0, 0),
        )


def end_of_the_last_segment(elf: bytes) -> int:
    """What the loader maps of a file: the program headers of the ELF format, version 1.2, figure 2-1."""
    start, size, count = (int.from_bytes(elf[at : at + wide], "little") for at, wide in ((32, 8), (54, 2), (56, 2)))
    headers = [elf[start + size * index :][:size] for index in range(count)]
    return max(int.from_bytes(h[8:16], "little") + int.from_bytes(h[32:40], "little") for h in headers)


def test_a_file_that_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_C.so"
    spec = SimpleNamespace(origin=str(path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    whole = Path(C.__file__).read_bytes()
    needed = end_of_the_last_segment(whole)
    # The last are for the loader to refuse.
    for complete in (whole, whole[:needed], b"no extension at all", whole[:63]):
        path.write_bytes(complete)
        extension._check_complete()
    for size in (needed - 1, needed // 2, 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(ImportError, match=rf"_C\.so is cut off: it has {size} bytes of at least \d+"):
            extension._check_complete()
    path.write_bytes(whole[: needed - 1])
    for found in (None, SimpleNamespace(origin=None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        extension._check_complete()


@pytest.mark.parametrize("error", [ImportError, OSError, SystemError, KeyError])
def test_an_extension_that_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(name: str) -> None:
        raise error("what there is")

    monkeypatch.setattr(importlib, "import_module", fail)
    module, reason = extension._attempt.__wrapped__()
    assert module is None
    assert f"fastbert._C could not be loaded ({error.__name__}: " in reason
    assert "what there is" in reason
    assert "reinstall with" in reason


def test_an_extension_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(build_info=lambda: {"version": "0.0.1"})
    monkeypatch.setattr(importlib, "import_module", lambda name: other)
    module, reason = extension._attempt.__wrapped__()
    assert module is None
    assert reason.startswith(f"fastbert._C was built for fastbert 0.0.1, and this is {fastbert.__version__}: reinstall")


def test_what_a_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cuda_absent": None, "cuda_version": "13.0", "cuda_architectures": "90"}
    made = SimpleNamespace(
        build_info=lambda: found, simd_level=lambda: 1, amx_missing=lambda: "no AMX here", device_error=lambda: None
    )
    monkeypatch.setattr(extension, "_attempt", lambda: extension._Attempt(made, None))
    assert extension.missing_amx() == "no AMX here"
    assert extension.missing_simd() is None
    assert extension.missing_cuda() is None
    monkeypatch.setattr(made, "simd_level", lambda: 0)
    assert "this processor lacks AVX2" in extension.missing_simd()
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    asked = extension._device_error.__wrapped__
    assert asked(0) is None
    monkeypatch.setattr(made, "device_error", lambda: "no kernel image")
    assert "built with CUDA 13.0 for 90, can't run on GPU 1 (no kernel image): update the driver" in asked(1)
    monkeypatch.setattr(extension, "_device_error", lambda index: f"device {index} is too old")
    assert extension.missing_on_device(1) == "device 1 is too old"
    found["cuda_absent"] = "nvcc is not there"
    assert extension.missing_on_device(1) == extension.missing_cuda()
    assert "was built without CUDA (nvcc is not there): install the CUDA toolkit" in extension.missing_cuda()
    monkeypatch.setattr(extension, "_attempt", lambda: extension._Attempt(None, "it is gone"))
    told = {extension.missing(), extension.missing_amx(), extension.missing_simd(), extension.missing_cuda()}
    assert told == {"it is gone"}
