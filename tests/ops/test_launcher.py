"""Launches that keep the compiled kernel: the one that Triton would choose, and no other."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing is launched")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastbert.backends import launcher, triton_utils
from fastbert.backends.launcher import Launcher
from fastbert.ops.attention import triton as attention
from fastbert.ops.bias_gelu import triton as bias_gelu
from fastbert.ops.embedding_layer_norm import triton as embedding_layer_norm
from fastbert.ops.layer_norm import triton as layer_norm
from fastbert.ops.linear_gelu import persistent
from fastbert.ops.linear_gelu import triton as linear_gelu
from fastbert.ops.unpad import triton as unpad


class OnGPU:
    """What is asked of a tensor."""

    def __init__(self, address=64, dtype=torch.float32, device=0, is_cuda=True):
        self.data_ptr, self.dtype, self.get_device, self.is_cuda = lambda: address, dtype, lambda: device, is_cuda


class Kernel:
    """x_ptr, stride_x, seed_ptr, rows and the constants H and BLOCK, in place of a kernel of Triton."""

    def __init__(self, compiles=True):
        self.launches, self.compiles = [], compiles
        self.params = [
            SimpleNamespace(
                name=name,
                is_constexpr=name.isupper(),
                do_not_specialize=name == "rows",
                do_not_specialize_on_alignment=name == "seed_ptr",
            )
            for name in ("x_ptr", "stride_x", "seed_ptr", "rows", "H", "BLOCK")
        ]

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append(("by Triton", grid, args, constants))
            return Compiled(self.launches) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append(("compiled", grid, args))


X, SEED = OnGPU(), OnGPU(72, torch.int64)
ARGS, CONSTANTS = (X, 8, SEED, 3), {"num_warps": 4, "BLOCK": 16, "H": 12}


def test_the_second_launch_is_of_the_compiled_kernel():
    kernel = Kernel()
    launch = Launcher(kernel)
    for grid in ((5,), (6,), (7, 2)):
        launch(grid, ARGS, CONSTANTS)
    assert kernel.launches == [
        ("by Triton", (5,), ARGS, CONSTANTS),
        # Arguments and constants in the order of the parameters, and three dimensions or more.
        ("compiled", (6, 1, 1), (*ARGS, 12, 16)),
        ("compiled", (7, 2, 1, 1), (*ARGS, 12, 16)),
    ]


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((OnGPU(dtype=torch.bfloat16), 8, SEED, 3), CONSTANTS),
        ((OnGPU(device=1), 8, SEED, 3), CONSTANTS),
        ((X, 16, SEED, 3), CONSTANTS),
        ((X, 1, SEED, 3), CONSTANTS),
        (ARGS, {**CONSTANTS, "H": 13}),
        (ARGS, {**CONSTANTS, "num_warps": 8}),
        (ARGS, {"num_stages": 4, "BLOCK": 16, "H": 12}),
        ((OnGPU(72), 8, SEED, 3), CONSTANTS),
        ((OnGPU(is_cuda=False), 8, SEED, 3), CONSTANTS),
    ],
    ids=["dtype", "device", "stride", "one", "constant", "option", "another option", "unaligned", "not on a GPU"],
)
def test_what_another_kernel_may_be_compiled_for(args, constants):
    kernel = Kernel()
    launch = Launcher(kernel)
    launch((5,), ARGS, CONSTANTS)
    launch((5,), args, constants)
    assert kernel.launches[1] == ("by Triton", (5,), args, constants)
    launch((5,), ARGS, CONSTANTS)
    assert kernel.launches[2][0] == "compiled"


@pytest.mark.parametrize(
    "args", [(OnGPU(128), 8, SEED, 3), (X, 8, OnGPU(80, torch.int64), 3), (X, 8, SEED, 16), (X, 8, SEED, 1)]
)
def test_what_makes_no_difference(args):
    kernel = Kernel()
    launch = Launcher(kernel)
    launch((5,), ARGS, CONSTANTS)
    launch((5,), args, CONSTANTS)
    assert kernel.launches[1] == ("compiled", (5, 1, 1), (*args, 12, 16))


@pytest.mark.parametrize("args", [(OnGPU(72), 8, SEED, 3), (OnGPU(is_cuda=False), 8, SEED, 3)])
def test_what_is_not_kept(args):
    """A kernel for unaligned pointers, which are rare; and what doesn't run on a GPU."""
    kernel = Kernel()
    launch = Launcher(kernel)
    for _ in range(2):
        launch((5,), args, CONSTANTS)
    assert [way for way, *_ in kernel.launches] == ["by Triton"] * 2


def test_nothing_is_kept_where_nothing_was_compiled():
    kernel = Kernel(compiles=False)
    launch = Launcher(kernel)
    for _ in range(2):
        launch((5,), ARGS, CONSTANTS)
    assert [way for way, *_ in kernel.launches] == ["by Triton"] * 2


def test_descriptors_are_told_apart_by_their_dtype():
    """And a descriptor from none."""
    kernel = Kernel()
    kernel.params.insert(3, SimpleNamespace(**{**vars(kernel.params[1]), "name": "y_desc"}))
    launch = Launcher(kernel)

    class Descriptor:
        def __init__(self, dtype):
            self.base = OnGPU(dtype=dtype)

    ways = []
    for descriptor in (None, Descriptor(torch.float16), Descriptor(torch.bfloat16), Descriptor(torch.float16), None):
        launch((5,), (X, 8, SEED, descriptor, 3), CONSTANTS)
        ways.append(kernel.launches[-1][0])
    assert ways == ["by Triton"] * 3 + ["compiled"] * 2


def test_sizes_that_always_change_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(launcher, "_MOST", 3)
    kernel = Kernel()
    launch = Launcher(kernel)
    for stride in range(2, 20):
        launch((5,), (X, stride, SEED, 3), CONSTANTS)
        assert len(launch._compiled) <= 3
    launch((5,), (X, 19, SEED, 3), CONSTANTS)
    assert kernel.launches[-1][0] == "compiled"


@pytest.fixture
def launches(monkeypatch):
    """The launches of ops, for compute capability 9.0, that are recorded and not made."""
    found = []
    monkeypatch.setattr(Launcher, "__call__", lambda self, grid, args, constants: found.append((self, args, constants)))
    monkeypatch.setattr(triton_utils, "capability", lambda: 90)
    return found


def _call_everything(dtype, hidden, size, rows, offset, seed_offset, dropout_p, max_seqlen):
    def new(*shape, dtype=dtype):
        return torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)[offset:].view(shape)

    seed = torch.zeros(4, dtype=torch.int64)[seed_offset] if dropout_p else None
    qkv, out, lse = new(rows, 3, 2, size), new(rows, 2, size), torch.zeros(2, rows)
    arguments = (torch.tensor([0, rows], dtype=torch.int32), max_seqlen, 0.125, dropout_p, seed)
    attention.forward(qkv, *arguments)
    attention.backward(out, qkv, out, lse, *arguments)
    x, weight, statistics = new(rows, hidden), new(hidden), torch.zeros(rows, 1)
    layer_norm.forward(x, weight, weight, 1e-12)
    layer_norm.backward(x, x, weight, statistics, statistics, [True] * 3)
    bias_gelu.forward(x, weight, "none")
    bias_gelu.backward(x, x, weight, "none", [True, True])
    linear_gelu.forward(x, new(24, hidden), new(24), "none", True)
    if dtype != torch.float32:
        for bias, needs_hidden in ((None, False), (new(24), False), (new(24), True)):
            persistent.forward(x, new(24, hidden), bias, "none", needs_hidden)
    mask = new(rows, hidden)
    unpad.unpad(mask, None if seed_offset else mask > 0, bool(seed_offset))
    ids = torch.zeros(rows, dtype=torch.int64)
    tables = (ids, ids, ids, new(5, hidden), new(5, hidden), new(2, hidden), weight)
    embedding_layer_norm.forward(*tables, weight, 1e-12, dropout_p, seed, -1)
    embedding_layer_norm.backward(x, *tables, statistics, statistics, dropout_p, seed, -1, [True] * 5)


def test_no_launch_gets_another_kernel_than_triton_would_choose(launches):
    """Wherever the key is the same, what Triton tells kernels apart by is the same, for all kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        for hidden, size, rows in ((64, 16, 70), (48, 32, 1), (40, 24, 16), (1, 8, 5)):
            for offset, seed_offset in ((0, 0), (0, 1), (1, 0), (8, 2)):
                for dropout_p, max_seqlen in ((0.0, 600), (0.1, 600), (0.1, 16), (0.25, 16)):
                    _call_everything(dtype, hidden, size, rows, offset, seed_offset, dropout_p, max_seqlen)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders = {}
    chosen, kept = {}, set()
    for launch, args, constants in launches:
        kernel = launch.kernel
        key = launch.key(args, constants)
        if key is None:
            continue
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        triton_key = repr(binders[kernel](*args, **constants)[1:])
        assert chosen.setdefault((launch, key), triton_key) == triton_key, kernel
        kept.add(launch)
    modules = (attention, bias_gelu, embedding_layer_norm, layer_norm, linear_gelu, persistent, unpad)
    assert kept >= {one for module in modules for one in vars(module).values() if isinstance(one, Launcher)}
    # Most launches are of a kernel that is known by then.
    assert len(chosen) < len(launches) / 3
