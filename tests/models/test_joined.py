"""Query, key and value joined by one copy for the whole model, and the number of launches that a layer takes."""

from collections import Counter
from unittest import mock

import pytest
import torch
from models import twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import calls
from fastbert.backends import extension, triton_utils
from fastbert.models import bert, joined, layers
from fastbert.ops.bias_dropout_residual_layer_norm import compiled

# Not prepacked on a CPU: the dtype of choice for a test of what runs where nothing is.
DTYPE = torch.float64
LAUNCHES_PER_LAYER = 8


class Trace(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def models(**changes):
    theirs, ours = twins.twins(**changes)
    return theirs.to(DTYPE), ours.to(DTYPE)


def trace(model, inputs):
    with torch.no_grad(), Trace() as found:
        model(**inputs)
    return found.names


def agree(theirs, ours, inputs):
    where = twins.valid(inputs)
    with torch.no_grad():
        found = [model(**inputs).last_hidden_state[where] for model in (theirs, ours)]
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-10)


def test_one_copy_for_all_layers():
    _, ours = models(num_hidden_layers=4)
    names = trace(ours, twins.batch())
    assert names.count("aten::_foreach_copy_") == 1
    assert names.count("aten::cat") == 0


def test_the_states_are_hugging_faces():
    theirs, ours = models()
    agree(theirs, ours, twins.batch())


@pytest.mark.parametrize("change", ["in place", "through data", "moved"])
def test_a_changed_weight_is_used(change):
    """Through .data, too, which no version counter sees."""
    theirs, ours = models()
    agree(theirs, ours, twins.batch())
    for model in (theirs, ours):
        weight = model.encoder.layer[1].attention.self.key.weight
        with torch.no_grad():
            if change == "in place":
                weight.mul_(2.0)
            elif change == "through data":
                weight.data[3] += 1.0
            else:
                weight.data = weight.data * 1.5
    agree(theirs, ours, twins.batch())


def test_a_layer_with_a_module_of_its_own_is_left_out():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    theirs, ours = models(num_hidden_layers=3)
    for model in (theirs, ours):
        model.encoder.layer[1].attention.self.value.__class__ = Doubled
    agree(theirs, ours, twins.batch())
    attentions = [layer.attention.self for layer in ours.encoder.layer]
    with torch.no_grad():
        found = joined.join(ours.encoder, torch.zeros(1, dtype=DTYPE))
    assert list(found) == [attentions[0], attentions[2]]


def test_gradients_go_to_each_weight():
    theirs, ours = models()
    for model in (theirs, ours):
        inputs = twins.batch()
        model(**inputs).last_hidden_state[twins.valid(inputs)].square().sum().backward()
    for expected, actual in zip(theirs.encoder.parameters(), ours.encoder.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-9, rtol=1e-8)


def test_layers_that_were_cut_off_or_changed_places():
    theirs, ours = models(num_hidden_layers=4)
    agree(theirs, ours, twins.batch())
    for model in (theirs, ours):
        model.encoder.layer = nn.ModuleList([model.encoder.layer[2], model.encoder.layer[0]])
    agree(theirs, ours, twins.batch())


def test_inference_mode_and_then_not():
    theirs, ours = models()
    with torch.inference_mode():
        ours(**twins.batch())
    agree(theirs, ours, twins.batch())


def test_nothing_is_joined_where_weights_are_prepacked():
    ours = twins.twins()[1]
    with torch.no_grad():
        assert joined.join(ours.encoder, torch.zeros(1)) == {}


def _faked(model, mode):
    """The model on a GPU that isn't there: every tensor has a shape, a dtype and a device, and no memory."""
    device = torch.device("cuda", 0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(FakeTensor(mode, parameter.data, device), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = FakeTensor(mode, buffer, device)
    return model


# What an operator launches; views launch nothing.
_VIEWS = {
    "aten::_unsafe_view", "aten::alias", "aten::detach", "aten::dropout", "aten::empty.memory_format",
    "aten::expand", "aten::flatten.using_ints", "aten::is_inference", "aten::new_empty", "aten::promote_types",
    "aten::reshape", "aten::select.int", "aten::slice.Tensor", "aten::split_with_sizes", "aten::t",
    "aten::transpose.int", "aten::unsqueeze", "aten::view", "prim::device",
}  # fmt: skip


def _launches(layers_count, monkeypatch):
    """How many kernels an inference forward of BERT-base's shape launches on a GPU, by operator."""
    original = layers.unusual

    def unusual(module, kind):
        reason = original(module, kind)
        return None if reason is not None and "FakeTensor" in reason else reason

    monkeypatch.setattr(layers, "unusual", unusual)
    monkeypatch.setattr(joined, "_is_plain", lambda weight: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(extension, "missing_on_device", lambda index: None)
    with torch.device("meta"):
        config = twins.config(
            num_hidden_layers=layers_count, hidden_size=768, num_attention_heads=12, intermediate_size=3072
        )
        model = twins.hf.BertModel(config, add_pooling_layer=False).eval().to(torch.bfloat16)
    bert.fuse(model)
    mode = FakeTensorMode()
    _faked(model, mode)
    ids = FakeTensor(mode, torch.zeros(2, 128, dtype=torch.int64, device="meta"), torch.device("cuda", 0))
    with mode, torch.no_grad(), Trace() as found:
        model(input_ids=ids)
    return [name for name in found.names if name not in _VIEWS]


def _kernels_of(op, monkeypatch):
    """How many kernels the GPU's implementation of an op launches in inference: by a call that is recorded, not run."""
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **options: launched.append(kernel))
    monkeypatch.setattr(triton_utils, "capability", lambda: 90)
    monkeypatch.setattr(triton_utils, "interpreted", lambda: False)
    meta = torch.device("meta")
    if op == "fastbert::attention":
        call = calls.attention(12, 64, torch.bfloat16, 128, 0.0, False, meta)
    elif op == "fastbert::linear_gelu":
        # The route with more kernels of the two that a shape may take.
        call = calls.linear_gelu(3072, 768, torch.bfloat16, 256, False, meta, "cublas_triton")
    else:
        assert op == "fastbert::bias_dropout_residual_layer_norm"
        x = torch.empty(256, 768, dtype=torch.bfloat16, device=meta)
        compiled_code = mock.MagicMock()
        monkeypatch.setattr(extension, "module", lambda: compiled_code)
        compiled.forward("device", 0, x, x[0], x, x[0], x[0], 1e-12, 0.0, None, False)
        # Each call of the extension's forward is one launch (csrc/bias_dropout_residual_layer_norm/device.cu).
        return sum("forward" in str(one) for one in compiled_code.mock_calls)
    with Trace() as found:
        call()
    return len(launched) + sum(name not in _VIEWS for name in found.names)


def test_a_layer_launches_at_most_eight_kernels_in_inference(monkeypatch):
    few, many = (Counter(_launches(layers_count, monkeypatch)) for layers_count in (2, 6))
    in_four = many - few
    assert all(count % 4 == 0 for count in in_four.values())
    layer = {name: count // 4 for name, count in in_four.items()}
    assert not {"aten::cat", "aten::copy_", "aten::_foreach_copy_"} & layer.keys()
    launched = {
        name: count * (_kernels_of(name, monkeypatch) if name.startswith("fastbert::") else 1)
        for name, count in layer.items()
    }
    assert all(launched.values())
    assert sum(launched.values()) <= LAUNCHES_PER_LAYER, launched
