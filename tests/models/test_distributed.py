"""Two gloo ranks on the CPU: DDP and FSDP2 train like one process on the union of their batches."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import twins
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastbert.models import layers

RANKS = 2
STEPS = 3
NAME = "BertForSequenceClassification"
# Batches of the ranks have other lengths, paddings and numbers of valid tokens.
SEQLENS = (37, 20)
KINDS = ("right", "holes")
WAYS = ("ddp", "fsdp2", "fsdp2-checkpointed")
FAMILIES = ("hugging_face", "fastbert")
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def rank_batch(rank, step):
    inputs = twins.batch(4, SEQLENS[rank], KINDS[rank], seed=10 * step + rank)
    return {**inputs, **twins.labels(NAME, inputs, seed=10 * step + rank)}


def union_batch(step):
    batches = [rank_batch(rank, step) for rank in range(RANKS)]
    longest = max(SEQLENS)
    return {
        name: torch.cat([x if x.dim() == 1 else nn.functional.pad(x, (0, longest - x.shape[1])) for x in values])
        for name, values in ((name, [batch[name] for batch in batches]) for name in batches[0])
    }


def model_of(family, **changes):
    """A model in float64, where any real difference is far above rounding."""
    return twins.twins(NAME, **changes)[FAMILIES.index(family)].double().train()


def wrap(model, way):
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp2-checkpointed":
        model.gradient_checkpointing_enable()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def train(model, batches):
    """Steps of SGD: the routes that fastbert took, and the weights by the names that they have in one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    routes = []
    torch.manual_seed(0)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        routes += [part.route for part in model.modules() if hasattr(part, "route")]
    model = model.module if isinstance(model, DistributedDataParallel) else model
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.state_dict().items()
    }
    return routes, weights


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    unfused = set()
    find_reason = layers.BertSelfAttention.unfused

    def recorded(self):
        reason = find_reason(self)
        unfused.add(reason)
        return reason

    layers.BertSelfAttention.unfused = recorded
    results = {}
    batches = [rank_batch(rank, step) for step in range(STEPS)]
    for way in WAYS:
        for family in FAMILIES:
            results[way, family] = train(wrap(model_of(family), way), batches)
    for way in ("fsdp2", "fsdp2-checkpointed"):
        results[way, "dropout"] = train(wrap(model_of("fastbert", **DROPOUT), way), batches)
    torch.save((results, unfused), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found: its results, and the reasons why projections weren't fused."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    """The weights before and after training in one process."""
    model = model_of("fastbert")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    routes, weights = train(model, [union_batch(step) for step in range(STEPS)])
    assert routes == ["packed"] * STEPS
    return start, weights


def assert_same_weights(actual, expected, start):
    moved = max((expected[name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-9 * moved, rtol=0, msg=lambda m, name=name: name + m)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_train_as_one_process(way, family, ranks, alone):
    start, expected = alone
    for results, _ in ranks:
        routes, weights = results[way, family]
        assert routes == (["packed"] * STEPS if family == "fastbert" else [])
        assert_same_weights(weights, expected, start)


@pytest.mark.slow
def test_wrapping_leaves_the_projections_fused(ranks):
    for _, unfused in ranks:
        assert unfused == {None}


@pytest.mark.slow
def test_checkpointing_draws_the_same_dropout_masks(ranks, alone):
    start, without_dropout = alone
    for results, _ in ranks:
        routes, expected = results["fsdp2", "dropout"]
        assert routes == ["packed"] * STEPS
        assert_same_weights(results["fsdp2-checkpointed", "dropout"][1], expected, start)
        assert any((expected[name] - without_dropout[name]).abs().max() > 1e-5 for name in start)
