"""The inner names of transformers that fastbert relies on, and what it does where one of them is gone.

transformers renames its internals from one release to the next. What is read of them stands here and nowhere else. A
class that is missing is replaced by one that nothing is an instance of, and any other name by None. A part that isn't
what it was (``unknown``) is left to Hugging Face: a rename costs speed then, and raises nothing. Only what can't do
without a name refuses, with a reason: the masked autoencoder.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers.models.bert import modeling_bert

# For each part that is fused: the attributes of its parent that are read, and how the arguments of its parent's
# forward begin.
_READ: dict[str, tuple[str, str]] = {
    "BertEmbeddings": (
        "word_embeddings position_embeddings token_type_embeddings LayerNorm dropout",
        "input_ids token_type_ids position_ids inputs_embeds",
    ),
    "BertSelfAttention": (
        "query key value dropout num_attention_heads attention_head_size scaling layer_idx",
        "hidden_states attention_mask",
    ),
    "BertSelfOutput": ("dense LayerNorm dropout", "hidden_states input_tensor"),
    "BertAttention": ("self output", "hidden_states attention_mask"),
    "BertIntermediate": ("dense intermediate_act_fn", "hidden_states"),
    "BertOutput": ("dense LayerNorm dropout", "hidden_states input_tensor"),
    "BertLayer": ("attention intermediate output chunk_size_feed_forward", "hidden_states attention_mask"),
    "BertEncoder": ("layer", "hidden_states attention_mask"),
    "BertPredictionHeadTransform": ("dense transform_act_fn LayerNorm", "hidden_states"),
    "BertModel": (
        "config embeddings encoder pooler",
        "input_ids attention_mask token_type_ids position_ids inputs_embeds",
    ),
}

if TYPE_CHECKING:
    from transformers.models.bert.modeling_bert import BertAttention as BertAttention
    from transformers.models.bert.modeling_bert import BertEmbeddings as BertEmbeddings
    from transformers.models.bert.modeling_bert import BertEncoder as BertEncoder
    from transformers.models.bert.modeling_bert import BertIntermediate as BertIntermediate
    from transformers.models.bert.modeling_bert import BertLayer as BertLayer
    from transformers.models.bert.modeling_bert import BertOutput as BertOutput
    from transformers.models.bert.modeling_bert import BertPredictionHeadTransform as BertPredictionHeadTransform
    from transformers.models.bert.modeling_bert import BertSelfAttention as BertSelfAttention
    from transformers.models.bert.modeling_bert import BertSelfOutput as BertSelfOutput
else:
    for _name in _READ:
        globals()[_name] = getattr(modeling_bert, _name, None) or type(_name, (nn.Module,), {})


def _find(module: str, name: str) -> Any:
    """What ``name`` is in a module of transformers; None where either is gone."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _arguments(function: Any) -> list[str]:
    """The names of the arguments of ``function``, without ``*args`` and ``**kwargs``."""
    if function is None:
        return []
    found = inspect.signature(function).parameters.values()
    return [one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


def _changed(name: str) -> bool:
    expected = _READ[name][1].split()
    return _arguments(getattr(globals()[name], "forward", None))[1 : len(expected) + 1] != expected


_CHANGED = frozenset(filter(_changed, _READ))
# Every forward looks at those of the model.
_ATTRIBUTES = {name: attributes.split() for name, (attributes, _) in _READ.items()}

# The arguments of stock's ``BertModel.forward``, in order.
FORWARD_ARGUMENTS = tuple(_arguments(modeling_bert.BertModel.forward))[1:]
# The names of the cache in transformers from 5.24 on and before; stock's forward knows the first, or only the second.
CACHE, OLD_CACHE = "cache", "past_key_values"

# What ``attn_implementation`` is looked up in, what stock's "sdpa" is there, and the mask function of an encoder.
AttentionInterface: Any = _find("transformers", "AttentionInterface")
AttentionMaskInterface: Any = _find("transformers", "AttentionMaskInterface")
sdpa_attention_forward: Any = _find("transformers.integrations.sdpa_attention", "sdpa_attention_forward")
sdpa_mask: Any = _find("transformers.masking_utils", "sdpa_mask")
bidirectional_mask_function: Any = _find("transformers.masking_utils", "bidirectional_mask_function")
HAS_INTERFACE = None not in (
    *(AttentionInterface, AttentionMaskInterface, sdpa_attention_forward, sdpa_mask, bidirectional_mask_function),
)

# Keywords that change nothing of an encoder's states, or that the packed way serves itself.
_NEUTRAL = frozenset(
    (
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "seq_idx",
        "use_cache",
    )
)
# Keywords that stock's forward or its attention reads; any other it ignores. Those that change what a forward gives
# are named as well: where stock's lists are gone, they would be ignored without a word.
CONSEQUENTIAL = (
    frozenset(FORWARD_ARGUMENTS)
    | frozenset(_arguments(sdpa_attention_forward))
    | frozenset(getattr(_find("transformers.utils", "TransformersKwargs"), "__annotations__", ()))
    | frozenset({"debug_io", "is_causal", "output_attentions", "position_bias", "softcap", CACHE, OLD_CACHE})
) - _NEUTRAL


def _no_capture(forward: Any) -> Any:
    return forward


# The module of the hooks that collect hidden states, its decorator, and where that looks up what a class can give.
CAPTURING = "transformers.utils.output_capturing"
capture_outputs: Any = _find(CAPTURING, "capture_outputs") or _no_capture
_registry: Any = _find(CAPTURING, "_CAN_RECORD_REGISTRY")

# The activations of the GELU family, with the ``approximate`` of each.
GELU: dict[type, str] = {
    activation: approximate
    for name, approximate in (
        ("GELUActivation", "none"),
        ("GELUTanh", "tanh"),
        ("NewGELUActivation", "tanh"),
        ("FastGELUActivation", "tanh"),
    )
    if (activation := _find("transformers.activations", name))
}

# The names that ``hidden_act`` may have; None where transformers doesn't tell.
ACT2FN: Any = _find("transformers.activations", "ACT2FN")

# The class of transformers' own top module.
LazyModule: Any = type(transformers)

# What the masked autoencoder needs: a head over the vocabulary, and what fills a weight that no checkpoint has filled.
BertLMPredictionHead: Any = _find("transformers.models.bert.modeling_bert", "BertLMPredictionHead")
fill: Any = _find("transformers.initialization", "copy_")


def register_outputs(model: nn.Module) -> None:
    """Tell transformers what a model can capture whose class has been changed: it looks when a class is first made."""
    if _registry is not None:
        dict.__setitem__(_registry, str(type(model)), getattr(model, "_can_record_outputs", None))


def uncapturable() -> str | None:
    """Why hidden states of packed layers can't be collected, in one sentence; None when they can."""
    if capture_outputs is _no_capture or _registry is None:
        return f"transformers {transformers.__version__} collects hidden states in a way that fastbert doesn't know"
    return None


def no_autoencoder() -> str | None:
    """Why no masked autoencoder can be made, in one sentence; None when one can."""
    for name, found in (("BertLMPredictionHead", BertLMPredictionHead), ("initialization.copy_", fill)):
        if found is None:
            return f"transformers {transformers.__version__} has no {name}, which BertForMaskedAutoencoding needs"
    return None


def safe_globals() -> Any:
    """The context in which Trainer reads its own files with ``torch.load``; None where that is gone."""
    # Looked up when it is needed: its module takes long to import.
    made = _find("transformers.trainer_pt_utils", "safe_globals")
    return None if made is None else made()


def unknown(module: nn.Module, name: str) -> str | None:
    """Why ``module`` isn't stock's class ``name`` as fastbert knows it, in one sentence; None when it is."""
    for attribute in _ATTRIBUTES[name]:
        if not hasattr(module, attribute):
            return f"the {name} of transformers {transformers.__version__} has no {attribute}, which fastbert reads"
    if name in _CHANGED:
        return (
            f"the forward of {name} in transformers {transformers.__version__} doesn't begin with "
            f"{', '.join(_READ[name][1].split())}, as fastbert knows it"
        )
    return None
