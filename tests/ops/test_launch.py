"""The table of launch configurations."""

import itertools

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing is launched")

from fastbert.backends import launch, triton_utils


@pytest.mark.parametrize(
    ("capability", "expected"), [(0, 1), (75, 1), (80, 1), (86, 1), (89, 1), (90, 2), (99, 2), (100, 3), (120, 3)]
)
def test_the_highest_capability_that_is_not_above(capability, expected, monkeypatch):
    entries = {"80": {"num_warps": 1}, "90": {"num_warps": 2}, "100": {"num_warps": 3}}
    monkeypatch.setattr(launch, "table", lambda: {"kernel": {"class": entries}})
    monkeypatch.setattr(triton_utils, "capability", lambda: capability)
    launch._options.cache_clear()
    options = launch.options("kernel", "class")
    assert options == {"num_warps": expected}
    options["num_warps"] = 9
    assert launch.options("kernel", "class") == {"num_warps": expected}
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
            for entry in table[kernel][f"{shapes}, long"].values():
                assert entry.keys() == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
