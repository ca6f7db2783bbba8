"""``BertModel`` and every head: Hugging Face's classes, with their names, parameters, arguments and outputs.

The architecture is that of Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv:1810.04805, section 3. ``BertModel.forward`` goes one of two ways:

* packed: padding is removed once at the embeddings and put back (as zeros) once at the end;
* padded: Hugging Face's own forward, for what packing can't serve; ``BertModel.route`` holds the reason. The parts in
  ``layers.py`` fuse what they can there too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertPreTrainedModel, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput
from transformers.models.bert import modeling_bert as hf

from fastbert.backends import philox
from fastbert.models import (
    encoder_inference,
    encoder_plan,
    host_inference,
    inputs,
    joined,
    layers,
    model_inference,
    packing,
    upstream,
)
from fastbert.models.snapshot import Snapshot

PACKED = "packed"

_SEQUENCE_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
IGNORED_LABEL = -100


class _FromSafetensors:
    """Loading that refuses a pickle unless it is asked for one."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, use_safetensors: bool | None = None, **kwargs: Any
    ) -> Any:
        """As Hugging Face's, but for ``use_safetensors=None``: weights are then read from safetensors only.

        Raises:
            OSError: there are no safetensors. Where there is a pickle (``pytorch_model.bin``),
                ``use_safetensors=False`` asks for it.
        """
        from_file = super().from_pretrained  # type: ignore[misc]

        def load(*args: Any, **kwargs: Any) -> Any:
            loaded = from_file(*args, **kwargs)
            _align(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        if use_safetensors is not None or pretrained_model_name_or_path is None:
            return load(pretrained_model_name_or_path, *args, use_safetensors=use_safetensors, **kwargs)
        try:
            return load(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise OSError(
                f"{error} A pickle (pytorch_model.bin) is read only if asked for, with use_safetensors=False."
            ) from error


def _align(root: nn.Module) -> None:
    """Copy the parameters whose elements don't lie at multiples of their size.

    A file of safetensors is mapped into memory, and some have a header of any length in front of the weights.
    """
    for parameter in root.parameters():
        plain = type(parameter) is nn.Parameter and parameter.device.type == "cpu"
        if plain and parameter.data_ptr() % parameter.itemsize:
            parameter.data = parameter.data.clone()


class BertModel(_FromSafetensors, hf.BertModel):
    """Hugging Face's ``BertModel`` that computes nothing for padding.

    Attributes:
        route: how the last eager forward went: "packed", or the reason why it was padded.
    """

    route: str | None = None

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        fuse(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As Hugging Face's, except that positions which ``attention_mask`` excludes come out as zeros.

        Args:
            input_ids: int32 or int64 ``[B, S]``; or ``inputs_embeds`` ``[B, S, H]``.
            attention_mask: ``[B, S]``, ``[1, S]`` or ``[S]`` of any dtype, nonzero where a token is; boolean, 0/1 or
                additive ``[B, 1, S, S]``; or None.
            token_type_ids, position_ids: int32 or int64 ``[B, S]`` or ``[1, S]``.
            *args: the arguments of Hugging Face's ``forward`` after these, in its order: those for decoders.
            **kwargs: those of Hugging Face; and ``cu_seq_lens_q`` (int32 ``[N + 1]``) and ``max_length_q`` with a batch
                of one row that holds N sequences one after the other, which then attend within themselves and count
                their positions from zero. ``read_positions`` (bool ``[B, S]``, or "all") marks positions whose state
                the caller will use even where they are padding. ``packed_tokens``: compute so many tokens without a
                look at the mask, which may hold fewer but not more; as ``cuda_graphs`` does.

        Returns:
            ``BaseModelOutputWithPoolingAndCrossAttentions``, or a tuple with ``return_dict=False``.

        Raises:
            TypeError, ValueError, IndexError: inputs that can't be served; see ``inputs.check``.
        """
        read, tokens = kwargs.pop("read_positions", None), kwargs.pop("packed_tokens", None)
        sequences = {name: kwargs.pop(name) for name in _SEQUENCE_ARGUMENTS if kwargs.get(name) is not None}
        if args:
            # Those after the five above.
            names = upstream.FORWARD_ARGUMENTS[5 : 5 + len(args)]
            if len(names) < len(args) or any(name in kwargs for name in names):
                raise TypeError(f"forward takes {', '.join(upstream.FORWARD_ARGUMENTS)}, each of them once")
            kwargs.update(zip(names, args, strict=True))
        if upstream.CACHE not in upstream.FORWARD_ARGUMENTS and kwargs.get(upstream.CACHE) is not None:
            kwargs[upstream.OLD_CACHE] = kwargs.pop(upstream.CACHE)
        embedded = inputs_embeds if input_ids is None else input_ids
        attention_mask = inputs.boolean_4d(attention_mask, self.config._attn_implementation, self.dtype)
        attention_mask = inputs.broadcast_2d(attention_mask, embedded)
        if all(kwargs.get(name) is None for name in (upstream.CACHE, upstream.OLD_CACHE)):
            inputs.check(self.config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        others = (sequences or None, read, tokens, position_ids, inputs_embeds)
        known = self._known(input_ids, attention_mask, token_type_ids, others, kwargs)
        if known is not None:
            self.route = PACKED
            return self._in_form(self._outputs(*known), kwargs.get("return_dict"))
        packed, reason = None, self._padded_reason(attention_mask, kwargs)
        if reason is None:
            assert embedded is not None
            packed, reason = self._pack(embedded, attention_mask, read, sequences, tokens)
        if not torch.compiler.is_compiling():
            self.route = reason or PACKED
        if packed is not None:
            captured = {name: kwargs[name] for name in ("output_hidden_states", "return_dict") if name in kwargs}
            return self._forward_packed(packed, input_ids, token_type_ids, position_ids, inputs_embeds, **captured)
        if sequences and not self.config._attn_implementation.startswith("flash"):
            raise ValueError(f"{', '.join(sequences)} can't be honoured here, since {reason}")
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **sequences,
            **kwargs,
        )

    def _forward_packed(
        self,
        packed: packing.Packing,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = self._encode(
            packed, input_ids, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        if outputs.hidden_states is not None:
            # Those that Hugging Face ties to the last state, or that weren't asked for, are as they must be.
            outputs["hidden_states"] = tuple(
                packed.unpack(state) if state is not None and state.dim() == 2 else state
                for state in outputs.hidden_states
            )
        if not torch.compiler.is_compiling():
            model_inference.remember(self, outputs.last_hidden_state)
        return self._in_form(outputs, return_dict)

    def _in_form(self, outputs: Any, return_dict: bool | None) -> Any:
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    @upstream.capture_outputs  # type: ignore[untyped-decorator]
    def _encode(
        self,
        packed: packing.Packing,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        seeds = None
        encoder_layers: Any = self.encoder.layer
        # By the modules, not by the configuration: where nothing is dropped, torch's generator must stay where it is.
        if self.training and (
            layers.dropout_p(self.embeddings.dropout) > 0.0 or any(layer.drops() for layer in encoder_layers)
        ):
            count = 1 + layers.SEEDS_PER_LAYER * len(self.encoder.layer)
            seeds = philox.new_seeds(count, packed.cu_seqlens.device)
        hidden_states = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            packing=packed,
            seed=None if seeds is None else seeds[0],
        )
        known = None if torch.compiler.is_compiling() else encoder_plan.lookup(self.encoder)
        projections = joined.join(self.encoder, hidden_states, known)
        encoded = encoder_inference.forward(self.encoder, hidden_states, packed, projections, known)
        if encoded is None:
            encoded = host_inference.forward(self.encoder, hidden_states, packed, known)
        if encoded is None:
            encoder: Any = self.encoder
            encoded = encoder(
                hidden_states, packing=packed, seeds=seeds, projections=projections, known=known
            ).last_hidden_state
        return self._outputs(encoded, packed)

    def _outputs(self, encoded: Tensor, packed: packing.Packing) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Of the last states ``[T, H]``."""
        sequence_output = packed.unpack(encoded)
        pooled_output = None
        if self.pooler is not None:
            pooled_output = self.pooler(sequence_output)
            if packed.valid is not None:
                # A graph can't choose the padded way by what is in the mask, so say loudly what it can't compute.
                lost = ~packed.valid[:, 0] & packed.valid.any(1)
                pooled_output = pooled_output.masked_fill(lost.unsqueeze(1), float("nan"))
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output, pooler_output=pooled_output
        )

    def _pack(
        self,
        embedded: Tensor,
        mask: Tensor | None,
        read: Tensor | str | None,
        sequences: dict[str, Any],
        tokens: int | None = None,
    ) -> tuple[packing.Packing | None, str | None]:
        """The packing of a batch, or the reason why it stays padded."""
        batch, seqlen = embedded.shape[:2]
        if sequences:
            if batch != 1 or mask is not None or "cu_seq_lens_q" not in sequences:
                raise ValueError(
                    f"{', '.join(sequences)} come with a batch of {batch} rows; cu_seq_lens_q is needed, with one row "
                    "that holds all sequences and no attention_mask"
                )
            return packing.from_sequences(sequences["cu_seq_lens_q"], sequences.get("max_length_q"), seqlen), None
        if mask is None:
            return packing.full(batch, seqlen, embedded.device), None
        mask = mask.to(embedded.device)
        capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
        if tokens is not None or torch.compiler.is_compiling() or capturing:
            if read is not None:
                return None, "a traced head uses the states of padded positions, as its labels may be there"
            return packing.from_mask_static(mask, tokens), None
        if isinstance(read, str):
            read = torch.ones_like(mask, dtype=torch.bool)
        elif read is not None:
            read = read.reshape(mask.shape).to(mask.device)
        packed = packing.from_mask(mask, read, read_first=self.pooler is not None)
        if packed is None:
            return None, "the head or the pooler uses the states of padded positions"
        return packed, None

    def _known(
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        token_type_ids: Tensor | None,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, packing.Packing] | None:
        """The last states ``[T, H]`` by ``model_inference``; None where it can't, or more than these is asked for."""
        if torch.compiler.is_compiling() or not model_inference.has_plan(self):
            return None
        if any(one is not None for one in others) or self._given_padded_reason(mask, kwargs):
            return None
        asked_for_all = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        if asked_for_all or _configured_padded_reason(self):
            return None
        return model_inference.forward(self, input_ids, mask, token_type_ids)

    def _padded_reason(self, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """Why a batch must stay padded whatever its padding is, in one sentence; None when it can be packed."""
        return static_padded_reason(self) or self._given_padded_reason(mask, kwargs)

    def _given_padded_reason(self, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """The part of ``_padded_reason`` that is about the arguments."""
        if mask is not None and mask.dim() == 4:
            return "a 4-D attention_mask is given, and packed attention knows sequences only"
        for name, value in kwargs.items():
            if name in upstream.CONSEQUENTIAL and value is not None and value is not False:
                return f"{name} is given, which only the padded way serves"
        if kwargs.get("output_hidden_states") or self.config.output_hidden_states:
            return upstream.uncapturable()
        return None


# Stock's own: callers read in them which arguments a forward takes, and what it gives.
BertModel.forward.__signature__ = inspect.signature(hf.BertModel.forward)  # type: ignore[attr-defined]
BertModel.forward.__annotations__ = dict(hf.BertModel.forward.__annotations__)


def static_padded_reason(model: hf.BertModel) -> str | None:
    """Why no batch of ``model`` can be packed, in one sentence; None when one can.

    It looks at the configuration and at the modules, not at inputs.
    """
    if reason := _configured_padded_reason(model):
        return reason
    replaced, hooked = _looked_through(model)
    return replaced or layers.unserved(_any_parameter(model)) or hooked


def _configured_padded_reason(model: hf.BertModel) -> str | None:
    config = model.config
    if config.is_decoder or config.add_cross_attention:
        return "the model is a decoder, which attends to the past only"
    if getattr(config, "is_causal", False):
        return "the configuration has is_causal=True"
    if config.output_attentions:
        return "the configuration has output_attentions=True, and packed attention never forms the probabilities"
    if reason := layers.stock_asked_for(config):
        return reason
    if config._attn_implementation not in ("sdpa", "fastbert"):
        return f"attn_implementation={config._attn_implementation!r} was asked for"
    if config.layer_norm_eps == 0:
        return "layer_norm_eps is 0, and a head's LayerNorm would divide by zero where padding has become zeros"
    return None


def _any_parameter(model: hf.BertModel) -> Tensor:
    """One that is found at once: that of the first LayerNorm, or if it has none, the model's first."""
    weight: Tensor | None = getattr(model.embeddings.LayerNorm, "weight", None)
    return next(model.parameters()) if weight is None else weight


def _looked_through(model: hf.BertModel) -> tuple[str | None, str | None]:
    """Why a part of ``model`` knows padded states only and why one of its hooks may, found again after each change."""
    if torch.compiler.is_compiling():
        return _look_through(model)
    kept: Snapshot | None = model.__dict__.get("_looked_through")
    if kept is None or not kept.holds(model):
        # Before the look: what another thread changes meanwhile is then seen next time.
        kept = Snapshot(model, model.modules())
        kept.found = _look_through(model)
        model.__dict__["_looked_through"] = kept
    found: tuple[str | None, str | None] = kept.found
    return found


def _look_through(model: hf.BertModel) -> tuple[str | None, str | None]:
    replaced = _replaced_part(model)
    return replaced, None if replaced else _hooked_part(model)


def _replaced_part(model: hf.BertModel) -> str | None:
    if reason := upstream.unknown(model, "BertModel"):
        return reason
    if not isinstance(model.embeddings, layers.BertEmbeddings):
        return _replaced("embeddings", model.embeddings)
    if not isinstance(model.encoder, layers.BertEncoder):
        return _replaced("encoder", model.encoder)
    for index, layer in enumerate(model.encoder.layer):
        path = f"encoder.layer.{index}"
        if not isinstance(layer, layers.BertLayer):
            return _replaced(path, layer)
        if not isinstance(layer.attention, layers.BertAttention):
            return _replaced(f"{path}.attention", layer.attention)
        parts: tuple[tuple[str, nn.Module, type[nn.Module]], ...] = (
            ("attention.self", layer.attention.self, layers.BertSelfAttention),
            ("attention.output", layer.attention.output, layers.BertSelfOutput),
            ("intermediate", layer.intermediate, layers.BertIntermediate),
            ("output", layer.output, layers.BertOutput),
        )
        for name, part, kind in parts:
            if not isinstance(part, kind):
                return _replaced(f"{path}.{name}", part)
    return None


def _replaced(path: str, part: nn.Module) -> str:
    if type(part) in layers.FUSED and (reason := upstream.unknown(part, type(part).__name__)):
        return f"{path}: {reason}"
    return f"{path} is a {type(part).__module__}.{type(part).__qualname__}, which knows padded states only"


def _hooked_part(model: hf.BertModel) -> str | None:
    # Walked by hand: ``modules()`` guards against cycles, and takes half a millisecond of every forward to do so.
    pending: list[nn.Module | None] = [model.embeddings, model.encoder]
    word_embeddings = model.embeddings.word_embeddings
    while pending:
        part = pending.pop()
        if part is None:
            continue
        # The hooks of the word embeddings always see [B, S, H].
        if part is not word_embeddings and (hook := layers.foreign_hook(part)):
            return f"a {type(part).__name__} has a hook ({hook}), which may expect padded states"
        pending.extend(part._modules.values())
    return None


class Head(_FromSafetensors, BertPreTrainedModel):
    """What every head adds to Hugging Face's: the fused encoder, and a loss that Trainer divides itself."""

    # The losses are means over the batch at hand and take no token count. Said so, Trainer divides them by the number
    # of accumulation steps; otherwise it would make an update that many times too large.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        fuse(self)


def _reading(forward: Callable[..., Any], labels_only: bool = True) -> Callable[..., Any]:
    """``forward`` of a head that uses the states of padded positions: those that have a label, or all."""
    signature = inspect.signature(forward)
    position = list(signature.parameters).index("labels") - 1 if labels_only else 0

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        read: Tensor | str | None = "all"
        if labels_only:
            labels = args[position] if len(args) > position else kwargs.get("labels")
            read = None if labels is None else labels != IGNORED_LABEL
            if labels is not None and getattr(self, "sparse_prediction", False) and not torch.compiler.is_compiling():
                given = signature.bind(self, *args, **kwargs).arguments
                del given["self"]
                return self._predict_sparsely(read_positions=read, **given.pop("kwargs", {}), **given)
        return forward(self, *args, read_positions=read, **kwargs)

    return wrapper


class _SparsePrediction:
    """Vocabulary logits at labelled positions only, for the two heads that are trained to fill masks.

    At 15% of the positions that is a seventh of the product with the vocabulary, BERT-base's largest, and of its
    logits' memory. The loss and its gradients are those of all positions, as a mean over the labelled ones.
    """

    sparse_prediction: bool = False

    def _predict_sparsely(
        self: Any,
        labels: Tensor,
        next_sentence_label: Tensor | None = None,
        return_dict: bool | None = None,
        **given: Any,
    ) -> Any:
        outputs = self.bert(return_dict=True, **given)
        where = (labels != IGNORED_LABEL).flatten().nonzero().squeeze(1)
        logits = self.cls.predictions(outputs.last_hidden_state.flatten(0, 1)[where])
        loss = F.cross_entropy(logits, labels.flatten()[where])
        captured = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        found: Any
        if isinstance(self, hf.BertForPreTraining):
            relationship = self.cls.seq_relationship(outputs.pooler_output)
            # As Hugging Face's: there is a loss with both labels only.
            both = None
            if next_sentence_label is not None:
                both = loss + F.cross_entropy(relationship.view(-1, 2), next_sentence_label.view(-1))
            found = hf.BertForPreTrainingOutput(
                loss=both, prediction_logits=logits, seq_relationship_logits=relationship, **captured
            )
        else:
            found = MaskedLMOutput(loss=loss, logits=logits, **captured)
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


class BertForPreTraining(_SparsePrediction, Head, hf.BertForPreTraining):
    """Masked language modelling and next sentence prediction; arguments and outputs of Hugging Face's class.

    Attributes:
        sparse_prediction: given labels, compute vocabulary logits for labelled positions only: ``prediction_logits`` is
            then ``[N, V]``, row by row of the batch. False unless set; a traced model computes all.
    """

    forward = _reading(hf.BertForPreTraining.forward)


class BertLMHeadModel(Head, hf.BertLMHeadModel, GenerationMixin):
    """Left-to-right language modelling; arguments and outputs of Hugging Face's class."""

    # Its loss honours Trainer's token count.
    accepts_loss_kwargs = True


class BertForMaskedLM(_SparsePrediction, Head, hf.BertForMaskedLM):
    """Masked language modelling; arguments and outputs of Hugging Face's class.

    Attributes:
        sparse_prediction: given labels, compute vocabulary logits for labelled positions only: ``logits`` is then
            ``[N, V]``, row by row of the batch. False unless set; a traced model computes all.
    """

    forward = _reading(hf.BertForMaskedLM.forward)


class BertForNextSentencePrediction(Head, hf.BertForNextSentencePrediction):
    """Next sentence prediction; arguments and outputs of Hugging Face's class."""


class BertForSequenceClassification(Head, hf.BertForSequenceClassification):
    """Classification or regression of whole sequences; arguments and outputs of Hugging Face's class."""


class BertForMultipleChoice(Head, hf.BertForMultipleChoice):
    """Choice between several continuations; arguments and outputs of Hugging Face's class."""


class BertForTokenClassification(Head, hf.BertForTokenClassification):
    """Classification of each token; arguments and outputs of Hugging Face's class."""

    forward = _reading(hf.BertForTokenClassification.forward)


class BertForQuestionAnswering(Head, hf.BertForQuestionAnswering):
    """Extraction of an answer's span; arguments and outputs of Hugging Face's class.

    A softmax over all positions, padded ones included, gives the span, so a batch with padding stays padded.
    """

    forward = _reading(hf.BertForQuestionAnswering.forward, labels_only=False)


HEADS: tuple[type[nn.Module], ...] = (
    BertForPreTraining,
    BertLMHeadModel,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForMultipleChoice,
    BertForTokenClassification,
    BertForQuestionAnswering,
)
# The fused class of each of Hugging Face's models.
MODELS: dict[type[nn.Module], type[nn.Module]] = {getattr(hf, fused.__name__): fused for fused in (*HEADS, BertModel)}


def fuse(root: nn.Module) -> list[str]:
    """Change each of Hugging Face's BERT modules below ``root`` into the fused class of the same name, in place.

    Parameters, buffers, hooks and tree stay as they are, but for memory: see ``_align``. Returns the paths of the
    modules that were changed.
    """
    _align(root)
    changed = []
    for path, module in root.named_modules():
        fused = MODELS.get(type(module)) or layers.FUSED.get(type(module))
        if fused is None or (fused in layers.FUSED.values() and upstream.unknown(module, fused.__name__)):
            continue
        module.__class__ = fused
        changed.append(path)
        if isinstance(module, BertPreTrainedModel):
            upstream.register_outputs(module)
    for model in root.modules():
        if isinstance(model, BertPreTrainedModel):
            for part in model.modules():
                if isinstance(part, layers.CONFIGURED):
                    part.config = model.config
    return changed
