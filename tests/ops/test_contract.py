"""What all ops promise: any layout, no uninitialised reads, repeatable, traceable, differentiable once."""

import functools
import subprocess
import sys
import textwrap
import threading

import parity
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops import problems
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastbert.backends import select

pytestmark = pytest.mark.triton
makers = pytest.mark.parametrize("maker", problems.MAKERS.values(), ids=problems.MAKERS)
dtypes = pytest.mark.parametrize("dtype", problems.DTYPES, ids=str)
DROPPING = [name for name in problems.MAKERS if problems.MAKERS[name]().dropout_p > 0.0]


def chunked(x):
    """The first part of rows that are twice as wide."""
    return torch.cat([x, torch.full_like(x, float("nan"))], dim=-1).chunk(2, dim=-1)[0]


def transposed(x):
    """The same values with the first and the last dimension swapped in memory: dense, not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def offset(x):
    """The same values one element further, so that no vector is aligned."""
    storage = x.new_full((x.numel() + 1,), float("nan"))
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def unaligned(x):
    """The same values one byte further, as a mapped file may hold them. A GPU has no such tensors."""
    if x.is_cuda or x.numel() == 0:
        return x
    memory = bytearray(x.numel() * x.itemsize + 1)
    found = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)
    return found.copy_(x)


def strided(x):
    """Every second row of a tensor."""
    return (
        torch.stack([x, torch.full_like(x, float("nan"))], dim=1)[:, 0] if x.ndim > 1 else x.repeat_interleave(2)[::2]
    )


def expanded(x):
    """One row for all, or with more dimensions one head (query, key and value) for all, in no memory of its own."""
    return (x[:, :1] if x.ndim > 2 else x[:1]).expand(x.shape)


@makers
@dtypes
@pytest.mark.parametrize("layout", [chunked, transposed, offset, unaligned, strided, expanded])
def test_layouts_case_17_and_18(maker, dtype, layout):
    problem = maker(dtype=dtype)
    plain = problem.tensors
    problem.tensors = {name: layout(x) for name, x in plain.items()}
    problem.dy = layout(torch.randn_like(problem.actual(**plain)) if problem.dy is None else problem.dy)
    assert all(problem.tensors[name].shape == x.shape for name, x in plain.items())
    problem.check()


LAYOUTS = (torch.clone, chunked, transposed, offset, strided, expanded)
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=2).flatmap(
    lambda batch: st.tuples(*map(st.just, batch), st.integers(4, 40))
)
SIZES = {
    "attention": st.fixed_dictionaries(
        {
            # With one sequence of a usual length: eager PyTorch makes no errors to compare with on single tokens.
            "lengths": st.lists(st.integers(0, 20), max_size=5).map(lambda lengths: [*lengths, 16]),
            "heads": st.integers(1, 4),
            "size": st.integers(3, 40),
            "spare_rows": st.integers(0, 3),
            "spare_keys": st.integers(0, 9),
        }
    ),
    "linear_gelu": st.fixed_dictionaries({"shape": SHAPES, "features": st.integers(4, 20)}),
    "embedding_layer_norm": st.fixed_dictionaries({"tokens": st.integers(0, 40), "hidden": st.integers(4, 40)}),
}


@makers
@given(data=st.data(), dtype=st.sampled_from(problems.DTYPES), seed=st.integers(0, 2**32))
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_anything_case_46(maker, data, dtype, seed):
    torch.manual_seed(seed)
    op = maker().op
    options = data.draw(SIZES.get(op, st.fixed_dictionaries({"shape": SHAPES})))
    if maker().dropout_p > 0.0:
        options |= {"p": data.draw(st.sampled_from([1e-4, 0.1, 0.5, 1.0])), "seed": seed - 2**31}
    problem = maker(dtype=dtype, **options)
    problem.tensors = {name: data.draw(st.sampled_from(LAYOUTS))(x) for name, x in problem.tensors.items()}
    problem.dy = data.draw(st.sampled_from(LAYOUTS))(
        parity.gradient_like(problem.eager(**problem.tensors)) if problem.dy is None else problem.dy
    )
    problem.check(roundings=8)


@makers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uninitialised_memory_case_13(maker, dtype, poisoned_allocator):
    maker(dtype=dtype).check()


@makers
def test_gradcheck_case_34(maker):
    """Both the explicit backward of the reference and autograd's way through its forward."""
    # Without the rows of no sequence and the padding row: their derivatives are zero by decree.
    changes = {
        "attention": {"lengths": (3, 0, 1, 2), "size": 4, "spare_rows": 0},
        "embedding_layer_norm": {"tokens": 6, "hidden": 5, "padding_idx": None},
    }
    op = maker().op
    problem = maker(dtype=torch.float64, **changes.get(op, {"shape": (2, 2, 5)}))
    leaves = [x.requires_grad_() for x in problem.tensors.values()]

    def call(function, *xs):
        return function(**dict(zip(problem.tensors, xs, strict=True)))

    for function in (functools.partial(problem.actual, impl="reference"), problem.oracle):
        torch.autograd.gradcheck(functools.partial(call, function), leaves)


@makers
def test_explicit_backward_is_autograd_s(maker):
    problem = maker(dtype=torch.float64)
    _, explicit = parity.results(functools.partial(problem.actual, impl="reference"), problem.tensors, problem.dy)
    _, automatic = parity.results(problem.oracle, problem.tensors, problem.dy)
    for name, gradient in automatic.items():
        torch.testing.assert_close(explicit[name], gradient, rtol=1e-11, atol=1e-11)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every fastbert op that runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastbert":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@makers
@pytest.mark.parametrize("layout", [torch.clone, transposed], ids=["contiguous", "permuted"])
def test_opcheck_case_34(maker, layout):
    problem = maker()
    problem.tensors = {name: layout(x) for name, x in problem.tensors.items()}
    for impl in problem.implementations():
        with Recorder() as recorder:
            parity.results(functools.partial(problem.actual, impl=impl), problem.tensors, problem.dy)
        (forward, forward_args), (backward, backward_args) = recorder.calls
        assert forward is getattr(torch.ops.fastbert, problem.op).default
        assert backward is getattr(torch.ops.fastbert, f"{problem.op}_bwd").default
        torch.library.opcheck(forward, _leaves(forward_args, requires_grad=True))
        torch.library.opcheck(backward, _leaves(backward_args, requires_grad=False))


def _leaves(args, requires_grad):
    return tuple(
        x.detach().requires_grad_(requires_grad and x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for x in args
    )


@makers
def test_output_is_contiguous_and_its_own(maker):
    problem = maker()
    problem.tensors = {name: transposed(x) for name, x in problem.tensors.items()}
    taken = {x.untyped_storage().data_ptr() for x in problem.tensors.values()}
    for impl in problem.implementations():
        output, gradients = parity.results(functools.partial(problem.actual, impl=impl), problem.tensors, problem.dy)
        assert output.is_contiguous()
        assert output.dtype == torch.float32
        assert output.untyped_storage().data_ptr() not in taken
        assert all(gradients[f"gradient of {name}"].shape == x.shape for name, x in problem.tensors.items())


@makers
def test_frozen_arguments(maker):
    """One gradient alone is what it is among all of them."""
    problem = maker()
    for impl in problem.implementations():
        function = functools.partial(problem.actual, impl=impl)
        _, everything = parity.results(function, problem.tensors, problem.dy)
        for name in problem.tensors:
            frozen = {other: x for other, x in problem.tensors.items() if other != name}
            _, alone = parity.results(functools.partial(function, **frozen), {name: problem.tensors[name]}, problem.dy)
            key = f"gradient of {name}"
            torch.testing.assert_close(alone[key], everything[key], rtol=0.0, atol=0.0, equal_nan=True)


@makers
def test_double_backward_raises(maker):
    problem = maker()
    for impl in problem.implementations():
        leaves = {name: x.clone().requires_grad_() for name, x in problem.tensors.items()}
        output = problem.actual(**leaves, impl=impl)
        gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()), create_graph=True)
        with pytest.raises(RuntimeError, match=f"{problem.op} has no second derivative"):
            torch.autograd.grad(sum(x.sum() for x in gradients), list(leaves.values()))


@makers
def test_unknown_implementation(maker):
    problem = maker()
    with pytest.raises(ValueError, match=rf"{problem.op}: impl is 'fastest'; it may be None or one of .*reference"):
        problem.actual(**problem.tensors, impl="fastest")


@makers
def test_a_tensor_on_another_device(maker):
    problem = maker()
    for name, x in problem.tensors.items():
        with pytest.raises(ValueError, match=r"is on (cpu|meta); it must be on (cpu|meta)"):
            problem.actual(**{**problem.tensors, name: x.to("meta")})


@makers
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(maker, dynamic, fresh_dynamo):
    problem = maker()
    compiled = torch.compile(problem.actual, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected_output, expected = parity.results(problem.actual, problem.tensors, problem.dy)
    output, gradients = parity.results(compiled, problem.tensors, problem.dy)
    assert torch.equal(output, expected_output)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0.0, atol=0.0)


class _Module(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self, **tensors):
        return self.problem.actual(**tensors)


@makers
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(maker, strict, fresh_dynamo):
    problem = maker()
    program = torch.export.export(_Module(problem), (), problem.tensors, strict=strict)
    assert any(problem.op in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(**problem.tensors), problem.actual(**problem.tensors))


@makers
def test_autocast_changes_no_arithmetic_inside(maker):
    """The ops have no autocast rule: they compute in the dtype of their arguments (linear_gelu casts those)."""
    problem = maker()
    if problem.op == "linear_gelu":
        pytest.skip("test_linear_gelu.py has its rule")
    for impl in problem.implementations():
        expected = problem.actual(**problem.tensors, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(problem.actual(**problem.tensors, impl=impl), expected)


@pytest.mark.skipif("triton" not in problems.layer_norm().implementations(), reason="Triton's kernels don't run here")
@pytest.mark.parametrize("name", ["layer_norm", "bias_gelu", "embedding_layer_norm"])
def test_sums_of_more_rows_than_programs(name, monkeypatch):
    """Triton's kernels sum gradients of weights and biases in a few programs a multiprocessor, here of one."""
    problem = problems.MAKERS[name]()
    monkeypatch.setattr(select.load(problem.op, "triton"), "multiprocessors", lambda device: 1)
    problem.check("triton")


@makers
def test_repeats_are_bitwise_equal_case_31(maker):
    problem = maker(dtype=torch.bfloat16)
    for impl in problem.implementations():
        function = functools.partial(problem.actual, impl=impl)
        first_output, first = parity.results(function, problem.tensors, problem.dy)
        for _ in range(20):
            output, gradients = parity.results(function, problem.tensors, problem.dy)
            assert torch.equal(output, first_output)
            assert all(torch.equal(gradients[name], first[name]) for name in first)


@pytest.mark.parametrize("name", DROPPING)
def test_same_seed_in_other_buffers_case_27(name):
    problem = problems.MAKERS[name]()
    output = problem.actual(**problem.tensors)
    keep = [torch.empty(1000) for _ in range(5)]  # so that the next tensors lie elsewhere
    again = problem.actual(**{name: offset(x) for name, x in problem.tensors.items()})
    assert torch.equal(output, again)
    assert keep


@pytest.mark.parametrize("name", DROPPING)
def test_implementations_draw_one_mask_case_27(name):
    problem = problems.MAKERS[name](p=0.5)
    outputs = [problem.actual(**problem.tensors, impl=impl) for impl in problem.implementations()]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_checkpoint_case_28(name, use_reentrant):
    """The recomputed forward draws the first one's mask; the op draws its seed itself from torch's generator."""
    problem = problems.MAKERS[name](seed=None)

    def gradients(call):
        torch.manual_seed(7)
        leaves = {name: x.clone().requires_grad_() for name, x in problem.tensors.items()}
        output = call(*leaves.values())
        output.backward(torch.ones_like(output) if problem.dy is None else problem.dy)
        return [x.grad for x in leaves.values()]

    def call(*xs):
        return problem.actual(**dict(zip(problem.tensors, xs, strict=True)))

    plain = gradients(call)
    checkpointed = gradients(lambda *xs: checkpoint(call, *xs, use_reentrant=use_reentrant))
    assert all(torch.equal(x, y) for x, y in zip(checkpointed, plain, strict=True))


@makers
def test_threads_case_33(maker):
    """Eight threads at once compute what one does."""
    problem = maker()
    expected_output, expected = parity.results(problem.actual, problem.tensors, problem.dy)
    outcomes = {}

    def work(index):
        for _ in range(5):
            outcomes[index] = parity.results(problem.actual, problem.tensors, problem.dy)

    _in_threads(work)
    assert len(outcomes) == 8
    for output, gradients in outcomes.values():
        assert torch.equal(output, expected_output)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def _in_threads(work):
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


COLD = textwrap.dedent(
    """
    import threading, torch
    from fastbert import ops
    torch.manual_seed(0)
    x, row = torch.randn(6, 8), torch.randn(8)
    qkv, cu_seqlens = torch.randn(6, 3, 2, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    start, outcomes = threading.Barrier(8), []

    def work():
        start.wait()
        seed = torch.tensor([3])
        outcomes.append([
            ops.bias_dropout_residual_layer_norm(x, row, x, row, row, 1e-5, p=0.1, seed=seed),
            ops.bias_gelu(x, row),
            ops.linear_gelu(x, x, None),
            ops.attention(qkv, cu_seqlens, 4),
            ops.attention(qkv, cu_seqlens, 4, dropout_p=0.1, seed=seed),
        ])

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(outcomes) == 8, len(outcomes)
    assert all(torch.equal(a, b) for other in outcomes for a, b in zip(other, outcomes[0], strict=True))
    """
)


@pytest.mark.skipif(select._TRITON_DEVICE == "cpu", reason="a new process has Triton's kernels for a GPU")
def test_threads_with_cold_caches_case_33():
    """The first calls of a process, eight at a time: implementations and the extension load in them."""
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@makers
def test_the_first_result_alone_has_a_gradient(maker):
    """And the backward is given no zeros for the others, which would be as large as they are."""
    problem = maker()
    for impl in problem.implementations():
        with Recorder() as recorder:
            parity.results(functools.partial(problem.actual, impl=impl), problem.tensors, problem.dy)
        forward, arguments = recorder.calls[0]
        results = forward(*_leaves(arguments, requires_grad=True))
        first, *rest = results if isinstance(results, tuple) else (results,)
        assert first.requires_grad
        assert not any(result.requires_grad for result in rest)
        made = []

        class Allocations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, made=made):
                made.append(str(func))
                return func(*args, **(kwargs or {}))

        with Allocations():
            first.backward(torch.ones_like(first) if problem.dy is None else problem.dy)
        before = made[: next(i for i, name in enumerate(made) if name.startswith("fastbert."))]
        assert not [name for name in before if "zeros" in name]


@pytest.mark.parametrize("name", sorted({"linear_gelu", "bias_dropout_residual_layer_norm"} & problems.MAKERS.keys()))
def test_nothing_is_kept_where_there_is_no_backward(name):
    problem = problems.MAKERS[name]()
    for impl in problem.implementations():
        for differentiated, asked in ((False, True), (True, False), (True, True)):
            leaves = {key: x.clone().requires_grad_(asked) for key, x in problem.tensors.items()}
            with torch.set_grad_enabled(differentiated), Recorder() as recorder:
                problem.actual(**leaves, impl=impl)
            function, arguments = recorder.calls[0]
            kept = function(*_leaves(arguments, requires_grad=False))[1:]
            assert any(x.numel() for x in kept) == (differentiated and asked)
