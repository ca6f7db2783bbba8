"""Query, key and value joined at once for the whole model, and the number of launches that a layer takes."""

import copy
import gc
import io
import weakref
from collections import Counter, OrderedDict
from unittest import mock

import pytest
import torch
from models import twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import calls
from fastbert.backends import extension, triton_utils
from fastbert.models import bert, encoder_inference, encoder_plan, joined, layers
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


def agree(theirs, ours, inputs, mode=torch.no_grad):
    where = twins.valid(inputs)
    with mode():
        found = [model(**inputs).last_hidden_state[where] for model in (theirs, ours)]
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-10)


def test_two_launches_for_all_layers():
    """One for the weights, one for the biases."""
    _, ours = models(num_hidden_layers=4)
    assert trace(ours, twins.batch()).count("aten::cat") == 2


def test_a_plan_is_kept_until_something_changes():
    _, ours = models()
    with torch.no_grad():
        ours(**twins.batch())
    plan = joined.plan_of(ours.encoder, encoder_plan.of(ours.encoder))
    assert joined.plan_of(ours.encoder, encoder_plan.of(ours.encoder)) is plan
    layer = ours.encoder.layer[1]
    layer.attention.self = copy.deepcopy(layer.attention.self)
    changed = joined.plan_of(ours.encoder, encoder_plan.of(ours.encoder))
    assert changed is not plan
    assert layer.attention.self in changed.attentions


def test_weights_of_two_dtypes_are_not_joined():
    """Joined they would all have the wider one, and no product would tell."""
    _, ours = models()
    ours.encoder.layer[1].attention.self.float()
    assert joined.plan_of(ours.encoder, encoder_plan.of(ours.encoder)).weights == []
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        ours(**twins.batch())


def test_the_states_are_hugging_faces():
    theirs, ours = models()
    agree(theirs, ours, twins.batch())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Adapted(nn.Module):
    """A Linear with an addition of low rank, wrapped as PEFT does it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=DTYPE)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=DTYPE)
        with torch.no_grad():
            self.down.weight.fill_(0.25)
            self.up.weight.fill_(0.5)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def wrap(attention):
    attention.key = Adapted(attention.key)


def unwrap_attribute(attention):
    """As FSDP has it while a layer runs: a weight that is a plain attribute and no parameter."""
    weight = attention.key.weight
    del attention.key.weight
    attention.key.weight = weight.data * 1.5


def replace_attribute(attention):
    attention.key.weight = attention.key.weight * 2.0


def swap(attention):
    torch.utils.swap_tensors(attention.key.weight, nn.Parameter(attention.key.weight.data * 1.5))


def replace_forward(attention):
    linear = attention.key
    linear.forward = lambda x: 2.0 * nn.Linear.forward(linear, x)


def step(attention):
    optimizer = torch.optim.SGD([attention.key.weight], lr=0.5)
    attention.key.weight.grad = torch.ones_like(attention.key.weight)
    optimizer.step()
    attention.key.weight.grad = None


def replace_weight(attention):
    attention.key.weight = nn.Parameter(attention.key.weight.data * 1.5)


def replace_module(attention):
    attention.key = copy.deepcopy(attention.key)
    attention.key.weight.data.mul_(1.5)


def tie(attention):
    attention.key.weight = attention.query.weight


def drop_biases(attention):
    for linear in (attention.query, attention.key, attention.value):
        linear.bias = None


def drop_a_bias(attention):
    attention.key.bias = None


def assign(attention):
    attention.load_state_dict({name: 1.5 * x for name, x in attention.state_dict().items()}, assign=True)


def load(attention):
    attention.load_state_dict({name: 1.5 * x for name, x in attention.state_dict().items()})


def all_reduce(attention):
    """As a collective does it: in place, through .data."""
    for parameter in attention.parameters():
        parameter.data.mul_(2.0).div_(3.0)


def prune_weight(attention):
    """By a hook of torch's own, which the packed way serves."""
    prune.l1_unstructured(attention.key, "weight", amount=0.5)


def prune_heads(attention):
    keep = torch.arange(32)
    for linear in (attention.query, attention.key, attention.value):
        linear.weight = nn.Parameter(linear.weight.data[keep])
        linear.bias = nn.Parameter(linear.bias.data[keep])
        linear.out_features = 32


CHANGES = {
    "in place": lambda attention: attention.key.weight.data.mul_(2.0),
    "through data": lambda attention: attention.key.weight.data[3].add_(1.0),
    "moved": lambda attention: setattr(attention.key.weight, "data", attention.key.weight.data * 1.5),
    "transposed": lambda attention: setattr(attention.key.weight, "data", attention.key.weight.data.t()),
    "a class": lambda attention: setattr(attention.key, "__class__", Doubled),
    "a hook": lambda attention: attention.key.register_forward_hook(lambda module, args, output: 2.0 * output),
    "a hook before": lambda attention: attention.key.register_forward_pre_hook(lambda module, args: (2.0 * args[0],)),
    "a hook that torch is not told of": lambda attention: attention.key._forward_hooks.__setitem__(
        -1, lambda module, args, output: 2.0 * output
    ),
    "hooks": lambda attention: setattr(
        attention.key, "_forward_hooks", OrderedDict({-1: lambda module, args, output: 2.0 * output})
    ),
    **{
        function.__name__: function
        for function in (
            *(replace_forward, replace_weight, replace_module, wrap, unwrap_attribute, swap, step, tie, drop_biases),
            *(drop_a_bias, assign, load, all_reduce, prune_weight),
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_between_two_forwards_is_seen(change, mode):
    """Those through .data, too, which no version counter sees; and once more after they have been seen."""
    theirs, ours = models()
    for place in (1, 0):
        agree(theirs, ours, twins.batch(), mode)
        for model in (theirs, ours):
            with torch.no_grad():
                CHANGES[change](model.encoder.layer[place].attention.self)
        agree(theirs, ours, twins.batch(), mode)


def test_plain_attributes_are_read_at_each_forward():
    theirs, ours = models()
    for change in (unwrap_attribute, replace_attribute, replace_attribute):
        for model in (theirs, ours):
            with torch.no_grad():
                change(model.encoder.layer[1].attention.self)
        agree(theirs, ours, twins.batch())


def test_heads_that_are_pruned_between_two_forwards():
    theirs, ours = models()
    agree(theirs, ours, twins.batch())
    for model in (theirs, ours):
        attention = model.encoder.layer[1].attention
        prune_heads(attention.self)
        attention.output.dense.weight = nn.Parameter(attention.output.dense.weight.data[:, :32])
    agree(theirs, ours, twins.batch())
    with torch.no_grad():
        found = joined.join(ours.encoder, torch.zeros(1, dtype=DTYPE))
    assert [projection.weight.shape[0] for projection in found.values()] == [192, 96]


@pytest.mark.parametrize("place", [0, 1])
def test_biases_in_some_layers_only(place):
    theirs, ours = models()
    for model in (theirs, ours):
        drop_biases(model.encoder.layer[place].attention.self)
    agree(theirs, ours, twins.batch())


def test_copies_join_their_own_weights(tmp_path):
    theirs, ours = models()
    agree(theirs, ours, twins.batch())
    pickled = io.BytesIO()
    torch.save(ours, pickled)
    pickled.seek(0)
    ours.save_pretrained(tmp_path)
    copies = [copy.deepcopy(ours), copy.copy(ours), torch.load(pickled, weights_only=False)]
    copies.append(type(ours).from_pretrained(tmp_path, dtype=DTYPE).eval())
    assert not any("joined" in name for name in ours.state_dict())
    for one in copies:
        agree(theirs, one, twins.batch())
    shared = (copies[1],)
    with torch.no_grad():
        for model in (theirs, *copies):
            if model not in shared:
                model.encoder.layer[1].attention.self.key.weight.mul_(1.5)
        for one in copies:
            if one not in shared:
                agree(theirs, one, twins.batch())
        ours.encoder.layer[1].attention.self.key.weight.mul_(1.5)
    agree(theirs, ours, twins.batch())
    agree(theirs, shared[0], twins.batch())


def test_a_model_is_freed_with_its_last_reference():
    _, ours = models()
    with torch.no_grad():
        ours(**twins.batch())
    gone = weakref.ref(ours), weakref.ref(ours.encoder.layer[0].attention.self.key.weight)
    gc.disable()
    try:
        del ours
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_the_dtype_changes():
    theirs, ours = models()
    agree(theirs, ours, twins.batch())
    with torch.no_grad():
        found = [joined.join(ours.to(dtype).encoder, torch.zeros(1, dtype=DTYPE)) for dtype in (torch.float16, DTYPE)]
    assert [next(iter(one.values())).weight.dtype for one in found] == [torch.float16, DTYPE]


def test_weights_that_are_elsewhere_are_not_joined():
    """As offloaded and flattened ones are, which come and are in shape while their layer runs."""
    _, ours = models()
    x, linear = torch.zeros(1, dtype=DTYPE), ours.encoder.layer[1].attention.self.key
    here, parameter = linear.weight.data, linear.weight
    with torch.no_grad():
        for _ in range(2):
            assert len(joined.join(ours.encoder, x)) == 2
            linear.weight = nn.Parameter(here.to("meta"))
            assert joined.join(ours.encoder, x) == {}
            linear.weight = parameter
            assert len(joined.join(ours.encoder, x)) == 2
            parameter.data = here.flatten()
            assert len(joined.join(ours.encoder, x)) == 1
            parameter.data = here


def test_each_forward_has_memory_of_its_own():
    """Forwards on several streams, or of several threads, don't wait for each other."""
    _, ours = models()
    x = torch.zeros(1, dtype=DTYPE)
    with torch.no_grad():
        found = [joined.join(ours.encoder, x) for _ in range(2)]
    addresses = {projection.weight.data_ptr() for one in found for projection in one.values()}
    assert len(addresses) == 4


def test_two_forwards_through_frozen_attention_before_one_backward():
    """What is trained comes after it, so its weights are joined, and the backward needs them as they were."""
    theirs, ours = models(num_hidden_layers=3)
    for model in (theirs, ours):
        model.requires_grad_(False)
        model.encoder.layer[0].output.dense.requires_grad_(True)
        outputs = [model(**twins.batch(seed=seed)).last_hidden_state for seed in range(2)]
        sum(output[twins.valid(twins.batch())].square().sum() for output in outputs).backward()
    grads = [model.encoder.layer[0].output.dense.weight.grad for model in (theirs, ours)]
    torch.testing.assert_close(*grads, atol=1e-8, rtol=1e-8)


def test_weights_that_begin_to_be_trained_are_not_joined():
    _, ours = models()
    ours.requires_grad_(False)
    x = torch.zeros(1, dtype=DTYPE)
    assert len(joined.join(ours.encoder, x)) == 2
    ours.encoder.layer[0].attention.self.value.bias.requires_grad_(True)
    assert joined.join(ours.encoder, x) == {}
    with torch.no_grad():
        assert len(joined.join(ours.encoder, x)) == 2


def test_a_layer_with_a_module_of_its_own_is_left_out():
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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # It launches what the layers do, without the operators by which they are counted here (test_encoder_inference.py).
    monkeypatch.setattr(encoder_inference, "unserved", lambda x: "the layers are counted")
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
