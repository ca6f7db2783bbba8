"""The device that an op's implementation finds, by stand-ins for those of a machine with several GPUs."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastbert.backends import library, select, triton_utils


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs that aren't there: ``current`` is the index of the current one, ``changes`` counts its changes."""
    state = SimpleNamespace(current=0, changes=0)

    @contextlib.contextmanager
    def device(chosen):
        before, state.current = state.current, torch.device(chosen).index
        state.changes += 1
        try:
            yield
        finally:
            state.current = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    return state


def run(monkeypatch, index, implementation, direction="forward"):
    """Run the ``cuda`` kernel of an op whose first tensor is on the GPU ``index``."""
    monkeypatch.setattr(select, "load", lambda op, name: SimpleNamespace(**{direction: implementation}))
    x = FakeTensor(FakeTensorMode(), torch.empty(2, device="meta"), torch.device("cuda", index))
    return library._kernel("layer_norm", direction, "cuda")(x, None, "triton")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_op_runs_with_the_device_of_its_tensors(machine, monkeypatch, direction, autocast):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    assert run(monkeypatch, 1, lambda x, y: machine.current, direction) == 1
    assert (machine.current, machine.changes) == (0, 1)


def test_the_current_device_is_left_alone(machine, monkeypatch):
    assert run(monkeypatch, 0, lambda x, y: machine.current) == 0
    assert machine.changes == 0


def test_the_device_is_put_back_after_an_error(machine, monkeypatch):
    def fail(x, y):
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        run(monkeypatch, 1, fail)
    assert machine.current == 0


def test_launches_are_chosen_for_the_device_of_the_tensors(machine, monkeypatch):
    """Two different GPUs in one machine, the first asked about first."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (9, 0)][index])
    triton_utils._capability_of.cache_clear()
    found = [run(monkeypatch, index, lambda x, y: triton_utils.capability()) for index in (0, 1, 0)]
    triton_utils._capability_of.cache_clear()
    assert found == [80, 90, 80]
