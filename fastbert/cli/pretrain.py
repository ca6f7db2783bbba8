"""``fastbert pretrain``: a BERT from a corpus, or a checkpoint trained on with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
import transformers
import typer
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

import fastbert
from fastbert.cli import checkpoint, configuration, json_files, machine
from fastbert.cli.errors import Refusal, first_line
from fastbert.cli.options import Device
from fastbert.models.bert import IGNORED_LABEL
from fastbert.training import batches, card, corpus, pretraining, run, vocabulary
from fastbert.training.corpus import Document
from fastbert.training.errors import DataError
from fastbert.training.kinds import Objective
from fastbert.training.masking import Ids, Masking
from fastbert.training.pretraining import Examples
from fastbert.training.run import Settings

HEADS: dict[Objective, type[PreTrainedModel]] = {
    Objective.mlm_nsp: fastbert.BertForPreTraining,
    Objective.mlm: fastbert.BertForMaskedLM,
    Objective.mae: fastbert.BertForMaskedAutoencoding,
}
# BERT-tiny of Turc et al., "Well-Read Students Learn Better", arXiv:1908.08962: two cores train it in minutes. Its
# weights begin at 1 / sqrt(hidden_size): from BERT's 0.02 so narrow a model learns how common each token is, and little
# else for its first thousand steps (docs/training.md). So few steps have no use for dropout.
_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "initializer_range": 0.09,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_POSITIONS = 512


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's arguments, beside the run's own settings; see its ``--help``."""

    corpus: Path | None
    objective: Objective
    model: str | None
    config: Path | None
    vocab_size: int
    lowercase: bool
    max_length: int
    mask_ratio: float
    whole_word: bool
    eval_fraction: float
    device: Device | None
    threads: int | None
    allow_pickle: bool


def main(options: Options, settings: Settings) -> None:
    """Pretrain, and leave a checkpoint in the output folder.

    Raises:
        Refusal, DataError: the corpus, the checkpoint, the configuration or the output folder can't be used.
    """
    machine.choose_device(options.device, options.threads)
    run.join_processes(settings)
    if options.model is not None and options.config is not None:
        raise Refusal("--model and --config are both given; a model's configuration is its own")
    started = checkpoint.find(options.model, options.allow_pickle) if options.model is not None else None
    documents = corpus.read(options.corpus)
    train_documents, eval_documents = _split(documents, options.eval_fraction, settings.seed)
    about = {**dataclasses.asdict(options), "device": None, "threads": None}
    with run.opened(settings, {"command": "pretrain", **about}) as resumed:
        _train(options, settings, started, train_documents, eval_documents, about, resumed)


def _train(
    options: Options,
    settings: Settings,
    started: checkpoint.Checkpoint | None,
    train_documents: list[Document],
    eval_documents: list[Document],
    about: dict[str, Any],
    resumed: Path | None,
) -> None:
    tokenizer = _tokenizer(options, settings, started, train_documents)
    transformers.set_seed(settings.seed)
    model = _model(options, started, tokenizer)
    if options.max_length > model.config.max_position_embeddings:
        raise Refusal(
            f"--max-length is {options.max_length}; the model has positions for "
            f"{model.config.max_position_embeddings} tokens"
        )
    encoded = pretraining.encode(train_documents, tokenizer)
    masking = Masking(tokenizer, options.mask_ratio, options.whole_word)
    train_data = Examples(encoded, options.objective, masking, options.max_length, settings.seed)
    eval_data = None
    if eval_documents:
        held_out = pretraining.encode(eval_documents, tokenizer)
        eval_data = Examples(held_out, options.objective, masking, options.max_length, settings.seed + 1)
    entropy = pretraining.unigram_entropy(encoded)
    if run.is_main_process():
        tokens = sum(train_data.lengths)
        typer.echo(
            f"{len(train_documents):,} documents, {len(train_data):,} sequences of up to {options.max_length} tokens, "
            f"{tokens:,} tokens of a vocabulary of {len(tokenizer):,}; unigram entropy {entropy:.3f}",
            err=True,
        )
    scores = run.train(
        model,
        tokenizer,
        train_data,
        eval_data,
        settings,
        collator=batches.Collator(tokenizer.pad_token_id, pretraining.KEYS[options.objective]),
        checkpoint=resumed,
        compute_metrics=_scores,
        preprocess_logits=_predicted,
    )
    if run.is_main_process():
        card.write(
            settings.output,
            title=f"BERT, pretrained for {options.objective}",
            text=f"Trained on {options.corpus or 'the docstrings of the Python standard library'}, "
            f"{tokens:,} tokens, with a unigram entropy of {entropy:.3f} nats.",
            pipeline_tag=None if options.objective == Objective.mae else "fill-mask",
            base=started.name if started else None,
            settings={**about, **dataclasses.asdict(settings)},
            scores=scores,
            dataset=f"{options.eval_fraction:.0%} of the corpus's documents, held out",
        )
        typer.echo(f"{settings.output}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def _split(documents: Sequence[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, evaluation): whole documents, the second about ``fraction`` of them."""
    count = round(fraction * len(documents))
    if fraction and (count == 0 or count == len(documents)):
        raise DataError(
            f"--eval-fraction {fraction} of {len(documents)} documents leaves none to "
            f"{'evaluate' if count == 0 else 'train'} on; 0 evaluates on nothing"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = set(order[:count].tolist())
    return (
        [document for index, document in enumerate(documents) if index not in held_out],
        [documents[index] for index in sorted(held_out)],
    )


def _tokenizer(
    options: Options, settings: Settings, started: checkpoint.Checkpoint | None, documents: Sequence[Document]
) -> PreTrainedTokenizerBase:
    if started is not None:
        return checkpoint.load_tokenizer(started)
    # Learnt once, by one process, and not again where a run goes on.
    there = settings.resume and (settings.output / "tokenizer.json").is_file()
    if run.is_main_process() and not there:
        sentences = [sentence for document in documents for sentence in document]
        learnt = vocabulary.learn(sentences, options.vocab_size, options.max_length, options.lowercase)
        learnt.save_pretrained(settings.output)
    run.wait_for_everyone()
    return checkpoint.tokenizer_in(settings.output, str(settings.output))


def _model(
    options: Options, started: checkpoint.Checkpoint | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    head = HEADS[options.objective]
    model: PreTrainedModel
    if started is not None:
        model, missing = checkpoint.load_head(started, head, started.config, complete=False)
        if missing and run.is_main_process():
            typer.echo(f"{started.name} has no head for {options.objective}; a new one is trained", err=True)
    else:
        settings: dict[str, Any] = {**_SMALL, "max_position_embeddings": max(_POSITIONS, options.max_length)}
        if options.config is not None:
            settings = _read_config(options.config)
        settings["vocab_size"] = len(tokenizer)
        settings["pad_token_id"] = tokenizer.pad_token_id
        config = configuration.make(settings, f"--config {options.config}")
        needed, memory = 4 * configuration.parameters(config), machine.memory()
        if needed > memory:
            raise Refusal(
                f"--config {options.config} describes a BERT of {needed / 1e9:,.1f} GB, and this machine has "
                f"{memory / 1e9:,.1f} GB of memory"
            )
        try:
            model = head(config)
        except (RuntimeError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
            # What transformers takes from a configuration besides a BERT's own values.
            raise Refusal(f"--config {options.config} makes no model: {first_line(error)}") from error
    if isinstance(model, fastbert.BertForPreTraining | fastbert.BertForMaskedLM):
        model.sparse_prediction = True
    return model


def _read_config(path: Path) -> dict[str, Any]:
    found = json_files.read_object(path / "config.json" if path.is_dir() else path, f"--config {path}")
    if found.get("model_type", "bert") != "bert":
        raise Refusal(f"--config {path} has model_type {found['model_type']}; it must be bert")
    return {name: value for name, value in found.items() if name not in ("model_type", "architectures")}


def _predicted(logits: Any, labels: Any) -> tuple[Tensor, ...]:
    """``[B, S]``: the likeliest token at each place with a label, and the loss there; ``[B]``: next or random."""
    tokens, *next_sentence = logits if isinstance(logits, tuple) else (logits,)
    wanted = labels[0] if isinstance(labels, tuple) else labels
    labelled = wanted != IGNORED_LABEL
    predicted = wanted.masked_scatter(labelled, tokens.argmax(-1))
    losses = F.cross_entropy(tokens.float(), wanted[labelled], reduction="none")
    losses = losses.new_zeros(wanted.shape).masked_scatter(labelled, losses)
    return (predicted, losses, *(choice.argmax(-1) for choice in next_sentence))


def _scores(prediction: EvalPrediction) -> dict[str, float]:
    labels: Any = prediction.label_ids
    predictions: Any = prediction.predictions
    predicted, losses, *next_sentence = predictions
    wanted, *is_random = labels if isinstance(labels, tuple) else (labels,)
    labelled = wanted != IGNORED_LABEL
    tokens: Ids = wanted[labelled]
    scores = {
        "masked_loss": float(losses[labelled].mean()),
        "masked_accuracy": float(accuracy_score(tokens, predicted[labelled])),
        # What always saying the commonest of these tokens gives.
        "most_frequent_token": float(np.bincount(tokens).max() / len(tokens)),
    }
    if next_sentence:
        scores["next_sentence_accuracy"] = float(accuracy_score(is_random[0], next_sentence[0]))
    return scores
