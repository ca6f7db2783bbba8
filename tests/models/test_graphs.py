"""``cuda_graphs``: buckets, padding, copies and reasons. Graphs that run the model again stand in for a GPU's."""

import contextlib
import copy
import types

import pytest
import torch
import transformers
from models import reruns, twins
from torch import nn
from transformers import activations

import fastbert
from fastbert.models import graphs


@pytest.fixture
def on_cpu(monkeypatch):
    """The bucket of every capture."""
    return reruns.install(monkeypatch)


@pytest.fixture
def graphed(on_cpu):
    return fastbert.cuda_graphs(twins.twins()[1], batch_sizes=(1, 4, 8), lengths=(8, 16, 48))


def expected(graphed, inputs):
    with torch.no_grad():
        return graphed.model(**inputs)


@pytest.mark.parametrize("name", ["BertModel", *(n for n in twins.HEADS if n != "BertForMultipleChoice")])
@pytest.mark.parametrize("kind", ["none", "right", "holes"])
def test_every_output_is_the_models(on_cpu, name, kind):
    graphed = fastbert.cuda_graphs(twins.twins(name)[1], batch_sizes=(8,), lengths=(16, 48))
    for batch_size, seqlen in ((5, 37), (8, 48), (1, 16), (3, 4)):
        inputs = twins.batch(batch_size, seqlen, kind)
        with torch.no_grad():
            actual = graphed(**inputs)
        assert graphed.route == f"graph 8x{16 if seqlen <= 16 else 48}"
        wanted = expected(graphed, inputs)
        assert actual.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(actual[key], wanted[key], atol=2e-5, rtol=1e-4)


def test_a_batch_takes_the_smallest_bucket_that_holds_it(graphed, on_cpu):
    with torch.no_grad():
        for batch_size, seqlen in ((1, 8), (1, 9), (2, 8), (4, 16), (5, 17), (1, 3)):
            graphed(**twins.batch(batch_size, seqlen))
    assert on_cpu == [(1, 8, 8), (1, 16, 16), (4, 8, 32), (4, 16, 64), (8, 48, 384)]


@pytest.fixture
def counted(monkeypatch):
    """The tokens of every batch are counted, however small it is."""
    monkeypatch.setattr(graphs, "_LEAST_COUNTED", 0)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"])
@pytest.mark.parametrize("kind", ["right", "holes", "none"])
def test_a_graph_computes_a_share_of_the_positions(on_cpu, name, kind):
    graphed = fastbert.cuda_graphs(twins.twins(name)[1], batch_sizes=(8,), lengths=(48,))
    tokens = []
    for batch_size, seqlen in ((8, 48), (7, 40), (5, 37), (3, 40), (1, 6)):
        inputs = twins.batch(batch_size, seqlen, kind)
        with torch.no_grad():
            actual = graphed(**inputs)
        tokens.append(on_cpu[-1][2] if "tokens" not in graphed.route else int(graphed.route.split()[2]))
        valid = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else batch_size * seqlen
        assert tokens[-1] == min(size for size in (96, 144, 192, 288, 384) if size >= valid)
        wanted = expected(graphed, inputs)
        for key in wanted:
            torch.testing.assert_close(actual[key], wanted[key], atol=2e-5, rtol=1e-4)
    assert len(set(tokens)) > 2


@pytest.mark.usefixtures("counted")
def test_what_a_share_computes_is_packed(on_cpu, monkeypatch):
    """A graph of 96 tokens takes the encoder through 96 rows."""
    rows = []
    model = twins.twins()[1]
    encode = type(model.encoder).forward
    monkeypatch.setattr(
        type(model.encoder), "forward", lambda self, x, *a, **k: rows.append(x.shape[0]) or encode(self, x, *a, **k)
    )
    graphed = fastbert.cuda_graphs(model, batch_sizes=(8,), lengths=(48,))
    with torch.no_grad():
        graphed(**twins.batch(3, 30, "right"))
    assert graphed.route == "graph 8x48, 96 tokens"
    assert rows == [96, 96]


def test_small_buckets_are_not_counted(graphed, monkeypatch):
    monkeypatch.setattr(torch, "count_nonzero", lambda mask: pytest.fail("a batch was counted"))
    with torch.no_grad():
        graphed(**twins.batch(3, 20, "right"))
    assert graphed.route == "graph 4x48"


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("shares", "tokens"), [((), 384), ((1.0,), 384), ((0.5,), 192), ((0.9, 0.3), 116)])
def test_shares_of_ones_own(on_cpu, shares, tokens):
    graphed = fastbert.cuda_graphs(twins.twins()[1], batch_sizes=(8,), lengths=(48,), token_shares=shares)
    with torch.no_grad():
        graphed(**twins.batch(3, 30, "right"))
        graphed(**twins.batch(8, 48, "none"))
    assert on_cpu[0] == (8, 48, tokens)
    assert on_cpu[-1] == (8, 48, 384)


@pytest.mark.parametrize("shares", [(0.0,), (0.5, 1.5), (-1.0,), (float("nan"),)])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match=r"token_shares is .*; each must be above 0 and at most 1"):
        fastbert.cuda_graphs(twins.twins()[1], token_shares=shares)


def test_outputs_stay_as_they_are_at_the_next_call(graphed):
    with torch.no_grad():
        first = graphed(**twins.batch(4, 16, seed=0)).last_hidden_state
        kept = first.clone()
        graphed(**twins.batch(4, 16, seed=1))
    assert torch.equal(first, kept)


def test_nothing_is_left_of_a_longer_batch(graphed):
    short = twins.batch(2, 9, "none", seed=1)
    with torch.no_grad():
        graphed(**twins.batch(4, 16, seed=0))
        actual = graphed(**short)
    torch.testing.assert_close(
        actual.last_hidden_state, expected(graphed, short).last_hidden_state, atol=2e-5, rtol=1e-4
    )


def test_weights_changed_in_place_are_used(graphed, on_cpu):
    inputs = twins.batch(4, 16)
    with torch.no_grad():
        before = graphed(**inputs).last_hidden_state
        for parameter in graphed.model.parameters():
            parameter.mul_(1.1)
        after = graphed(**inputs).last_hidden_state
    assert len(on_cpu) == 1
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected(graphed, inputs).last_hidden_state, atol=2e-5, rtol=1e-4)


def test_weights_that_move_are_captured_again(graphed, on_cpu):
    with torch.no_grad():
        graphed(**twins.batch(4, 16))
        graphed(**twins.batch(1, 8))
        graphed.model.to(torch.bfloat16)
        assert graphed(**twins.batch(4, 16)).last_hidden_state.dtype == torch.bfloat16
        graphed(**twins.batch(1, 8))
    assert on_cpu == [(4, 16, 64), (1, 8, 8), (4, 16, 64), (1, 8, 8)]


def _replace_module(model):
    model.encoder.layer[1].output.dense = copy.deepcopy(model.encoder.layer[1].output.dense)


def _replace_activation(model):
    """It has no parameters."""
    model.encoder.layer[1].intermediate.intermediate_act_fn = activations.NewGELUActivation()


class Twice(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


def _change_class(model):
    model.pooler.dense.__class__ = Twice


def _add_hook(model):
    model.pooler.register_forward_hook(lambda module, args, output: 2.0 * output)


def _add_hook_before(model):
    model.pooler.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))


def _replace_forward(model):
    forward = model.pooler.forward
    model.pooler.forward = lambda states: 3.0 * forward(states)


def _replace_parameter(model):
    model.encoder.layer[0].attention.self.key.weight = nn.Parameter(torch.full((64, 64), 0.01))


def _move_data(model):
    parameter = model.embeddings.LayerNorm.bias
    parameter.data = parameter.data + 1.0


def _swap_data(model):
    """The addresses are those that there were."""
    first, second = (model.encoder.layer[place].output.LayerNorm.weight for place in (0, 1))
    first.data, second.data = second.data, first.data


def _transpose_data(model):
    """At the same address."""
    parameter = model.pooler.dense.weight
    parameter.data = parameter.data.t()


def _replace_buffer(model):
    model.embeddings.position_ids = model.embeddings.position_ids.flip(1)


def _swap_layers(model):
    model.encoder.layer = nn.ModuleList(reversed(model.encoder.layer))


def _cut_layers(model):
    del model.encoder.layer[1]


def _drop_bias(model):
    model.encoder.layer[0].output.dense.bias = None


def _train_a_part(model):
    model.encoder.layer[0].attention.output.dropout.p = 0.5
    model.encoder.layer[0].attention.output.dropout.train()


def _assign_state(model):
    model.load_state_dict({name: x * 1.1 for name, x in model.state_dict().items()}, assign=True)


def _change_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.1


def _change_scaling(model):
    model.encoder.layer[0].attention.self.scaling *= 2.0


def _ask_for_hidden_states(model):
    model.config.output_hidden_states = True


CHANGES = [
    *(_replace_module, _replace_activation, _change_class, _add_hook, _add_hook_before, _replace_forward),
    *(_replace_parameter, _move_data, _swap_data, _transpose_data, _replace_buffer, _swap_layers, _cut_layers),
    *(_drop_bias, _train_a_part, _assign_state, _change_eps, _change_scaling, _ask_for_hidden_states),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_no_graph_is_replayed_after_a_change(graphed, on_cpu, change):
    """In a bucket that was captured before the change, twice, and in one that wasn't looked at since."""
    graphed.model.train(False)
    inputs, other = twins.batch(4, 16), twins.batch(1, 8)
    with torch.no_grad():
        graphed(**inputs)
        graphed(**other)
        graphed(**inputs)
        assert len(on_cpu) == 2
        change(graphed.model)
        for one in (inputs, other):
            torch.manual_seed(1)
            graphed(**one)
        # A forward that is asked for hidden states for the first time leaves hooks, another change.
        assert on_cpu[2:4] == [(4, 16, 64), (1, 8, 8)]
        for one in (inputs, other):
            torch.manual_seed(1)
            actual = graphed(**one)
            torch.manual_seed(1)
            wanted = expected(graphed, one)
            assert actual.keys() == wanted.keys()
            if change is not _train_a_part:
                torch.testing.assert_close(actual.pooler_output, wanted.pooler_output, atol=2e-5, rtol=1e-4)
        count = len(on_cpu)
        graphed(**inputs)
        graphed(**other)
        assert len(on_cpu) == count <= 6


def test_an_unchanged_model_is_captured_once_a_bucket(graphed, on_cpu):
    with torch.no_grad():
        for _ in range(3):
            graphed(**twins.batch(4, 16))
            graphed.model.load_state_dict(graphed.model.state_dict())
            graphed.model.eval().requires_grad_(False)
    assert on_cpu == [(4, 16, 64)]


def test_a_model_that_does_not_show_its_changes_runs_without_graphs(graphed, on_cpu):
    graphed.model.pooler = torch.jit.script(nn.Sequential(nn.Flatten(1), nn.Linear(8 * 64, 64)))
    with torch.no_grad():
        graphed(**twins.batch(1, 8))
    assert graphed.route.startswith("a module doesn't show whether it has changed")
    assert on_cpu == []


def test_a_refusal_ends_with_a_change(graphed, on_cpu, monkeypatch):
    def refuse(self, bucket, device):
        raise RuntimeError("not now")

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(graphs.GraphedModel, "_capture", refuse)
            graphed(**twins.batch(1, 8))
        graphed(**twins.batch(1, 8))
        assert graphed.route == "no graph could be captured: not now"
        _move_data(graphed.model)
        graphed(**twins.batch(1, 8))
    assert graphed.route == "graph 1x8"


def test_positional_arguments(graphed):
    inputs = twins.batch(4, 16)
    with torch.no_grad():
        actual = graphed(inputs["input_ids"], inputs["attention_mask"])
    wanted = expected(graphed, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    assert graphed.route == "graph 4x16"
    torch.testing.assert_close(actual.pooler_output, wanted.pooler_output, atol=2e-5, rtol=1e-4)


def test_a_replay_waits_for_the_copies_of_the_one_before(graphed):
    """All graphs share their memory."""
    with torch.no_grad():
        for shape in ((4, 16), (1, 8)):
            graphed(**twins.batch(*shape))
    assert graphed.calls == ["wait", "replay", "record"] * 2


class Stream:
    """One that tells what waits for what."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


def test_a_capture_is_warmed_up_beside_the_current_stream(monkeypatch):
    calls = []

    @contextlib.contextmanager
    def block(what):
        calls.append(f"{what} begins")
        yield
        calls.append(f"{what} ends")

    model = twins.twins()[1]
    forward = model.forward

    def counted(packed_tokens, **inputs):
        assert int(inputs["attention_mask"].sum()) == packed_tokens
        calls.append(packed_tokens)
        return forward(packed_tokens=packed_tokens, **inputs)

    model.forward = counted
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", calls))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current", calls))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: block(stream.name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: calls.append("pool") or "pool")
    monkeypatch.setattr(torch.cuda, "Event", lambda: reruns.Event(calls))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")

    def graph(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        return block(f"{graph} with {pool} on {stream.name}")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    graphed = fastbert.cuda_graphs(model)
    captured = graphed._capture((2, 8, 12), torch.device("cpu"))
    assert captured.outputs.last_hidden_state.shape == (2, 8, 64)
    assert not captured.outputs.last_hidden_state.requires_grad
    assert {name: x.shape for name, x in captured.inputs.items()} == dict.fromkeys(graphs._ARGUMENTS, (2, 8))
    warm_up = ["side waits for current", "side begins", 12, 12, 12, "side ends", "current waits for side"]
    capture = ["graph with pool on side begins", 12, "graph with pool on side ends"]
    assert calls == [*warm_up, "pool", *capture]
    calls.clear()
    with torch.inference_mode():
        captured = graphed._capture((2, 8, 12), torch.device("cpu"))
    assert calls == [*warm_up, *capture]
    # Tensors of inference mode couldn't be written to outside of it.
    assert not any(x.is_inference() for x in (*captured.inputs.values(), captured.outputs.last_hidden_state))


def test_arguments_by_place_that_no_graph_takes(graphed, on_cpu):
    inputs = twins.batch(4, 16)
    positions = torch.arange(16)[None]
    with torch.no_grad():
        graphed(inputs["input_ids"], inputs["attention_mask"], None, positions, None)
        assert graphed.route == "positional argument 4 is given"
        graphed(inputs["input_ids"], None, inputs["token_type_ids"], None, None)
    assert graphed.route == "graph 4x16"
    assert len(on_cpu) == 1


@pytest.mark.parametrize("ids", [None, torch.ones(8).long(), torch.ones(1, 8, 1).long(), torch.ones(0, 8).long()])
def test_ids_that_are_no_batch(graphed, ids):
    with torch.no_grad(), pytest.raises(ValueError, match=r"input_ids|sequences of length"):
        graphed(ids)
    assert graphed.route == "input_ids isn't [batch, sequence]"


def test_a_model_that_is_traced_makes_no_graph(graphed, monkeypatch):
    ids = twins.batch(4, 16)["input_ids"]
    with torch.no_grad():
        assert graphed._given((ids,), {})[1] is None
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        given, reason = graphed._given((ids,), {})
    assert reason == "the model is being traced"
    assert given["input_ids"] is ids


@pytest.mark.parametrize("capturing", [False, True])
def test_no_graph_is_captured_inside_another(monkeypatch, capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    graphed = fastbert.cuda_graphs(twins.twins()[1])
    assert graphed._missing_device(torch.ones(1, 8)) == "graphs are of a GPU, and the tensors are on cpu"
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    assert graphed._missing_device(on_gpu) == ("a graph is being captured around it" if capturing else None)


def test_asking_for_what_there_is_anyway_changes_nothing(graphed):
    with torch.no_grad():
        graphed(**twins.batch(4, 16), output_hidden_states=False, output_attentions=False, return_dict=True)
    assert graphed.route == "graph 4x16"


def test_hidden_states_that_the_configuration_asks_for(on_cpu):
    graphed = fastbert.cuda_graphs(twins.twins(output_hidden_states=True)[1], batch_sizes=(8,), lengths=(48,))
    inputs = twins.batch()
    with torch.no_grad():
        actual = graphed(**inputs).hidden_states
    assert graphed.route == "graph 8x48"
    for one, other in zip(actual, expected(graphed, inputs).hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": (9, 8)}, "the batch is 9, and the largest bucket 8"),
        ({"batch": (1, 49)}, "the length is 49, and the largest bucket 48"),
        ({"output_hidden_states": True}, "output_hidden_states is given"),
        ({"return_dict": False}, "return_dict is given"),
        ({"position_ids": torch.arange(8)[None]}, "position_ids is given"),
        ({"train": True}, "the model is in train mode"),
        ({"grad": True}, "gradients are needed"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "hasn't the shape of input_ids"),
    ],
)
def test_what_no_graph_serves_is_run_by_the_model_with_a_reason(graphed, on_cpu, change, reason):
    change = dict(change)
    inputs = twins.batch(*change.pop("batch", (1, 8)))
    graphed.train(change.pop("train", False))
    needs_grad = change.pop("grad", False)
    with contextlib.nullcontext() if needs_grad else torch.no_grad():
        actual = graphed(**inputs, **change) if "attention_mask" not in change else graphed(**{**inputs, **change})
        wanted = graphed.model(**{**inputs, **change})
    assert reason in graphed.route
    assert on_cpu == []
    actual, wanted = ((one if isinstance(one, tuple) else one.to_tuple())[0] for one in (actual, wanted))
    torch.testing.assert_close(actual, wanted)
    assert actual.requires_grad == (needs_grad or graphed.training) or not needs_grad


def test_a_failed_capture_is_a_reason_and_is_not_tried_again(graphed, on_cpu, monkeypatch):
    tries = []

    def capture(self, bucket, device):
        tries.append(bucket)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs.GraphedModel, "_capture", capture)
    with torch.no_grad():
        for _ in range(2):
            graphed(**twins.batch(1, 8))
    assert graphed.route == "no graph could be captured: operation not permitted when stream is capturing"
    assert tries == [(1, 8, 8)]


def test_on_a_cpu_the_model_runs_and_says_why():
    graphed = fastbert.cuda_graphs(twins.twins()[1])
    with torch.no_grad():
        output = graphed(**twins.batch(1, 8))
    assert graphed.route == "graphs are of a GPU, and the tensors are on cpu"
    assert output.last_hidden_state.shape == (1, 8, 64)


@pytest.mark.parametrize("valid", [0.5, 2.0, -1.0, True, 3])
def test_masks_of_any_numbers(graphed, valid):
    inputs = twins.batch(4, 16)
    wanted = expected(graphed, inputs)
    mask = inputs["attention_mask"] * torch.tensor(valid)
    with torch.no_grad():
        actual = graphed(**{**inputs, "attention_mask": mask})
    assert graphed.route == "graph 4x16"
    torch.testing.assert_close(actual.pooler_output, wanted.pooler_output, atol=2e-5, rtol=1e-4)


def test_a_frozen_model_needs_no_gradients(graphed):
    graphed.model.requires_grad_(False)
    graphed(**twins.batch(4, 16))
    assert graphed.route == "graph 4x16"


@pytest.mark.parametrize(("lengths", "largest"), [((16, 64), 16), ((64,), "none"), ((16, 17, 20, 21), 20)])
def test_lengths_beyond_the_models_are_left_out(on_cpu, lengths, largest):
    graphed = fastbert.cuda_graphs(twins.twins(max_position_embeddings=20)[1], lengths=lengths)
    with torch.no_grad():
        graphed(**twins.batch(1, 18))
        assert graphed.route == (
            "graph 1x20" if largest == 20 else f"the length is 18, and the largest bucket {largest}"
        )


def test_what_is_not_fastberts_is_refused():
    with pytest.raises(TypeError, match=r"transformers.*BertModel; it must be one of fastbert's"):
        fastbert.cuda_graphs(transformers.BertModel(twins.config()))


@pytest.mark.parametrize("sizes", [{"batch_sizes": ()}, {"lengths": (0, 8)}])
def test_buckets_are_positive(sizes):
    with pytest.raises(ValueError, match="it must be one positive number or more"):
        fastbert.cuda_graphs(twins.twins()[1], **sizes)
