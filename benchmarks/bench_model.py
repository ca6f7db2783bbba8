"""Whole models: inference on padded batches, at batch 1 for its latency too, and training steps.

Every contestant is given the same padded batch, as a tokenizer makes it. In inference the gate compares the states of
valid tokens with Hugging Face's in float64. In training it compares the loss and all gradients with dropout off, on
two short sequences; the steps that are timed have dropout on, as their masks differ.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastbert

from . import harness, peers
from .harness import OURS, Contest, Contestant
from .peers import Absent
from .shapes import DOCSTRINGS, DOCUMENTS, MODELS, SENTENCES, Batch, Model, drawn, even, full
from .suite import Case

_FLOOR = "products alone"
_HUGGING_FACE = (peers.SDPA, peers.EAGER)
_COMPILED = (peers.COMPILED, peers.REDUCED)
_SPARSE = f"{OURS} sparse_prediction"
_GRAPHS = f"{OURS} cuda_graphs"
_FINE_TUNING, _PRETRAINING = "fine-tuning step", "pretraining step"
_MASKED = 0.15
# The threads of some runtimes spin for a while after their work, and would slow the next contestant.
_PAUSE = 0.02
_IGNORED = -100


def cases(device: str) -> list[Case]:
    # By model, so that what is exported of one serves all its batches.
    found = _on_cuda() if device == "cuda" else _on_cpu()
    return sorted(found, key=lambda case: (list(MODELS.values()).index(case.model), case.dtype))


def _on_cpu() -> list[Case]:
    """What ends within some minutes on two cores."""
    base, large, mini = (MODELS[name] for name in ("BERT-base", "BERT-large", "MiniLM-L6"))
    single, padded = full(1, 128), even(16, 128, 0.64)
    sentences, documents = drawn("sentences", 32, SENTENCES), drawn("documents", 4, DOCUMENTS)
    paragraphs = drawn("docstrings", 16, DOCSTRINGS)
    runtimes = (peers.OPENVINO, peers.ONNX)
    found = []
    for dtype in ("bfloat16", "float32"):
        quick = dtype == "bfloat16"
        found += [
            _inference_case(base, single, dtype, "cpu", (*_HUGGING_FACE, *runtimes), quick),
            _inference_case(base, padded, dtype, "cpu", (peers.SDPA, peers.OPENVINO), quick),
            _inference_case(base, full(16 if quick else 8, 128), dtype, "cpu", (peers.SDPA,)),
            _inference_case(mini, single, dtype, "cpu", (peers.SDPA, *(() if quick else _COMPILED), *runtimes)),
            _inference_case(mini, sentences, dtype, "cpu", (peers.SDPA, *runtimes)),
        ]
    found += [
        _inference_case(base, sentences, "bfloat16", "cpu", (peers.SDPA,)),
        _inference_case(base, documents, "bfloat16", "cpu", (peers.SDPA,)),
        _inference_case(mini, paragraphs, "bfloat16", "cpu", (peers.SDPA,)),
        _inference_case(large, single, "bfloat16", "cpu", (peers.SDPA,)),
        _training_case(_FINE_TUNING, base, even(8, 128, 0.64), "bfloat16", "cpu"),
        _training_case(_FINE_TUNING, base, even(4, 128, 0.64), "float32", "cpu"),
        _training_case(_PRETRAINING, base, even(4, 128, 0.64), "bfloat16", "cpu"),
        _training_case(_FINE_TUNING, mini, sentences, "bfloat16", "cpu", quick=True),
    ]
    return found


def _on_cuda() -> list[Case]:
    base, large, mini = (MODELS[name] for name in ("BERT-base", "BERT-large", "MiniLM-L6"))
    half, whole, single = even(64, 512, 0.5), full(64, 512), full(1, 128)
    sentences, documents = drawn("sentences", 512, SENTENCES), drawn("documents", 64, DOCUMENTS)
    # Compiling a model takes half a minute, so it is done for the shapes that there are targets for.
    compiled = (*_HUGGING_FACE, peers.FLASH, *_COMPILED)
    found = [_inference_case(base, batch, "bfloat16", "cuda", compiled, True) for batch in (half, whole, single)]
    others = (full(8, 128), full(16, 256), sentences, drawn("docstrings", 256, DOCSTRINGS), documents)
    found += [_inference_case(base, batch, "bfloat16", "cuda", (peers.SDPA, peers.FLASH)) for batch in others]
    found += [_inference_case(base, batch, "float32", "cuda", (peers.SDPA,)) for batch in (half, single)]
    found += [
        _inference_case(model, batch, "bfloat16", "cuda", (peers.SDPA, peers.FLASH))
        for model in (large, mini)
        for batch in (half, whole, single)
    ]
    found += [_training_case(_FINE_TUNING, base, batch, "bfloat16", "cuda", quick=True) for batch in (half, whole)]
    found += [_training_case(_PRETRAINING, base, half, "bfloat16", "cuda")]
    return found


def _inference_case(
    model: Model, batch: Batch, dtype: str, device: str, rivals: tuple[str, ...], quick: bool = False
) -> Case:
    ours = (OURS, _GRAPHS) if device == "cuda" else (OURS,)
    return Case("inference", model, batch, dtype, device, (*ours, *rivals, _FLOOR), 0.0, 2.0, quick)


def _training_case(work: str, model: Model, batch: Batch, dtype: str, device: str, quick: bool = False) -> Case:
    names = (OURS, *((_SPARSE,) if work == _PRETRAINING else ()), peers.SDPA)
    return Case(work, model, batch, dtype, device, names, 0.1, 2.0, quick)


def build(case: Case) -> Contest:
    if case.work == "inference":
        return _inference(case)
    return _training(case)


@functools.lru_cache(maxsize=1)
def _stock(model: Model) -> transformers.BertModel:
    """Hugging Face's model in float32, with random weights."""
    torch.manual_seed(0)
    return transformers.BertModel(model.config()).eval()


@functools.lru_cache(maxsize=1)
def _oracle(model: Model) -> transformers.BertModel:
    return copy.deepcopy(_stock(model)).double()


def _inference(case: Case) -> Contest:
    stock, dtype, device = _stock(case.model), case.torch_dtype, torch.device(case.device)
    inputs = {name: value.to(device) for name, value in case.batch.inputs(case.model.vocabulary).items()}
    valid = case.batch.mask().to(device)
    contestants, missing = {}, {}
    for name in case.contestants:
        if name == _FLOOR:
            continue
        try:
            forward = torch.inference_mode()(_forward(name, stock, inputs, dtype, device))
        except Absent as reason:
            missing[name] = str(reason)
        else:
            contestants[name] = Contestant(forward, _states(forward, valid))
    contestants[_FLOOR] = Contestant(_products(case.model, case.batch.tokens, dtype, device))
    return Contest(
        contestants=contestants,
        missing=missing,
        exact=_exact(case.model, case.batch, device),
        eager=contestants[peers.SDPA].judged(),
        dtype=dtype,
        device=device,
        floor=_FLOOR,
        pause=_PAUSE if device.type == "cpu" else 0.0,
    )


def _forward(
    name: str, stock: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    if name in (OURS, _GRAPHS):
        model = fastbert.accelerate(copy.deepcopy(stock).to(device, dtype), strict=True)
        if name == _GRAPHS:
            batch, seqlen = inputs["input_ids"].shape
            model = fastbert.cuda_graphs(model, batch_sizes=(batch,), lengths=(seqlen,))
            with torch.no_grad():
                model(**inputs)
            if not model.route.startswith("graph "):
                raise Absent(model.route)
        return lambda: model(**inputs).last_hidden_state
    if name == peers.OPENVINO:
        return peers.openvino(stock, inputs, dtype, device)
    if name == peers.ONNX:
        return peers.onnxruntime(stock, inputs, dtype, device)
    return peers.huggingface(name, stock, inputs, dtype, device)


def _states(forward: Callable[[], Tensor], valid: Tensor) -> Callable[[], dict[str, Tensor]]:
    # Once: Hugging Face's are the measure of all others, and then judged themselves.
    return functools.cache(lambda: {"states of valid tokens": forward()[valid]})


@functools.lru_cache(maxsize=16)
def _exact(model: Model, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What every dtype is compared with."""
    oracle = _oracle(model).to(device)
    inputs = {name: value.to(device) for name, value in batch.inputs(model.vocabulary).items()}
    return _states(torch.inference_mode()(lambda: oracle(**inputs).last_hidden_state), batch.mask().to(device))()


def _products(model: Model, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """The floor: the valid tokens' four products in every layer, each with weights of its own, by the fastest way."""
    hidden, intermediate = model.hidden, model.intermediate
    sizes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, intermediate), (intermediate, hidden)]
    calls: list[Callable[[], Tensor]] = []
    for depth, features in sizes:
        x = torch.randn(tokens, depth, device=device).to(dtype)
        weights = [torch.randn(features, depth, device=device).to(dtype) for _ in range(model.layers)]
        prepared = [harness.products(weight) for weight in weights]
        ways = {way: [functools.partial(layer[way], x) for layer in prepared] for way in prepared[0]}
        # In turn through the layers, so that no weight is still in a cache.
        racing = {way: functools.partial(_run, layers[:3]) for way, layers in ways.items()}
        timed = harness.interleave(racing, 0.1, device)
        calls += ways[min(timed, key=lambda way: harness.summarise(timed[way][0]).median)]
    return functools.partial(_run, [calls[i] for j in range(model.layers) for i in range(j, len(calls), model.layers)])


def _run(calls: list[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()


def _training(case: Case) -> Contest:
    device, dtype = torch.device(case.device), case.torch_dtype
    heads = {_FINE_TUNING: "BertForSequenceClassification", _PRETRAINING: "BertForPreTraining"}
    torch.manual_seed(0)
    stock = getattr(transformers, heads[case.work])(case.model.config())
    batch = _labelled(case.work, case.batch, case.model, device)
    short = _labelled(case.work, Batch("gate", (24, 17), 24), case.model, device)
    models = {
        peers.SDPA: copy.deepcopy(stock).to(device, dtype),
        OURS: fastbert.accelerate(copy.deepcopy(stock).to(device, dtype), strict=True),
    }
    if _SPARSE in case.contestants:
        models[_SPARSE] = fastbert.accelerate(copy.deepcopy(stock).to(device, dtype), strict=True)
        models[_SPARSE].sparse_prediction = True
    contestants = {
        name: Contestant(
            _step(models[name], batch), functools.cache(functools.partial(_gradients, models[name], short))
        )
        for name in case.contestants
    }
    return Contest(
        contestants=contestants,
        missing={},
        exact=_gradients(copy.deepcopy(stock).to(device).double(), short),
        eager=contestants[peers.SDPA].judged(),
        dtype=dtype,
        device=device,
        flops=3.0 * case.model.forward_flops(case.batch.lengths),
    )


def _labelled(work: str, batch: Batch, model: Model, device: torch.device) -> dict[str, Tensor]:
    """A batch with labels: a class for each sequence, or 15% of the valid tokens and whether the sentences follow."""
    inputs = batch.inputs(model.vocabulary)
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(2, (len(batch.lengths),), generator=generator)
    if work == _FINE_TUNING:
        inputs["labels"] = classes
    else:
        predicted = (torch.rand(inputs["input_ids"].shape, generator=generator) < _MASKED) & batch.mask()
        inputs["labels"] = torch.where(predicted, inputs["input_ids"], _IGNORED)
        inputs["next_sentence_label"] = classes
    return {name: value.to(device) for name, value in inputs.items()}


def training_step(model: nn.Module, batch: Batch, sizes: Model, device: torch.device) -> Callable[[], None]:
    """A step of fine-tuning a classifier on ``batch``."""
    return _step(model, _labelled(_FINE_TUNING, batch, sizes, device))


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW's update."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and the gradients, those of each part of the model side by side, with dropout off."""
    training = model.training
    model.eval()
    loss = model(**batch).loss
    loss.backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("bert.") else name.split(".")[0]
        parts.setdefault(f"gradients of {part}", []).append(parameter.grad.detach().double().flatten())
    model.zero_grad()
    model.train(training)
    return {"loss": loss.detach(), **{part: torch.cat(found) for part, found in parts.items()}}


def bench_model(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
