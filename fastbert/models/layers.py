"""The parts of a BERT layer with their computations fused: subclasses of Hugging Face's, with the same tree.

Each of them keeps its parent's modules, parameters and name. A loaded model is converted by changing the classes of its
modules; those of ``CONFIGURED`` are told the model's configuration. Called as Hugging Face calls it, on padded
``[B, S, H]`` states, a part fuses what it can and gives its parent's result. Called with a ``Packing`` it works on
packed ``[T, H]`` states.

A module is bypassed, its weight used directly, only when it is exactly what it looks like: no subclass, no hook, no
replaced ``forward``, no quantised or sharded weight. Otherwise it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fastbert import ops
from fastbert.backends import prepacked, transforms
from fastbert.models import encoder_plan, layer_training, upstream, whole_layer
from fastbert.models.joined import Projection
from fastbert.models.packing import Packing

Projections = dict[nn.Module, Projection]

# The seeds that one layer takes: attention probabilities, attention output, layer output.
SEEDS_PER_LAYER = 3


def foreign_hook(module: nn.Module) -> str | None:
    """The name of a hook on ``module`` that torch or Hugging Face didn't set for purposes of their own, or None.

    Theirs gather and free sharded weights, mask pruned ones, or capture hidden states: no shape matters to them.
    """
    if not (module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks):
        return None
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for hook in hooks.values():
            while isinstance(hook, functools.partial):
                hook = hook.func
            origin = getattr(hook, "__module__", None) or type(hook).__module__
            if not origin.startswith(("torch.", upstream.CAPTURING)):
                return getattr(hook, "__qualname__", type(hook).__qualname__)
    return None


def unusual(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``module`` must be called and can't be bypassed, in one sentence; None when it is a plain ``kind``."""
    if type(module) is not kind:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}, not a plain {kind.__name__}"
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has a hook"
    for hook in module._forward_hooks.values():
        if not _changes_nothing(hook, module):
            return "it has a hook"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    if not torch.compiler.is_compiling():
        for name, parameter in module._parameters.items():
            if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
                return f"its {name} is a {type(parameter).__name__}"
    if kind is nn.Linear:
        return _irregular_linear(module)
    if kind is nn.LayerNorm:
        return _irregular_norm(module)
    return None


def without_adapter(module: Any) -> Any:
    """The layer inside a LoRA layer of PEFT that is switched off or merged, and only calls it; otherwise ``module``."""
    kind = type(module)
    if kind is nn.Linear or torch.compiler.is_compiling():
        return module
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear") or unusual(module, kind):
        return module
    # One that is switched off while it is merged first takes itself out of the weight.
    return module.base_layer if module.disable_adapters != module.merged else module


def _irregular_linear(linear: Any) -> str | None:
    """Why the tensors of a Linear aren't those of a product and a bias for each of its columns, in one sentence."""
    weight, bias = linear.weight.shape, linear.bias
    if len(weight) != 2:
        return f"its weight has shape {tuple(weight)}"
    if bias is not None and bias.shape != weight[:1]:
        return f"its bias has shape {tuple(bias.shape)}, and its weight {tuple(weight)}"
    return None


def _irregular_norm(norm: Any) -> str | None:
    """Why the tensors of a LayerNorm aren't a weight and a bias for each feature of a row, in one sentence."""
    weight, bias = norm.weight, norm.bias
    if weight is None or bias is None:
        return "it has no weight or no bias"
    if len(norm.normalized_shape) != 1 or not weight.shape == bias.shape == norm.normalized_shape:
        return (
            f"its weight has shape {tuple(weight.shape)}, its bias {tuple(bias.shape)}, and its normalized_shape is "
            f"{tuple(norm.normalized_shape)}"
        )
    return None


def _changes_nothing(forward_hook: object, module: nn.Module) -> bool:
    """Whether a hook makes the output need a gradient, as Hugging Face's checkpointing does, where it does anyway."""
    name: str = getattr(forward_hook, "__qualname__", "")
    weight = getattr(module, "weight", None)
    return name.endswith(".make_inputs_require_grads") and weight is not None and bool(weight.requires_grad)


def unusual_embedding(module: nn.Module) -> str | None:
    """Why an embedding must be called and can't be bypassed, in one sentence; None when it is a plain lookup."""
    if reason := unusual(module, nn.Embedding):
        return reason
    assert isinstance(module, nn.Embedding)
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"it has {option}={getattr(module, option)}"
    return None


def unserved(x: Tensor) -> str | None:
    """Why the ops can't work on ``x``, in one sentence; None when they can."""
    if x.device.type not in ("cpu", "cuda"):
        return f"the ops run on cpu and cuda, and the tensors are on {x.device.type}"
    if not x.is_floating_point():
        return f"the ops compute in floating point, and the dtype is {x.dtype}"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace can't record the ops"
    if transforms.active():
        return "torch.func or forward-mode differentiation is at work, and the ops have reverse mode only"
    return None


def stock_asked_for(config: Any) -> str | None:
    """Why all of a model must be Hugging Face's own code, in one sentence; None when it needn't.

    Eager attention serves second derivatives and forward mode there. A program that ``torch.export`` makes goes to
    runtimes that know torch's own operators only, unless fastbert's are asked for by name.
    """
    if config is None:
        return None
    if config._attn_implementation == "eager":
        return "attn_implementation='eager' was asked for"
    if transforms.exporting() and config._attn_implementation != "fastbert":
        return "torch.export gets torch's own operators (attn_implementation='fastbert' gives it the fused ones)"
    return None


def gelu_approximation(activation: object) -> str | None:
    """The ``approximate`` of an activation of the GELU family, "none" or "tanh"; None for any other."""
    return upstream.GELU.get(type(activation))


def dropout_p(dropout: nn.Module) -> float:
    """The probability of dropping an element in the module's present mode; 0 for a module that has none."""
    return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0


def _prepacked(owner: nn.Module, x: Tensor, *linears: nn.Linear) -> prepacked.PackedLinear | None:
    # In training mode a forward without gradients has to equal one with them bit for bit: some embed the batch again.
    if owner.training or prepacked.unsupported(x, linears):
        prepacked.drop(owner)
        return None
    return prepacked.pack(owner, linears)


def _dense_dropout_residual_norm(module: Any, hidden_states: Tensor, residual: Tensor, seed: Tensor | None) -> Tensor:
    """LayerNorm(residual + dropout(dense(hidden_states)))."""
    (dense,), norm, p = module.linears(), module.LayerNorm, dropout_p(module.dropout)
    bias: Tensor | None = None
    if unusual(dense, nn.Linear):
        projected = dense(hidden_states)
    elif p == 0.0 and (packed := _prepacked(module, hidden_states, dense)):
        added = prepacked.linear_add(hidden_states, packed, residual)
        return ops.layer_norm(added, norm.weight, norm.bias, norm.eps)
    else:
        projected, bias = F.linear(hidden_states, dense.weight), dense.bias
    return ops.bias_dropout_residual_layer_norm(
        projected, bias, residual, norm.weight, norm.bias, norm.eps, p=p, seed=seed
    )


def _norm_reason(module: Any, before: nn.Module) -> str | None:
    """Why dropout and LayerNorm can't run as one op after ``before``, in one sentence; None when they can."""
    # A module around the one that was there may have none.
    norm, weight = module.LayerNorm, getattr(before, "weight", None)
    if reason := unusual(norm, nn.LayerNorm) or unusual(module.dropout, nn.Dropout):
        return reason
    if isinstance(weight, Tensor) and weight.is_floating_point():
        # torch takes parameters of the dtype of the states, and with those of 16 bits also of float32.
        dtypes = {weight.dtype, torch.float32} if weight.itemsize <= 2 else {weight.dtype}
        if not {norm.weight.dtype, norm.bias.dtype} <= dtypes:
            return f"LayerNorm has {norm.weight.dtype} and {norm.bias.dtype}, and the weight before it {weight.dtype}"
    return None


def _gelu_reason(dense: nn.Module, activation: Any) -> str | None:
    if not upstream.GELU:
        return "transformers.activations has none of the GELUs that fastbert knows"
    if gelu_approximation(activation) is None:
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"the activation {name} is not of the GELU family"
    return unusual(dense, nn.Linear) or unusual(activation, type(activation))


class BertEmbeddings(upstream.BertEmbeddings):
    """Sum of three lookups, LayerNorm and dropout."""

    def unfused(self) -> str | None:
        """Why the three lookups can't run as one op, in one sentence; None when they can."""
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        return next((r for r in map(unusual_embedding, tables) if r), None) or _norm_reason(self, self.word_embeddings)

    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        packing: Packing | None = None,
        seed: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hugging Face's arguments ``[B, S]``; ``[T, H]`` with a packing, otherwise ``[B, S, H]``."""
        if packing is None:
            padded: Tensor = super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, *args, **kwargs)
            return padded
        shape = packing.shape
        positions = self._positions(packing) if position_ids is None else packing.pack(position_ids.expand(shape))
        if token_type_ids is None:
            types = torch.zeros_like(positions, dtype=torch.int64)
        else:
            types = packing.pack(token_type_ids.expand(shape))
        p = dropout_p(self.dropout)
        if inputs_embeds is None and self.unfused() is None:
            assert input_ids is not None
            return ops.embedding_layer_norm(
                packing.pack(input_ids),
                positions,
                types,
                self.word_embeddings.weight,
                self.position_embeddings.weight,
                self.token_type_embeddings.weight,
                self.LayerNorm.weight,
                self.LayerNorm.bias,
                self.LayerNorm.eps,
                p=p,
                seed=seed,
                padding_idx=self.word_embeddings.padding_idx,
            )
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        embeddings = packing.pack(inputs_embeds) + self.token_type_embeddings(types)
        embeddings = embeddings + self.position_embeddings(positions)
        normalised: Tensor = self.LayerNorm(embeddings)
        if p == 0.0 or unusual(self.dropout, nn.Dropout):
            return self.dropout(normalised)  # type: ignore[no-any-return]
        # With the mask of the fused op: a hook, or embeddings from the caller, must not change it.
        return ops.bias_dropout_residual(normalised, None, torch.zeros_like(normalised), p=p, seed=seed)

    def _positions(self, packing: Packing) -> Tensor:
        """Positions count from the start of each sequence: int64 ``[T]``."""
        place = packing.places()
        if packing.cu_seqlens.shape[0] == packing.shape[0] + 1:
            return place
        # One row of several sequences: subtract the start of the sequence that each token is in.
        sequence = torch.searchsorted(packing.cu_seqlens, place.to(torch.int32), right=True) - 1
        return place - packing.cu_seqlens[sequence]


class BertSelfAttention(upstream.BertSelfAttention):
    """Query, key and value in one product, then attention within each sequence."""

    def linears(self) -> tuple[Any, Any, Any]:
        """The modules that project to queries, keys and values."""
        return without_adapter(self.query), without_adapter(self.key), without_adapter(self.value)

    def unfused(self) -> str | None:
        """Why the three projections can't run as one product, in one sentence; None when they can."""
        linears = self.linears()
        for name, linear in zip(("query", "key", "value"), linears, strict=True):
            if reason := unusual(linear, nn.Linear):
                return f"{name}: {reason}"
        query, key, value = linears
        if not query.weight.shape == key.weight.shape == value.weight.shape:
            return "query, key and value have weights of different shapes"
        biases = [linear.bias for linear in linears]
        if any(b is None for b in biases) and any(b is not None for b in biases):
            return "only some of query, key and value have a bias"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        seed: Tensor | None = None,
        projections: Projections | None = None,
        **kwargs: Any,
    ) -> Any:
        """``[T, H]`` -> ``[T, H]`` with a packing; otherwise as Hugging Face."""
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.attend(self.project(hidden_states, projections), packing, seed), None

    def attend(self, qkv: Tensor, packing: Packing, seed: Tensor | None) -> Tensor:
        """``[T, 3, A, D]`` -> ``[T, A * D]``."""
        context = ops.attention(
            qkv,
            packing.cu_seqlens,
            packing.max_seqlen,
            scale=self.scaling,
            dropout_p=self.dropout_p(),
            seed=seed,
        )
        return context.flatten(1)

    def dropout_p(self) -> float:
        """The probability of dropping an attention probability: by this module's mode, as in Hugging Face's."""
        return self.dropout.p if self.training else 0.0

    def project(self, hidden_states: Tensor, projections: Projections | None) -> Tensor:
        """Query, key and value side by side: ``[T, H]`` -> ``[T, 3, A, D]``.

        As in Hugging Face's, the size of a head gives their number: what the module says of it may be stale.
        """
        qkv = self._project(hidden_states, projections)
        return qkv.view(-1, 3, qkv.shape[1] // (3 * self.attention_head_size), self.attention_head_size)

    def _project(self, hidden_states: Tensor, projections: Projections | None) -> Tensor:
        """``[T, H]`` -> ``[T, 3 * H]``."""
        if projections and (projection := projections.get(self)):
            prepacked.drop(self)
            return F.linear(hidden_states, projection.weight, projection.bias)
        linears = self.linears()
        if self.unfused():
            found = [linear(hidden_states) for linear in linears]
            if not found[0].shape == found[1].shape == found[2].shape:
                shapes = ", ".join(str(tuple(one.shape)) for one in found)
                raise ValueError(f"query, key and value have shapes {shapes}; they must be the same")
            return torch.cat(found, dim=-1)
        if packed := _prepacked(self, hidden_states, *linears):
            return prepacked.linear(hidden_states, packed)
        weight = torch.cat([linear.weight for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        return F.linear(hidden_states, weight, bias)


class _Dense:
    """A part with one product, fused with what follows also for padded states."""

    config: BertConfig | None = None
    dense: nn.Linear

    def linears(self) -> tuple[Any]:
        """The module of the product."""
        return (without_adapter(self.dense),)


class _ResidualOutput(_Dense):
    """What ``BertSelfOutput`` and ``BertOutput`` share: dense, dropout, residual and LayerNorm."""

    LayerNorm: nn.LayerNorm

    def unfused(self) -> str | None:
        """Why what follows the product can't run as one op, in one sentence; None when it can."""
        return stock_asked_for(self.config) or _norm_reason(self, self.dense)

    def forward(self, hidden_states: Tensor, *args: Any, seed: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``[..., H or I]`` and the residual ``[..., H]`` -> ``[..., H]``."""
        if kwargs or len(args) != 1 or self.unfused() or unserved(hidden_states):
            unfused: Tensor = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            return unfused
        (input_tensor,) = args
        if input_tensor.shape != (*hidden_states.shape[:-1], *self.LayerNorm.normalized_shape):
            unfused = super().forward(hidden_states, input_tensor)  # type: ignore[misc]
            return unfused
        return _dense_dropout_residual_norm(self, hidden_states, input_tensor, seed)


class BertSelfOutput(_ResidualOutput, upstream.BertSelfOutput):
    """Dense, dropout, residual and LayerNorm after attention."""


class BertAttention(upstream.BertAttention):
    """Self-attention and its output; cross-attention is Hugging Face's."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        seeds: Tensor | None = None,
        projections: Projections | None = None,
        **kwargs: Any,
    ) -> Any:
        """``[T, H]`` -> ``[T, H]`` with a packing; otherwise as Hugging Face."""
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        context, _ = self.self(hidden_states, packing=packing, seed=_at(seeds, 0), projections=projections)
        return self.output(context, hidden_states, seed=_at(seeds, 1)), None


class BertIntermediate(_Dense, upstream.BertIntermediate):
    """Dense and GELU."""

    def unfused(self) -> str | None:
        """Why product and activation can't run as one op, in one sentence; None when they can."""
        return stock_asked_for(self.config) or _gelu_reason(*self.linears(), self.intermediate_act_fn)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., H]`` -> ``[..., I]``."""
        if args or kwargs or self.unfused() or unserved(hidden_states):
            unfused: Tensor = super().forward(hidden_states, *args, **kwargs)
            return unfused
        return _linear_gelu(self, self.intermediate_act_fn, hidden_states)


class BertOutput(_ResidualOutput, upstream.BertOutput):
    """Dense, dropout, residual and LayerNorm after the activation."""


class BertPredictionHeadTransform(_Dense, upstream.BertPredictionHeadTransform):
    """Dense, GELU and LayerNorm in front of the vocabulary."""

    def unfused(self) -> str | None:
        """Why product and activation can't run as one op, in one sentence; None when they can."""
        return stock_asked_for(self.config) or _gelu_reason(*self.linears(), self.transform_act_fn)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        if args or kwargs or self.unfused() or unserved(hidden_states):
            unfused: Tensor = super().forward(hidden_states, *args, **kwargs)
            return unfused
        normalised: Tensor = self.LayerNorm(_linear_gelu(self, self.transform_act_fn, hidden_states))
        return normalised


class BertLayer(upstream.BertLayer):
    """One layer: attention, then the feed-forward product pair."""

    def unfused(self) -> str | None:
        """Why a training step runs the parts after attention one by one, and keeps more; None when it needn't."""
        if self.chunk_size_feed_forward:
            return f"chunk_size_feed_forward is {self.chunk_size_feed_forward}"
        if reason := unusual(self.attention, BertAttention):
            return f"attention: {reason}"
        parts: tuple[tuple[str, Any, type[nn.Module]], ...] = (
            ("attention.output", self.attention.output, BertSelfOutput),
            ("intermediate", self.intermediate, BertIntermediate),
            ("output", self.output, BertOutput),
        )
        for name, part, kind in parts:
            if reason := unusual(part, kind) or part.unfused() or unusual(part.linears()[0], nn.Linear):
                return f"{name}: {reason}"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        seeds: Tensor | None = None,
        projections: Projections | None = None,
        workspace: whole_layer.Workspace | None = None,
        plain: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """``[T, H]`` -> ``[T, H]`` with a packing; otherwise as Hugging Face.

        ``seeds`` (int64 ``[1 + 3 * layers]``) are those of the whole model: one for the embeddings, then three for each
        layer. They are arguments and not drawn here, so that a recomputed layer draws the same masks. ``projections``
        are what ``joined.join`` made; ``workspace`` is a dict of this forward's, for the memory that its layers share.
        ``plain`` says that a layer with its attention is known to be one function in training.
        """
        if packing is None:
            padded: Tensor = super().forward(hidden_states, *args, **kwargs)
            return padded
        if workspace is not None and self.divided(hidden_states) is None:
            call = whole_layer.prepare(self, hidden_states.shape[1])
            whole = whole_layer.forward([call], hidden_states, packing, workspace)
            if whole is not None:
                return whole
        if seeds is not None:
            first = 1 + SEEDS_PER_LAYER * self.attention.self.layer_idx
            seeds = seeds[first : first + SEEDS_PER_LAYER]
        differentiable = torch.is_grad_enabled() or self.training
        traced = torch.compiler.is_compiling() or unserved(hidden_states) is not None
        if differentiable and not traced and (plain or self.unfused() is None):
            parameters = self._parameters_after_attention()
            attention: Any
            if plain or _is_plain_attention(self.attention.self):
                attention = self._plain_attention(packing, seeds, projections)
                before = (*attention.weights, *attention.biases)
            else:
                attention, _ = self.attention.self(
                    hidden_states, packing=packing, seed=_at(seeds, 0), projections=projections
                )
                before = (attention,)
            tensors = (hidden_states, *before, *parameters)
            # In training mode always, so that a forward without gradients equals one with them bit for bit.
            if self.training or any(x is not None and x.requires_grad for x in tensors):
                return self._one_function(hidden_states, attention, parameters, seeds)
            if isinstance(attention, Tensor):
                attention_output = self.attention.output(attention, hidden_states)
                return self._feed_forward(attention_output, packing.shape[0], None)
        attention_output, _ = self.attention(hidden_states, packing=packing, seeds=seeds, projections=projections)
        return self._feed_forward(attention_output, packing.shape[0], _at(seeds, 2))

    def _plain_attention(
        self, packing: Packing, seeds: Tensor | None, projections: Projections | None
    ) -> layer_training.Attention:
        attend: Any = self.attention.self
        prepacked.drop(attend)
        weights: tuple[Tensor, ...]
        biases: tuple[Tensor | None, ...]
        if projections and (projection := projections.get(attend)):
            weights, biases = (projection.weight,), (projection.bias,)
        else:
            linears = attend.linears()
            weights = tuple(linear.weight for linear in linears)
            biases = tuple(linear.bias for linear in linears)
        return layer_training.Attention(
            weights,
            tuple(bias for bias in biases if bias is not None),
            attend.attention_head_size,
            packing.cu_seqlens,
            packing.max_seqlen,
            attend.scaling,
            attend.dropout_p(),
            _at(seeds, 0),
        )

    def _one_function(
        self,
        x: Tensor,
        attention: layer_training.Attention | Tensor,
        parameters: layer_training.Parameters,
        seeds: Tensor | None,
    ) -> Tensor:
        approximate = gelu_approximation(self.intermediate.intermediate_act_fn)
        assert approximate is not None
        first, second = self.attention.output, self.output
        for owner in (first, self.intermediate, second):
            prepacked.drop(owner)
        settings = layer_training.Settings(
            first.LayerNorm.eps, dropout_p(first.dropout), second.LayerNorm.eps, dropout_p(second.dropout), approximate
        )
        return layer_training.layer(x, attention, parameters, settings, _at(seeds, 1), _at(seeds, 2))

    def drops(self) -> bool:
        """Whether any of its dropouts drops anything in the present mode."""
        attend: Any = self.attention.self
        after = (self.attention.output.dropout, self.output.dropout)
        return attend.dropout_p() > 0.0 or any(dropout_p(dropout) > 0.0 for dropout in after)

    def divided(self, x: Tensor) -> str | None:
        """Why the parts run one by one on states like ``x``, in one sentence; None when they are one call."""
        if self.training:
            return "in training mode a layer runs its parts, as it does where gradients are needed"
        if reason := whole_layer.unserved(x) or self.unfused():
            return reason
        attend: Any = self.attention.self
        # Hugging Face's hook for probabilities stays on it once outputs have been captured; packed, there are none.
        if type(attend) is not BertSelfAttention or "forward" in attend.__dict__ or foreign_hook(attend):
            return "attention.self has been replaced or has a hook"
        if reason := attend.unfused():
            return f"attention.self: {reason}"
        return whole_layer.reason(self, x)

    def _parameters_after_attention(self) -> layer_training.Parameters:
        parts: tuple[Any, ...] = (self.attention.output, self.intermediate, self.output)
        (out,), (up,), (down,) = (part.linears() for part in parts)
        norm1, norm2 = parts[0].LayerNorm, parts[2].LayerNorm
        return layer_training.Parameters(
            *(out.weight, out.bias, norm1.weight, norm1.bias),
            *(up.weight, up.bias),
            *(down.weight, down.bias, norm2.weight, norm2.bias),
        )

    def _feed_forward(self, x: Tensor, batch: int, seed: Tensor | None) -> Tensor:
        if not self.chunk_size_feed_forward:
            output: Tensor = self.output(self.intermediate(x), x, seed=seed)
            return output
        # A chunk is that many positions of every sequence; each draws dropout masks of its own.
        chunks = x.split(self.chunk_size_feed_forward * batch)
        seeds = [None if seed is None else seed + index for index in range(len(chunks))]
        return torch.cat([self.output(self.intermediate(c), c, seed=s) for c, s in zip(chunks, seeds, strict=True)])


class BertEncoder(upstream.BertEncoder):
    """The layers, one after the other."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packing: Packing | None = None,
        seeds: Tensor | None = None,
        projections: Projections | None = None,
        known: Callable[[], encoder_plan.EncoderPlan] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``[T, H]`` -> ``[T, H]`` with a packing; otherwise as Hugging Face.

        ``known`` is the ``encoder_plan.lookup`` of this forward.
        """
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        workspace: whole_layer.Workspace = {}
        plain = self._plain(known)
        for layer in self.layer:
            hidden_states = layer(
                hidden_states,
                packing=packing,
                seeds=seeds,
                projections=projections,
                workspace=workspace,
                plain=layer in plain,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    def _plain(self, known: Callable[[], encoder_plan.EncoderPlan] | None) -> set[nn.Module]:
        """The layers that are known to be one function in training; of others it is not known."""
        if known is None or not (torch.is_grad_enabled() or self.training):
            return set()
        plan = known()
        if "plain" not in plan.found:
            # A tensor that is a plain attribute may be replaced without a trace in the snapshot.
            watched = set(map(id, plan.tensors))
            plan.found["plain"] = {layer for layer in self.layer if _is_plain(layer, watched)}
        plain: set[nn.Module] = plan.found["plain"]
        return plain


def _is_plain(layer: nn.Module, watched: set[int]) -> bool:
    """Whether a layer with its attention is one function in training, of tensors whose ids are in ``watched``."""
    if not isinstance(layer, BertLayer) or layer.unfused() is not None:
        return False
    attend: Any = layer.attention.self
    if not _is_plain_attention(attend):
        return False
    tensors = (x for linear in attend.linears() for x in (linear.weight, linear.bias))
    return all(x is None or id(x) in watched for x in (*tensors, *layer._parameters_after_attention()))


def _is_plain_attention(attention: Any) -> bool:
    """Whether a self-attention is what it seems, with projections that are one product."""
    return unusual(attention, BertSelfAttention) is None and attention.unfused() is None


def _linear_gelu(owner: Any, activation: nn.Module, x: Tensor) -> Tensor:
    (dense,), approximate = owner.linears(), gelu_approximation(activation)
    assert approximate is not None
    if packed := _prepacked(owner, x, dense):
        return prepacked.linear_gelu(x, packed, approximate)
    return ops.linear_gelu(x, dense.weight, dense.bias, approximate=approximate)


def _at(seeds: Tensor | None, index: int) -> Tensor | None:
    return None if seeds is None else seeds[index]


# Those that fuse what they can for a padded batch, too. They are told of the model's configuration.
CONFIGURED = (BertSelfOutput, BertIntermediate, BertOutput, BertPredictionHeadTransform)
# The fused class of each of Hugging Face's parts.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    getattr(upstream, part.__name__): part
    for part in (
        BertEmbeddings,
        BertSelfAttention,
        BertSelfOutput,
        BertAttention,
        BertIntermediate,
        BertOutput,
        BertLayer,
        BertEncoder,
        BertPredictionHeadTransform,
    )
}
