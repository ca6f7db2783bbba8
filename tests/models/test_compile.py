"""torch.compile and torch.export: one graph, no break, the results of eager fastbert.

While tracing, ``route`` isn't set; the ops in the graph tell which way it goes.
"""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from models import twins
from torch import nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.backends import prepacked

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

MASKS = ("none", "right", "left", "holes")
SHAPES = ((5, 37), (4, 21), (7, 50))
PACKED_OPS = {"fastbert.embedding_layer_norm", "fastbert.attention", "fastbert.linear_gelu"}


class Compiled:
    """A model compiled as one graph; ``graphs`` grows by one with every compilation."""

    def __init__(self, model: nn.Module, backend: str = "aot_eager", **options: object) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        compile_graph = torch._dynamo.lookup_backend(backend)

        def record(graph, example_inputs):
            self.graphs.append(graph)
            return compile_graph(graph, example_inputs)

        self.run = torch.compile(model, fullgraph=True, backend=record, **options)

    def __call__(self, **inputs):
        return self.run(**inputs)

    @property
    def packed(self) -> bool:
        assert self.graphs
        return all(is_packed(graph.graph) for graph in self.graphs)


def is_packed(graph: torch.fx.Graph) -> bool:
    called = {str(node.target).removesuffix(".default") for node in graph.nodes}
    return called >= PACKED_OPS and not any("scaled_dot_product" in name for name in called)


def in_float64(name="BertModel", **changes):
    """fastbert's model in float64, where a wrong mask or product is far above rounding."""
    return twins.twins(name, **changes)[1].double()


def loss_and_gradients(run, model, inputs, seed=11):
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = run(**inputs)
    loss = outputs["loss"] if "loss" in outputs else outputs.last_hidden_state[twins.valid(inputs)].square().sum()
    loss.backward()
    return loss.detach(), {path: p.grad for path, p in model.named_parameters()}


def assert_trains_alike(compiled, model, inputs):
    loss, gradients = loss_and_gradients(compiled, model, inputs)
    expected_loss, expected = loss_and_gradients(model, model, inputs)
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-9)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())
    for path, gradient in expected.items():
        torch.testing.assert_close(gradients[path], gradient, atol=1e-9, rtol=1e-9, msg=lambda m, path=path: path + m)


@pytest.mark.parametrize(
    ("kind", "no_gradients"), [*((kind, torch.no_grad) for kind in MASKS), ("right", torch.inference_mode)]
)
def test_inference_of_many_shapes(kind, no_gradients):
    # Two layers where the mask has holes, one elsewhere: tracing takes most of the time.
    reference, fast = twins.twins(num_hidden_layers=2 if kind == "holes" else 1)
    compiled = Compiled(fast)
    with no_gradients():
        for shape in SHAPES:
            inputs = twins.batch(*shape, kind)
            where = twins.valid(inputs)
            expected, actual = reference(**inputs), compiled(**inputs)
            torch.testing.assert_close(
                actual.last_hidden_state[where], expected.last_hidden_state[where], atol=1e-5, rtol=0
            )
            assert (actual.last_hidden_state[~where] == 0).all()
            # A pooled state that only the padded way has, which a graph can't choose by the mask's values, is NaN.
            pooled = where[:, 0]
            torch.testing.assert_close(actual.pooler_output[pooled], expected.pooler_output[pooled], atol=1e-5, rtol=0)
            assert actual.pooler_output[~pooled].isnan().all()
    assert compiled.packed
    # The first shape is compiled as it is, the second makes batch and length dynamic.
    assert len(compiled.graphs) == 2


def test_dynamic_from_the_start_serves_all_shapes():
    fast = twins.twins()[1]
    compiled = Compiled(fast, dynamic=True)
    compilations = []
    with torch.no_grad():
        for shape in SHAPES:
            inputs = twins.batch(*shape)
            torch.testing.assert_close(
                compiled(**inputs).last_hidden_state, fast(**inputs).last_hidden_state, atol=1e-5, rtol=0
            )
            compilations.append(len(compiled.graphs))
    assert compilations[-1] == compilations[0]


def test_graphs_and_prepacked_weights_leave_each_other_alone():
    fast, other = twins.twins(num_hidden_layers=1)[1], twins.twins(num_hidden_layers=1)[1]
    inputs = twins.batch()
    compiled = Compiled(fast)
    with torch.no_grad():
        fast(**inputs)
        kept = [prepacked._entries[module] for module in fast.modules() if module in prepacked._entries]
        assert kept
        compiled(**inputs)
        assert [prepacked._entries[module] for module in fast.modules() if module in prepacked._entries] == kept
        other(**inputs)
        compiled(**inputs)
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("kind", ["right", "holes"])
def test_gradients_equal_eager(kind):
    fast = in_float64(num_hidden_layers=1).train()
    fast.pooler = None
    compiled = Compiled(fast)
    for shape in SHAPES:
        assert_trains_alike(compiled, fast, twins.batch(*shape, kind))
        twins.assert_packed(fast)
    assert compiled.packed
    assert len(compiled.graphs) == 2


@pytest.mark.parametrize("kind", MASKS)
def test_dropout_draws_the_masks_of_eager(kind):
    fast = in_float64(num_hidden_layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train()
    fast.pooler = None
    compiled = Compiled(fast)
    inputs = twins.batch(kind=kind)
    assert_trains_alike(compiled, fast, inputs)
    twins.assert_packed(fast)
    assert compiled.packed
    loss, _ = loss_and_gradients(compiled, fast, inputs)
    assert loss != loss_and_gradients(compiled, fast, inputs, seed=12)[0]
    assert loss == loss_and_gradients(compiled, fast, inputs)[0]


@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("BertForMaskedLM", "none", True),
        # Labels may be on padding, and a graph can't look.
        ("BertForMaskedLM", "right", False),
        ("BertForSequenceClassification", "right", True),
        ("BertForQuestionAnswering", "right", False),
    ],
)
def test_heads(name, kind, packed):
    fast = in_float64(name, num_hidden_layers=1).train()
    compiled = Compiled(fast)
    inputs = twins.head_batch(name, kind)
    assert_trains_alike(compiled, fast, inputs)
    assert compiled.packed == packed
    unlabelled = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    fast.eval()
    with torch.no_grad():
        expected, actual = fast(**unlabelled).to_tuple(), compiled(**unlabelled).to_tuple()
    for left, right in zip(actual, expected, strict=True):
        if left.dim() == 3:
            left, right = left[twins.valid(inputs)], right[twins.valid(inputs)]
        torch.testing.assert_close(left, right)


def test_sequences_in_one_row():
    fast = twins.twins(num_hidden_layers=1)[1]
    compiled = Compiled(fast)
    lengths = torch.tensor([7, 1, 12])
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    inputs = {**twins.batch(1, 20, "none"), "cu_seq_lens_q": cu_seqlens, "max_length_q": 12}
    with torch.no_grad():
        expected, actual = fast(**inputs), compiled(**inputs)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert compiled.packed


@pytest.mark.parametrize("kind", ["none", "right"])
def test_attention_interface_of_a_stock_model(kind):
    stock = hf.BertModel(twins.config(attn_implementation="fastbert", num_hidden_layers=1)).eval()
    compiled = Compiled(stock)
    inputs = twins.batch(kind=kind)
    with torch.no_grad():
        expected, actual = stock(**inputs), compiled(**inputs)
    where = twins.valid(inputs)
    torch.testing.assert_close(actual.last_hidden_state[where], expected.last_hidden_state[where], atol=1e-5, rtol=0)
    assert any("fastbert.attention" in str(node.target) for node in compiled.graphs[0].graph.nodes)


def test_accelerated_model():
    stock = hf.BertModel(twins.config()).eval()
    inputs = twins.batch()
    with torch.no_grad():
        expected = stock(**inputs).last_hidden_state[twins.valid(inputs)]
        compiled = Compiled(fastbert.accelerate(stock))
        actual = compiled(**inputs).last_hidden_state[twins.valid(inputs)]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert compiled.packed


@pytest.mark.slow
# Inductor has a random generator of its own, unless told to use eager's. Its caches of graphs on disk know an op by its
# name and arguments, not by what its fake returns: a graph compiled before the op changed would be taken for ours. That
# of C++ has the source as its key, and serves.
@torch._inductor.config.patch(fallback_random=True, fx_graph_cache=False, compile_threads=1)
@torch._functorch.config.patch(enable_autograd_cache=False)
def test_inductor():
    fast = twins.twins("BertForSequenceClassification", num_hidden_layers=1, hidden_dropout_prob=0.1)[1].train()
    compiled = Compiled(fast, "inductor")
    inputs = twins.head_batch("BertForSequenceClassification")
    loss, gradients = loss_and_gradients(compiled, fast, inputs)
    expected_loss, expected = loss_and_gradients(fast, fast, inputs)
    torch.testing.assert_close(loss, expected_loss)
    # Inductor sums in another order: float32 rounding is relative to the largest terms, not to each sum.
    largest = max(gradient.abs().max() for gradient in expected.values())
    for path, gradient in expected.items():
        assert (gradients[path] - gradient).abs().max() <= 1e-5 * largest, path
    assert compiled.packed


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("implementation", ["sdpa", "fastbert"])
def test_export_with_dynamic_batch_and_length(kind, implementation):
    """Torch's own operators, or the fused ones where they are asked for."""
    fast = twins.twins(attn_implementation=implementation)[1]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=fast.config.max_position_embeddings)
    example = twins.batch(kind=kind)
    program = torch.export.export(fast, (), example, dynamic_shapes={name: {0: batch, 1: length} for name in example})
    ours = implementation == "fastbert"
    assert is_packed(program.graph) == ours
    assert any(str(node.target).startswith("fastbert") for node in program.graph.nodes) == ours
    exported = program.module()
    with torch.no_grad():
        for shape in ((5, 37), (1, 20), (3, 64), (8, 5), (2, 600)):
            inputs = twins.batch(*shape, kind)
            where = twins.valid(inputs)
            expected, actual = fast(**inputs), exported(**inputs)
            torch.testing.assert_close(actual[0][where], expected[0][where], atol=1e-5, rtol=0)
            torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)


def test_exported_program_survives_a_file(tmp_path):
    fast = twins.twins(num_hidden_layers=1, attn_implementation="fastbert")[1]
    inputs = twins.batch()
    torch.export.save(torch.export.export(fast, (), inputs), tmp_path / "model.pt2")
    with torch.no_grad():
        expected = fast(**inputs).last_hidden_state
        actual = torch.export.load(tmp_path / "model.pt2").module()(**inputs).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
