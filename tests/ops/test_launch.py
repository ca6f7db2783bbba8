"""The table of launch configurations."""

import itertools

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing is launched")

from benchmarks import kernels, shapes, tune
from fastbert.backends import launch, triton_utils
from fastbert.ops.linear_gelu import by_shape


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
        'faster = { 64 = "triton" }\n'
    )
    for _ in range(2):  # the second time takes the place of the first
        tune.measure_routes(path, 90, lambda dtype, N, K, rows: {"triton": rows, "cublas_triton": 1000.0})
    table = by_shape.read(path)
    assert table.pop((80, "float32", 5, 7, 64)) == "triton"
    assert len(table) == len(kernels.DTYPES) * len(shapes.MODELS) * 11
    for (capability, _, _, _, rows), route in table.items():
        assert capability == 90
        assert route == ("triton" if rows < 1000 else "cublas_triton")
    assert path.read_text().startswith("# Which was the faster.\n")
