"""What a model carries with it: weights edited after use, copies, caches, threads, hooks, and a bare environment."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch
from models import twins
from torch import nn

import fastbert
from fastbert.backends import prepacked

# Owners of prepacked weights in two layers: projections, attention output, intermediate, output.
PREPACKED = 2 * 4

LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def states(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def owners(model):
    """How many modules of a model own a prepacked weight."""
    return sum(module in prepacked._entries for module in model.modules())


def warm():
    """A model whose prepacked weights have been used, and a batch."""
    fast = twins.twins()[1]
    inputs = twins.batch()
    states(fast, inputs)
    twins.assert_packed(fast)
    assert owners(fast) == PREPACKED
    return fast, inputs


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    buffer = saved(model)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("transport", [copy.deepcopy, through_pickle, through_file])
def test_copies_after_inference_case_49(transport):
    fast, inputs = warm()
    expected = states(fast, inputs)
    twin = transport(fast)
    assert owners(twin) == 0
    assert type(twin) is fastbert.BertModel
    assert torch.equal(states(twin, inputs), expected)
    twins.assert_packed(twin)
    assert owners(twin) == PREPACKED
    with torch.no_grad():
        twin.encoder.layer[0].intermediate.dense.weight.mul_(2)
    assert not torch.equal(states(twin, inputs), expected)
    assert torch.equal(states(fast, inputs), expected)


def test_prepacked_weights_are_not_saved_case_49():
    cold = twins.twins()[1]
    size = len(saved(cold).getvalue())
    keys = list(cold.state_dict())
    size_of_state = len(saved(cold.state_dict()).getvalue())
    states(cold, twins.batch())
    assert owners(cold) == PREPACKED
    assert list(cold.state_dict()) == keys
    assert len(saved(cold.state_dict()).getvalue()) == size_of_state
    # The smallest prepacked weight has 64 * 64 * 4 bytes; what may be added is the name of the last route.
    assert len(saved(cold).getvalue()) < size + 1024


def test_prepacked_weights_go_with_the_model():
    gc.collect()
    before = len(prepacked._entries)
    fast = warm()[0]
    assert len(prepacked._entries) == before + PREPACKED
    owner = fast.encoder.layer[0].intermediate
    weight = weakref.ref(prepacked._entries[owner].packed.weight)
    del owner
    del fast
    gc.collect()
    assert len(prepacked._entries) == before
    assert weight() is None


def test_training_drops_prepacked_weights():
    fast, inputs = warm()
    fast(**inputs).last_hidden_state.sum().backward()
    assert owners(fast) == 0


def _multiply(linear, name):
    with torch.no_grad():
        getattr(linear, name).mul_(1.5)


def _multiply_in_inference_mode(linear, name):
    with torch.inference_mode():
        getattr(linear, name).mul_(1.5)


def _multiply_data(linear, name):
    getattr(linear, name).data.mul_(1.5)


def _copy_into_data(linear, name):
    parameter = getattr(linear, name)
    parameter.data.copy_(parameter.flip(0))


def _clear_rows_of_data(linear, name):
    # What is left of a pruned head: a quarter of the rows.
    getattr(linear, name).data[16:32] = 0


def _clear_columns_of_data(linear, name):
    getattr(linear, name).data[..., 16:32] = 0


def _replace_data(linear, name):
    parameter = getattr(linear, name)
    parameter.data = parameter.data * 1.5


def _write_through_numpy(linear, name):
    getattr(linear, name).detach().numpy()[:] *= 1.5


def _replace_parameter(linear, name):
    setattr(linear, name, nn.Parameter(getattr(linear, name).detach() * 1.5))


def _load_state(linear, name):
    linear.load_state_dict({**linear.state_dict(), name: getattr(linear, name).detach() * 1.5})


def _assign_state(linear, name):
    linear.load_state_dict({**linear.state_dict(), name: getattr(linear, name).detach() * 1.5}, assign=True)


def _optimise(linear, name):
    parameter = getattr(linear, name)
    parameter.grad = parameter.detach().clone()
    torch.optim.SGD([parameter], lr=0.5).step()


EDITS = (
    _multiply,
    _multiply_in_inference_mode,
    _multiply_data,
    _copy_into_data,
    _clear_rows_of_data,
    _clear_columns_of_data,
    _replace_data,
    _write_through_numpy,
    _replace_parameter,
    _load_state,
    _assign_state,
    _optimise,
)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("path", LINEARS)
def test_edited_weights_are_used_case_50(path, edit):
    fast, inputs = warm()
    linear = fast.encoder.layer[1].get_submodule(path)
    for name in ("weight", "bias"):
        before = states(fast, inputs)
        edit(linear, name)
        # A copy has no prepacked weights, and so none that are stale.
        expected, actual = states(copy.deepcopy(fast), inputs), states(fast, inputs)
        twins.assert_packed(fast)
        assert torch.equal(actual, expected)
        # In exact arithmetic the bias of the keys changes nothing: softmax takes it out.
        if not (path.endswith("key") and name == "bias"):
            assert not torch.allclose(actual, before, atol=1e-3)


def test_a_replaced_linear_is_used_case_50():
    fast, inputs = warm()
    fast.encoder.layer[0].output.dense = nn.Linear(148, 64)
    fast.encoder.layer[1].attention.self.query = nn.Linear(64, 64)
    assert torch.equal(states(fast, inputs), states(copy.deepcopy(fast), inputs))


def test_weights_at_a_freed_address_are_used_case_50():
    """The allocator likes to give a new weight the address of the old one; here every weight has that of one array."""
    fast, inputs = warm()
    dense = fast.encoder.layer[0].intermediate.dense
    memory = dense.weight.detach().numpy().copy()
    addresses = set()
    for _ in range(8):
        dense.weight = None
        memory[:] = torch.randn(memory.shape).numpy()
        dense.weight = nn.Parameter(torch.from_numpy(memory))
        addresses.add(dense.weight.data_ptr())
        assert torch.equal(states(fast, inputs), states(copy.deepcopy(fast), inputs))
    assert len(addresses) == 1


def test_a_model_loaded_over_another_is_used_case_50():
    fast, inputs = warm()
    reference, other = twins.twins(seed=1)
    fast.load_state_dict(other.state_dict())
    assert torch.equal(states(fast, inputs), states(other, inputs))
    where = twins.valid(inputs)
    torch.testing.assert_close(states(fast, inputs)[where], states(reference, inputs)[where], atol=1e-5, rtol=0)


def test_training_between_inferences_case_50():
    models = twins.twins("BertForMaskedLM")
    inputs = twins.head_batch("BertForMaskedLM")
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            with torch.no_grad():
                model(**inputs)
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    reference, fast = models
    with torch.no_grad():
        fresh = copy.deepcopy(fast)(**inputs).loss
        assert torch.equal(fast(**inputs).loss, fresh)
        assert (fresh - reference(**inputs).loss).abs() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_after_inference_case_50(dtype):
    fast, inputs = warm()
    fresh = copy.deepcopy(fast).to(dtype)
    there = states(fast.to(dtype), inputs)
    assert there.dtype == dtype
    assert torch.equal(there, states(fresh, inputs))
    back = states(fast.float(), inputs)
    assert torch.equal(back, states(copy.deepcopy(fast), inputs))


@pytest.mark.parametrize("size", [64, 128])
def test_resized_vocabulary_case_50(size):
    reference, fast = twins.twins("BertForMaskedLM")
    inputs = twins.batch(vocab_size=64)
    with torch.no_grad():
        fast(**inputs)
        for model in (reference, fast):
            model.resize_token_embeddings(size)
        fast.load_state_dict(reference.state_dict())
        inputs["input_ids"][0, 0] = size - 1
        expected, actual = reference(**inputs).logits, fast(**inputs).logits
    twins.assert_packed(fast)
    where = twins.valid(inputs)
    assert actual.shape[-1] == size
    torch.testing.assert_close(actual[where], expected[where], atol=1e-5, rtol=0)
    inputs["input_ids"][0, 0] = size
    with pytest.raises(IndexError, match=f"input_ids holds {size}"):
        fast(**inputs)


def run_threads(count, work):
    """Call ``work(index)`` in ``count`` threads that start together; raise what any of them raised."""
    together = threading.Barrier(count)
    errors = []

    def body(index):
        try:
            together.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_with_cold_caches_case_33():
    torch.set_num_threads(2)
    fast = twins.twins()[1]
    batches = [twins.batch(2, 9 + index, ("right", "holes")[index % 2], seed=index) for index in range(8)]
    expected = [states(fast, inputs) for inputs in batches]
    for _ in range(10):
        for module in fast.modules():
            prepacked.drop(module)
        actual = {}

        def work(index, actual=actual):
            actual[index] = states(fast, batches[index])

        run_threads(8, work)
        for index, wanted in enumerate(expected):
            assert torch.equal(actual[index], wanted)


def test_threads_that_infer_and_train_together_case_33():
    # Inference fills the caches that training drops.
    fast = twins.twins()[1]
    batches = [twins.batch(2, 9 + index, seed=index) for index in range(8)]
    expected = [states(fast, inputs) for inputs in batches]

    def work(index):
        for _ in range(5):
            with torch.set_grad_enabled(index % 2 == 1):
                actual = fast(**batches[index]).last_hidden_state
            assert actual.requires_grad == (index % 2 == 1)
            torch.testing.assert_close(actual.detach(), expected[index], atol=1e-5, rtol=0)

    run_threads(8, work)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_nothing_uninitialised_is_read_case_13(name, request):
    changes = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    fast = twins.twins(name, **changes)[1]
    inputs = twins.batch(kind="holes") if name == "BertModel" else twins.head_batch(name, "holes")

    def results():
        torch.manual_seed(0)
        fast.zero_grad()
        with torch.no_grad():
            found = list(fast.eval()(**inputs).to_tuple())
        outputs = fast.train()(**inputs)
        (outputs.last_hidden_state.square().mean() if name == "BertModel" else outputs.loss).backward()
        return found + [x.detach() for x in outputs.to_tuple()] + [p.grad for p in fast.parameters()]

    expected = results()
    request.getfixturevalue("poisoned_allocator")
    actual = results()
    twins.assert_packed(fast)
    for left, right in zip(actual, expected, strict=True):
        assert (left is None) == (right is None)
        assert left is None or (left.isfinite().all() and torch.equal(left, right))


def run_python(code):
    """Run ``code`` in a process of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_without_triton_extension_and_gpu_case_44():
    run_python("""
        import os, sys
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.modules["triton"] = sys.modules["fastbert._C"] = None
        import torch
        from transformers import BertConfig, BertModel
        import fastbert
        from fastbert.backends import extension, select

        assert extension.load() is None
        assert "fastbert._C could not be loaded" in extension.missing()
        assert "pip install" in extension.missing()
        rows = select.table("bias_dropout_residual").explain(select.Request("cpu", torch.float32))
        reasons = {row.implementation: " ".join(row.reasons) for row in rows}
        assert "fastbert._C" in reasons["cpu"]
        assert "fastbert._C" in reasons["cuda"]
        assert [row.implementation for row in rows if row.chosen] == ["reference"]

        config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        reference, fast = BertModel(config).eval(), fastbert.BertModel(config).eval()
        fast.load_state_dict(reference.state_dict())
        ids = torch.randint(1, 50, (3, 10))
        mask = torch.arange(10) < torch.tensor([[10], [4], [1]])
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected, actual = (model(ids, attention_mask=mask).last_hidden_state for model in (reference, fast))
            assert fast.route == "packed"
            assert (expected - actual)[mask].abs().max() < 1e-5
        actual.sum().backward()
        assert all(row.implementation for row in fastbert.explain(fast))
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
        fastbert.BertModel(config).train()(ids).pooler_output.sum().backward()
    """)


def test_import_touches_nothing_outside():
    run_python("""
        import sys, threading
        import torch, transformers
        from transformers.models.bert import modeling_bert

        def settings():
            return (
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
                torch.backends.mkldnn.enabled, torch.backends.cuda.matmul.allow_tf32, torch.initial_seed(),
                torch.get_rng_state().sum().item(), threading.active_count(), dict(vars(modeling_bert)),
            )

        def refuse(event, arguments):
            if event.startswith(("socket.", "pickle.", "subprocess.", "os.system", "os.exec", "os.fork")):
                raise AssertionError(f"{event} {arguments}")

        before = settings()
        sys.addaudithook(refuse)
        import fastbert
        assert settings() == before
        assert not torch.cuda.is_initialized()
        assert "fastbert._C" not in sys.modules
    """)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("path", ["encoder.layer.0", "encoder.layer.1.attention.self.query", "embeddings"])
def test_hooks_see_padded_states_case_35(path, kind):
    seen = []

    def hook(module, *tensors):
        seen.append([x.shape for x in torch.utils._pytree.tree_leaves(tensors) if isinstance(x, torch.Tensor)])

    inputs = twins.batch()
    shapes = []
    for model in twins.twins():
        seen.clear()
        handle = getattr(model.get_submodule(path), f"register_{kind}_hook")(hook)
        model(**inputs).last_hidden_state[twins.valid(inputs)].square().sum().backward()
        shapes.append(list(seen))
        assert all(shape[:2] == (5, 37) for call in seen for shape in call if len(shape) == 3)
        assert seen
        if isinstance(model, fastbert.BertModel):
            assert "has a hook (test_hooks_see_padded_states_case_35.<locals>.hook)" in model.route
            assert any(model.route == row.reason for row in fastbert.explain(model))
        handle.remove()
    assert shapes[0] == shapes[1]
    model(**inputs)
    twins.assert_packed(model)


def test_models_do_not_disturb_one_another():
    inputs = twins.batch()
    variants = (
        {},
        {"hidden_act": "gelu_new"},
        {"attn_implementation": "eager"},
        {"num_attention_heads": 2},
        {"layer_norm_eps": 1e-2},
        {"hidden_dropout_prob": 0.5},
    )

    def built(changes):
        fast = twins.twins(**changes)[1]
        return fast.train() if "hidden_dropout_prob" in changes else fast

    def run(fast):
        torch.manual_seed(7)
        return states(fast, inputs)

    alone = [run(built(changes)) for changes in variants]
    models = [built(changes) for changes in variants]
    for _ in range(2):
        for fast, expected in zip(models, alone, strict=True):
            assert torch.equal(run(fast), expected)
            assert (fast.route == "packed") == (fast.config._attn_implementation != "eager")
