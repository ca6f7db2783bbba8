"""Packed attention: every length and head size, empty sequences, rows of no sequence, and its dropout."""

import importlib
import math
import sys
import types

import instructions
import pytest
import torch
from ops import problems
from ops.problems import attention

from fastbert import ops
from fastbert.backends import launch, philox, select
from fastbert.ops.attention import reference, torch_varlen

pytestmark = pytest.mark.triton
IMPLEMENTATIONS = attention().implementations()
IN_DTYPES = [(dtype, impl) for dtype in problems.DTYPES for impl in attention(dtype=dtype).implementations()]
DROPPING = attention(p=0.1).implementations()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 511, 512])
def test_lengths_case_9(length, p):
    attention(lengths=(length, length // 3), heads=2 if length < 500 else 1, size=8, p=p).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [31, 36, 47, 48, 49, 127])
def test_lengths_around_vectors_in_16_bits(length, dtype):
    """The CPU's kernel is given hidden keys there."""
    attention(lengths=(length, 3, length, length), heads=2, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_several_blocks_in_16_bits_case_9(p, dtype):
    """More than 128 keys: blocks of queries, the online softmax, and blocks that have nothing to do."""
    attention(lengths=(300, 1, 0, 129, 64), heads=1, size=32, dtype=dtype, p=p).check()


@pytest.mark.parametrize("name", ["AVX2", "AVX512"])
@pytest.mark.parametrize("size", [1, 31, 64, 400])
def test_instruction_sets(size, name, monkeypatch):
    """Tiles of every number of queries, parts of tiles, and more keys and more features than are summed in one go."""
    instructions.use(name, monkeypatch)
    attention(lengths=(*range(3, 20), 0, 390), heads=2, size=size).check("simd")


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="Triton's kernels alone have tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (32, 32)])
def test_other_tiles_case_27(block_m, block_n, dtype, monkeypatch):
    """The same masks and sums, forward and backward, whatever the tiles: parity is with one oracle."""
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(launch, "options", lambda kernel, shapes: {"KEYS": 0} if "whole" in shapes else dict(tiles))
    attention(lengths=(70, 0, 33, 3), heads=2, size=24, dtype=dtype, p=0.3).check("triton")
    uniform_weights = uniform([70], 2).to(dtype)
    seed = torch.tensor([problems.SEED])
    output = ops.attention(uniform_weights, problems.cumulative([70]), 70, dropout_p=0.3, seed=seed, impl="triton")
    expected = philox.attention_mask(seed, torch.tensor([0]), 2, 70, 70, 0.3)[0]
    assert torch.equal(output[:, :, :70].transpose(0, 1) != 0, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 32, 40, 59, 64, 80, 96, 128])
def test_head_sizes_case_10(size, dtype):
    attention(lengths=(5, 21), heads=2, size=size, dtype=dtype).check()
    attention(lengths=(5, 21), heads=2, size=size, dtype=dtype, p=0.1).check()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(0, 4, 0, 0, 7, 1), (7, 7, 7, 0, 2, 2)], ids=str)
def test_empty_and_short_sequences_case_12(lengths, p):
    attention(lengths, p=p).check()
    attention(lengths, p=p, spare_rows=0, spare_keys=0).check()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (0, 0), (1,), (0, 1, 0), (1,) * 65_537],
    ids=["none", "0", "0-0", "1", "0-1-0", "many"],
)
def test_at_most_one_token_case_11_12_and_20(lengths, spare, p):
    """The probability of the only key is one: eager PyTorch makes no error that parity could allow twice."""
    if select._TRITON_DEVICE == "cpu" and len(lengths) > 1000 and not (p and spare):
        pytest.skip("as many programs run with dropout and spare rows, and show all that these would in ten seconds")
    heads = 1 if len(lengths) > 1000 else 2
    problem = attention(lengths, heads=heads, size=2, p=p, spare_rows=spare, spare_keys=spare)
    tokens = sum(lengths)
    qkv = problem.tensors["qkv"].requires_grad_()
    factor = torch.ones(tokens, heads, 1)
    if p > 0.0:
        sequence = torch.tensor([index for index, length in enumerate(lengths) if length])
        keep = philox.attention_mask(torch.tensor([problems.SEED]), sequence.long(), heads, 1, 1, p)
        factor = keep[:, :, 0] * philox.attention_scale(p)
    for impl in problem.implementations():
        output = problem.actual(qkv, impl=impl)
        (gradient,) = torch.autograd.grad(output, qkv, problem.dy)
        torch.testing.assert_close(output[:tokens], qkv[:tokens, 2] * factor, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient[:tokens, 2], problem.dy[:tokens] * factor, rtol=1e-6, atol=1e-6)
        assert (gradient[:tokens, :2].abs() < 1e-5).all()
        assert (output[tokens:] == 0).all()
        assert (gradient[tokens:] == 0).all()


def strided(offsets):
    """The same in every second place; what is between them is no offset."""
    return torch.stack([offsets, torch.full_like(offsets, 7)], 1).flatten()[::2]


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(3, 0, 17, 1, 19), (140, 3)], ids=str)
def test_strided_offsets_case_55(lengths, p, dtype):
    """Those of every second place, where a program has a whole sequence and where it has a part of one."""
    problem = attention(lengths, heads=2, dtype=dtype, p=p)
    qkv, offsets = problem.tensors["qkv"].requires_grad_(), problems.cumulative(lengths)
    assert not strided(offsets).is_contiguous()
    for impl in problem.implementations():
        results = []
        for given in (offsets, strided(offsets)):
            seed = problems.seed_of(p, problems.SEED)
            output = ops.attention(qkv, given, max(lengths), dropout_p=p, seed=seed, impl=impl)
            results.append((output, *torch.autograd.grad(output, qkv, problem.dy)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)), impl


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rows_of_no_sequence_case_12(p):
    """They hold NaN, as does their incoming gradient: zeros come out, and nobody else sees it."""
    problem = attention(lengths=(4, 6), spare_rows=5, p=p)
    plain = attention(lengths=(4, 6), spare_rows=0, p=p)
    plain.tensors = {"qkv": problem.tensors["qkv"][:10].clone()}
    for impl in problem.implementations():
        qkv, other = (x.tensors["qkv"].requires_grad_() for x in (problem, plain))
        output, expected = problem.actual(qkv, impl=impl), plain.actual(other, impl=impl)
        (gradient,) = torch.autograd.grad(output, qkv, problem.dy)
        (expected_gradient,) = torch.autograd.grad(expected, other, problem.dy[:10])
        assert (output[10:] == 0).all()
        assert (gradient[10:] == 0).all()
        assert torch.equal(output[:10], expected)
        assert torch.equal(gradient[:10], expected_gradient)


def test_more_than_65536_rows_case_20():
    attention(lengths=[65] * 1010, heads=1, size=4).check()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.1, 0.0, -0.3])
def test_scale(scale, impl):
    attention(scale=scale).check(impl)
    attention(lengths=(5, 130), heads=1, scale=scale).check(impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale_is_one_over_the_root_of_the_head_size(impl):
    qkv, cu_seqlens = torch.randn(4, 3, 1, 9), problems.cumulative([4])
    default = ops.attention(qkv, cu_seqlens, 4, impl=impl)
    assert torch.equal(default, ops.attention(qkv, cu_seqlens, 4, scale=1.0 / 3.0, impl=impl))


@pytest.mark.parametrize(("dtype", "impl"), IN_DTYPES)
@pytest.mark.parametrize("lengths", [(3, 0, 37, 1, 19), (140, 3)], ids=str)
def test_large_scores(dtype, lengths, impl):
    """Scores of some thousands: the largest is subtracted before the exponential.

    PyTorch's kernel, and Triton's for long sequences, take the probabilities of their backward from the log-sum-exp,
    whose rounding grows with the scores.
    """
    problem = attention(lengths, dtype=dtype)
    problem.tensors = {"qkv": problem.tensors["qkv"] * 30.0}
    from_lse = impl in ("sdpa", "simd") or (impl == "triton" and max(lengths) > 128)
    problem.check(impl, roundings=1000 if from_lse else 1)


@pytest.mark.parametrize(("dtype", "impl"), IN_DTYPES)
def test_log_sum_exp(impl, dtype):
    """[A, T] in float32, zero in rows of no sequence."""
    problem = attention(lengths=(3, 0, 40), heads=2, size=8, dtype=dtype)
    qkv = problem.tensors["qkv"]
    out, lse = torch.ops.fastbert.attention(qkv, problems.cumulative([3, 0, 40]), 40, 0.25, 0.0, None, impl)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    expected = torch.zeros(2, 46, dtype=torch.float64)
    for start, end in ((0, 3), (3, 43)):
        q, k, _ = qkv[start:end].double().permute(1, 2, 0, 3)
        expected[:, start:end] = torch.logsumexp(0.25 * q @ k.mT, -1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)
    assert (lse[:, 43:] == 0).all()


def uniform(lengths, heads):
    """Each probability is one over the length, and the values are a one-hot code of the key."""
    size = max(lengths)
    parts = [
        torch.stack([torch.zeros(n, heads, size)] * 2 + [torch.eye(n, size)[:, None].expand(-1, heads, -1)], 1)
        for n in lengths
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("impl", DROPPING)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_the_oracle_s_case_26_and_28(impl, p):
    """Read off the output and off the gradient of the values, for each sequence, head, query and key."""
    lengths, heads = (5, 5, 0, 17, 33), 3
    seed = torch.tensor([problems.SEED])
    qkv = uniform([n for n in lengths if n], heads).requires_grad_()
    output = ops.attention(qkv, problems.cumulative(lengths), 33, dropout_p=p, seed=seed, impl=impl)
    (gradient,) = torch.autograd.grad(output, qkv, qkv[:, 2].detach())  # that of each query is a one-hot code, too
    row = 0
    for sequence, length in enumerate(lengths):
        expected = philox.attention_mask(seed, torch.tensor([sequence]), heads, length, length, p)[0]
        rows = slice(row, row + length)
        assert torch.equal(output[rows, :, :length].transpose(0, 1) != 0, expected)
        assert torch.equal(gradient[rows, 2, :, :length].permute(1, 2, 0) != 0, expected)
        row += length


@pytest.mark.parametrize("impl", DROPPING)
def test_kept_fraction_case_26(impl):
    qkv = uniform([128, 128], 8)
    output = ops.attention(qkv, problems.cumulative([128, 128]), 128, dropout_p=0.1, impl=impl)
    assert abs((output != 0).double().mean().item() - 0.9) < 0.01
    torch.testing.assert_close(output[output != 0].unique(), torch.tensor([philox.attention_scale(0.1) / 128]))


@pytest.mark.parametrize("impl", DROPPING)
def test_everything_dropped_case_26(impl):
    problem = attention(p=1.0, spare_rows=0)
    qkv = problem.tensors["qkv"].requires_grad_()
    output = problem.actual(qkv, impl=impl)
    (gradient,) = torch.autograd.grad(output.sum(), qkv)
    assert (output == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_dropped_case_26(impl):
    problem = attention()
    plain = problem.actual(**problem.tensors, impl=impl)
    tiny = attention(p=1e-9)
    assert torch.equal(tiny.actual(**problem.tensors, impl=impl), plain)


@pytest.mark.parametrize("impl", DROPPING)
def test_the_mask_depends_on_no_padding_case_27(impl):
    """Neither max_seqlen nor rows of no sequence change it."""
    qkv, cu_seqlens, seed = torch.randn(20, 3, 2, 8), problems.cumulative([9, 7]), torch.tensor([3])
    outputs = [
        ops.attention(qkv[:rows], cu_seqlens, max_seqlen, dropout_p=0.5, seed=seed, impl=impl)[:16]
        for rows, max_seqlen in ((16, 9), (20, 9), (16, 31))
    ]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


def test_dropout_is_refused_by_name():
    with pytest.raises(select.UnsupportedError, match=r"sdpa.*can't draw the exact dropout mask"):
        attention(p=0.1).actual(**attention().tensors, impl="sdpa")


def kernel_of_others(q, k, v, cu_seqlens, other_cu_seqlens, max_seqlen, other_max_seqlen, scale):
    """What the two flash attentions compute, with NaN in rows of no sequence. They refuse offsets with strides."""
    assert cu_seqlens is other_cu_seqlens
    assert cu_seqlens.is_contiguous()
    assert max_seqlen == other_max_seqlen
    out, lse = reference.forward(torch.stack([q, k, v], 1), cu_seqlens, max_seqlen, scale, 0.0, None)
    out[cu_seqlens[-1] :], lse[:, cu_seqlens[-1] :] = torch.nan, torch.nan
    return out, lse


def gradient_of_others(dout, q, k, v, out, lse, cu_seqlens, other_cu_seqlens, max_seqlen, other_max_seqlen, scale):
    """Their dqkv, with NaN in rows of no sequence."""
    assert cu_seqlens is other_cu_seqlens
    assert cu_seqlens.is_contiguous()
    assert max_seqlen == other_max_seqlen
    qkv = torch.stack([q, k, v], 1)
    gradient = reference.backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, 0.0, None)
    gradient[cu_seqlens[-1] :] = torch.nan
    return gradient


class StandInForTorch:
    """``torch.ops.aten`` with PyTorch's arguments and results."""

    @staticmethod
    def _flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, debug, *, scale):
        assert (dropout_p, is_causal, debug) == (0.0, False, False)
        return *kernel_of_others(q, k, v, cu_q, cu_k, max_q, max_k, scale), None, None, None

    @staticmethod
    def _flash_attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale
    ):
        assert (dropout_p, is_causal, rng_state.shape) == (0.0, False, (2,))
        return gradient_of_others(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale).unbind(1)


class StandInForFlashAttn:
    """``flash_attn.flash_attn_interface`` with its arguments and results."""

    @staticmethod
    def _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal):
        assert (dropout_p, causal) == (0.0, False)
        return *kernel_of_others(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale), None, None

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes, deterministic) == (0.0, False, 0.0, None, True)
        assert (window_size_left, window_size_right) == (-1, -1)
        gradient = gradient_of_others(dout, q, k, v, out, softmax_lse, cu_q, cu_k, max_q, max_k, softmax_scale)
        for result, part in zip((dq, dk, dv), gradient.unbind(1), strict=True):
            result[: cu_q[-1]] = part[: cu_q[-1]]


@pytest.mark.parametrize("name", ["torch_varlen", "flash_attn"])
def test_flash_attention_of_others(name, monkeypatch):
    """Their kernels need a GPU: what is passed to them and made of their results is tested with stand-ins."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = StandInForFlashAttn
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(sys.modules, "fastbert.ops.attention.flash_attn", raising=False)
    module = importlib.import_module(f"fastbert.ops.attention.{name}")
    monkeypatch.setattr(torch_varlen, "_aten", StandInForTorch)
    problem = attention(lengths=(3, 0, 6), spare_rows=2)
    qkv, dout = problem.tensors["qkv"], problem.dy.clone()
    dout[9:] = 0.0
    arguments = (strided(problems.cumulative([3, 0, 6])), 6, 0.3, 0.0, None)
    out, lse = module.forward(qkv, *arguments)
    expected_out, expected_lse = reference.forward(qkv, *arguments)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    assert torch.equal(
        module.backward(dout, qkv, out, lse, *arguments), reference.backward(dout, qkv, out, lse, *arguments)
    )


def test_arguments_of_torch_s_flash_attention():
    """PyTorch checks them on tensors without memory."""
    qkv = torch.empty(20, 3, 2, 64, dtype=torch.bfloat16, device="meta")
    arguments = (torch.empty(4, dtype=torch.int32, device="meta"), 9, 0.125, 0.0, None)
    out, lse = torch_varlen.forward(qkv, *arguments)
    assert (out.shape, lse.shape, lse.dtype) == ((20, 2, 64), (2, 20), torch.float32)
    assert torch_varlen.backward(out, qkv, out, lse, *arguments).shape == qkv.shape


@pytest.mark.parametrize("name", ["torch_varlen", "flash_attn"])
def test_why_flash_attention_of_others_cannot_serve(name):
    def reasons_of(device):
        rows = select.table("attention").explain(select.Request(device, torch.float32, 0.1, 60))
        return "; ".join(*[row.reasons for row in rows if row.implementation == name])

    assert reasons_of("cpu") == "it runs on cuda, and the tensors are on cpu"
    reasons = reasons_of("cuda")
    assert "it computes in float16, bfloat16" in reasons
    assert "can't draw the exact dropout mask" in reasons
    assert "multiples of 8 up to 256, and this one is 60" in reasons
    assert ("the package flash-attn can't be imported" in reasons) == (name == "flash_attn")


def call(qkv=None, cu_seqlens=None, max_seqlen=4, **options):
    qkv = torch.randn(4, 3, 2, 8) if qkv is None else qkv
    cu_seqlens = problems.cumulative([4]) if cu_seqlens is None else cu_seqlens
    return ops.attention(qkv, cu_seqlens, max_seqlen, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"qkv": torch.zeros(4, 3, 2, 8, dtype=torch.int64)}, TypeError, r"qkv has dtype torch.int64; it may be"),
        ({"qkv": torch.zeros(4, 2, 2, 8)}, ValueError, r"qkv has shape \(4, 2, 2, 8\); it must be \(T, 3, A, D\)"),
        ({"qkv": torch.zeros(4, 48)}, ValueError, r"qkv has shape \(4, 48\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, r"cu_seqlens has dtype torch.int64; it must be torch.int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, r"cu_seqlens has shape \(0,\)"),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, r"cu_seqlens has shape \(1, 2\)"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "cu_seqlens is on meta"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen is -1"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; it must be between 0 and 1"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1.0])}, TypeError, "seed has dtype torch.float32"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1, 2])}, ValueError, r"seed has shape \(2,\)"),
        ({"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name not in ("reference", "triton")])
@pytest.mark.parametrize("offsets", [[1, 4], [0, 5], [0, 3, 2, 4], [0, 6]], ids=str)
def test_offsets_that_do_not_fit(impl, offsets):
    """A CPU can see them."""
    with pytest.raises(ValueError, match=r"cu_seqlens is .*; it must ascend from 0 to at most 5"):
        call(torch.randn(5, 3, 2, 8), torch.tensor(offsets, dtype=torch.int32), max_seqlen=4, impl=impl)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="the other implementations look at the offsets first")
@pytest.mark.parametrize("max_seqlen", [16, 300], ids=["short", "long"])
@pytest.mark.parametrize(
    "offsets", [[-5, 10], [0, -40, 10], [4, -(2**31), 20], [0, 2**31 - 1], [-9, -3], [18, 3]], ids=str
)
def test_offsets_that_do_not_fit_stay_within_the_tensors(offsets, max_seqlen, monkeypatch):
    """A GPU can't say that they are wrong; rows around the tensors keep their numbers, and NaN there is not read."""
    rows, heads, size, guard = 16, 2, 16, 4096
    stores = []

    def guarded(shape, dtype, fill):
        store = torch.full([2 * guard + math.prod(shape)], fill, dtype=dtype)
        stores.append((store, fill))
        return store[guard:-guard].view(shape)

    def guarded_like(like, *shape, dtype=None, device=None):
        return guarded(torch.Size(shape if isinstance(shape[0], int) else shape[0]), dtype or like.dtype, 7.0)

    triton = select.load("attention", "triton")
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    qkv = guarded((rows, 3, heads, size), torch.float32, torch.nan).normal_()
    dout = guarded((rows, heads, size), torch.float32, torch.nan).normal_()
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_like)
    monkeypatch.setattr(torch, "empty_like", lambda like: guarded_like(like, like.shape))

    def results(cu_seqlens):
        out, lse = triton.forward(qkv, cu_seqlens, max_seqlen, 0.25, 0.0, None)
        return out, lse, triton.backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, 0.25, 0.0, None)

    actual = results(cu_seqlens)
    for store, fill in stores[2:]:
        assert (store[:guard] == fill).all()
        assert (store[-guard:] == fill).all()
    for tensor, expected in zip(actual, results(cu_seqlens.clamp(0, rows)), strict=True):
        assert not tensor.isnan().any()
        assert torch.equal(tensor, expected)
