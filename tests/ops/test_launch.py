"""The table of launch configurations."""

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing is launched")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import kernels, shapes, tune
from fastbert.backends import launch, triton_utils
from fastbert.ops.attention import triton as attention
from fastbert.ops.bias_gelu import triton as bias_gelu
from fastbert.ops.embedding_layer_norm import triton as embedding_layer_norm
from fastbert.ops.layer_norm import triton as layer_norm
from fastbert.ops.linear_gelu import by_shape, persistent
from fastbert.ops.linear_gelu import triton as linear_gelu
from fastbert.ops.unpad import triton as unpad


@pytest.mark.parametrize(
    ("capability", "expected"), [(0, 1), (75, 1), (80, 1), (86, 1), (89, 1), (90, 2), (99, 2), (100, 3), (120, 3)]
)
def test_the_highest_capability_that_is_not_above(capability, expected, monkeypatch):
    entries = {"80": {"num_warps": 1}, "90": {"num_warps": 2}, "100": {"num_warps": 3}}
    monkeypatch.setattr(launch, "table", lambda: {"kernel": {"class": entries}})
    monkeypatch.setattr(triton_utils, "capability", lambda: capability)
    launch._options.cache_clear()
    options = launch.options("kernel", "class")
    # Multiply-adds are fused, whatever the default of the installed Triton is.
    assert options == {"num_warps": expected, "enable_fp_fusion": True}
    options["num_warps"] = 9
    assert launch.options("kernel", "class") == {"num_warps": expected, "enable_fp_fusion": True}
    launch._options.cache_clear()


def test_a_class_that_is_not_there(monkeypatch):
    monkeypatch.setattr(triton_utils, "capability", lambda: 90)
    with pytest.raises(KeyError):
        launch.options("attention_forward", "64 bits")


def test_every_class_has_its_options():
    table = launch.table()
    widths = [launch.row_class(hidden) for hidden in (1, 512, 513, 768, 1024, 1025, 2048, 4096, 4097, 10**5)]
    for kernel in ("layer_norm_forward", "layer_norm_backward", "embedding_forward", "embedding_backward"):
        assert set(widths) == set(table[kernel])
    for bits, size in itertools.product((16, 32), (32, 64, 128)):
        shapes = f"{bits} bits, D <= {size}"
        for kernel in ("attention_forward", "attention_backward"):
            for entry in table[kernel][f"{shapes}, whole"].values():
                assert entry["KEYS"] in (0, 32, 64, 128)
                for keys in (32, 64, 128):
                    assert keys > entry["KEYS"] or f"{shapes}, S <= {keys}" in table[kernel]
        for kernel in ("attention_forward", "attention_backward_dq", "attention_backward_dkv"):
            for shape_class in (f"{shapes}, long", f"{shapes}, long, dropout"):
                for entry in table[kernel][shape_class].values():
                    assert entry.keys() - {"maxnreg"} == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}


def test_every_row_of_the_table_can_be_tuned():
    """But for the numbers of keys that a program takes whole, which follow from what compiles."""
    rows = {(kernel, shapes) for kernel, classes in launch.table().items() for shapes in classes}
    targets = {(target.kernel, target.shape_class) for target in tune.targets()}
    whole = {row for row in rows if row[1].endswith("whole")}
    assert targets <= rows
    missing = rows - whole - targets
    assert missing == set()


def test_measured_routes_are_written_as_they_are_read(tmp_path):
    path = tmp_path / "by_shape.toml"
    path.write_text(
        '# Which was the faster.\n[[measured]]\ncapability = 80\ndtype = "float32"\nN = 5\nK = 7\n'
        'training = true\nfaster = { 64 = "triton" }\n'
    )
    for _ in range(2):  # the second time takes the place of the first
        tune.measure_routes(
            path,
            90,
            lambda dtype, N, K, rows, training: {"triton": rows, "cublas_triton": 1000.0, "persistent": 1001.0},
        )
    table = by_shape.read(path)
    assert table.pop((80, "float32", 5, 7, True, 64)) == "triton"
    assert len(table) == len(kernels.DTYPES) * len(shapes.MODELS) * 2 * 11
    for (capability, *_, rows), route in table.items():
        assert capability == 90
        assert route == ("triton" if rows < 1000 else "cublas_triton")
    assert path.read_text().startswith("# Which was the faster.\n")


@pytest.fixture
def launched(monkeypatch):
    """Launches for compute capability 9.0 that are recorded, not made: (kernel, arguments, options)."""
    found = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **kw: found.append((kernel, args, kw)))
    monkeypatch.setattr(triton_utils, "capability", lambda: 90)
    return found


@pytest.mark.parametrize("capability", kernels.CAPABILITIES)
def test_every_launch_fuses_multiply_adds(capability):
    """Whatever the default of the installed Triton is."""
    launches = kernels.all_launches(capability)
    modules = (attention, bias_gelu, embedding_layer_norm, layer_norm, linear_gelu, persistent, unpad)
    kernels_there = {
        (module.__name__.split(".")[-2], name)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("kernel")
    }
    kernels_there |= {(op, "add_partials_kernel") for op in ("bias_gelu", "embedding_layer_norm", "layer_norm")}
    if capability < 90:  # TMA's
        kernels_there.remove(("linear_gelu", "persistent_kernel"))
    assert {(one.op, one.kernel) for one in launches} == kernels_there
    for one in launches:
        assert ("enable_fp_fusion", True) in one.options, one


def _keys(launched):
    """What Triton compiles the recorded launches for: each kernel with its specialisation and options."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = []
    for kernel, args, options in launched:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found.append((kernel, repr(bind(*args, **options)[1:])))
    launched.clear()
    return found


@pytest.mark.parametrize("max_seqlen", [32, 512])
def test_a_kernel_is_compiled_once_for_the_seeds_of_all_layers(launched, max_seqlen):
    """Those are elements of one tensor, at steps of eight bytes; Triton tells multiples of 16 from others."""
    qkv = torch.zeros(1024, 3, 2, 64, dtype=torch.bfloat16)
    ids, x = torch.zeros(1024, dtype=torch.int64), torch.zeros(1024, 64, dtype=torch.bfloat16)
    offsets = torch.arange(0, 1025, max_seqlen, dtype=torch.int32)
    statistics = torch.zeros(1024, 1)
    seeds = torch.zeros(4, dtype=torch.int64)
    assert seeds.data_ptr() % 16 == 0
    keys = []
    for seed in seeds:
        arguments = (offsets, max_seqlen, 0.125, 0.1, seed)
        out, lse = attention.forward(qkv, *arguments)
        attention.backward(out, qkv, out, lse, *arguments)
        tables = (ids, ids, ids, x, x, x, x[0])
        embedding_layer_norm.forward(*tables, x[0], 1e-12, 0.1, seed, -1)
        embedding_layer_norm.backward(x, *tables, statistics, statistics, 0.1, seed, -1, [False] * 3 + [True] * 2)
        keys.append(_keys(launched))
    assert {kernel.fn.__name__ for kernel, _ in keys[0]} >= {"forward_kernel", "backward_kernel"}
    assert keys[0] == keys[1] == keys[2] == keys[3]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, (1, 0)), (2, (2, 0)), (7, (4, 4)), (512, (512, 0)), (768, (512, 256)), (1000, (512, 512)), (1023, (512, 512))],
)
def test_pieces_of_a_row(size, expected):
    assert triton_utils.pieces(size) == expected


@pytest.mark.parametrize(
    ("allowed", "dtype", "expected"),
    [
        ("none", torch.float32, "tf32x3"),
        ("ieee", torch.float32, "tf32x3"),
        ("tf32", torch.float32, "tf32"),
        # Nothing is compiled again for what makes no difference.
        ("none", torch.bfloat16, "tf32x3"),
        ("tf32", torch.bfloat16, "tf32x3"),
    ],
)
def test_float32_is_split_unless_torch_allows_tf32(monkeypatch, allowed, dtype, expected):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=allowed))
    assert triton_utils.dot_precision(dtype) == expected


@pytest.fixture
def asked_anew():
    caches = (triton_utils._capability_of_all, triton_utils._capability_of, triton_utils.multiprocessors)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("devices", [[(9, 0)], [(8, 6), (8, 6)], [(8, 6), (9, 0)], [(7, 5), (12, 1), (7, 5)]], ids=str)
def test_capability_of_the_present_device(devices, monkeypatch):
    """Which device is present is asked only where they differ."""
    present = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: present[-1])
    for index, (major, minor) in enumerate(devices):
        present.append(index)
        if len(set(devices)) == 1:
            present.clear()
        assert triton_utils.capability() == 10 * major + minor


@pytest.mark.usefixtures("asked_anew")
def test_multiprocessors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=7))
    assert triton_utils.multiprocessors(torch.device("cuda", 1)) == 7
    assert triton_utils.multiprocessors(torch.device("cpu")) == 132


def test_rows_are_copied_only_where_they_must_be():
    x = torch.randn(4, 3, 8)
    assert triton_utils.rows_of(x).shape == (12, 8)
    assert triton_utils.rows_of(x).data_ptr() == x.data_ptr()
    wide = torch.randn(12, 16)[:, :8]
    assert triton_utils.rows_of(wide).data_ptr() == wide.data_ptr()
    across = torch.randn(8, 12).t()
    assert triton_utils.rows_of(across).is_contiguous()
    assert torch.equal(triton_utils.rows_of(across), across)
