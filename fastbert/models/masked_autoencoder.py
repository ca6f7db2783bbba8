"""A masked autoencoder: the encoder never sees the masked tokens, and a light decoder reconstructs them.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377, section 3, carried over to tokens: what
is masked is left out of the encoder's batch, not replaced by ``[MASK]``, so that it costs the encoder nothing and no
capacity goes to a symbol that fine-tuning never shows it (Meng et al., "Representation Deficiency in Masked Language
Modeling", arXiv:2302.02060, section 4). The decoder sees the encoder's states at visible places and one learnt vector
at masked ones, each with its position.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertPreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from fastbert.backends.select import UnsupportedError
from fastbert.models import upstream
from fastbert.models.bert import IGNORED_LABEL, BertModel, Head

_DECODER_LAYERS = 2


class _Decoder(BertModel):
    """A BERT whose positions begin as sines and cosines, as those of He et al. do.

    At a masked place there is nothing else to tell it from another, and these are far apart from the start.
    """

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]  # Hugging Face's has no annotations
        if module is self.embeddings:
            weight = self.embeddings.position_embeddings.weight
            upstream.fill(weight, _sinusoids(*weight.shape))


class BertForMaskedAutoencoding(Head, BertPreTrainedModel):
    """A BERT encoder over the visible tokens, and a decoder that reconstructs the masked ones.

    The configuration is the encoder's, with four more numbers: ``decoder_num_hidden_layers`` (2 unless given),
    ``decoder_hidden_size`` (half the encoder's), ``decoder_num_attention_heads`` (as many heads as keep the encoder's
    head size) and ``decoder_intermediate_size`` (four times the decoder's hidden size). The encoder is ``bert``,
    without a pooler: ``BertModel.from_pretrained`` of a saved autoencoder loads it, here and in plain transformers.

    Raises:
        ValueError: the numbers don't fit together.
        UnsupportedError: the installed transformers lacks an inner name that it is made with.
    """

    _tied_weights_keys = {  # noqa: RUF012 - Hugging Face's own attribute
        "predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }

    def __init__(self, config: BertConfig) -> None:
        if reason := upstream.no_autoencoder():
            raise UnsupportedError(reason)
        hidden = getattr(config, "decoder_hidden_size", None) or config.hidden_size // 2
        head_size = config.hidden_size // config.num_attention_heads
        heads = getattr(config, "decoder_num_attention_heads", None) or max(1, hidden // head_size)
        if hidden % heads:
            raise ValueError(
                f"decoder_hidden_size is {hidden}, no multiple of decoder_num_attention_heads, which is {heads}"
            )
        config.decoder_num_hidden_layers = getattr(config, "decoder_num_hidden_layers", None) or _DECODER_LAYERS
        config.decoder_hidden_size = hidden
        config.decoder_num_attention_heads = heads
        config.decoder_intermediate_size = getattr(config, "decoder_intermediate_size", None) or 4 * hidden
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.to_decoder = nn.Linear(config.hidden_size, hidden)
        # Its table of words has one: the vector that stands for a masked token.
        self.decoder = _Decoder(_decoder_config(config), add_pooling_layer=False)
        self.from_decoder = nn.Linear(hidden, config.hidden_size)
        self.predictions = upstream.BertLMPredictionHead(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        """The product with the vocabulary, which is tied to the encoder's embeddings."""
        decoder: nn.Module = self.predictions.decoder
        return decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the product with the vocabulary."""
        self.predictions.decoder = new_embeddings
        self.predictions.bias = new_embeddings.bias

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        masked: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Reconstruct masked tokens from the visible ones.

        Args:
            input_ids: int32 or int64 ``[B, S]``; what stands at a masked place is not looked at.
            attention_mask: ``[B, S]`` of any dtype, nonzero where a token is, masked or not; or None.
            token_type_ids, position_ids: int32 or int64 ``[B, S]`` or ``[1, S]``.
            labels: int64 ``[B, S]``, the token at masked places and -100 elsewhere.
            masked: bool ``[B, S]``, the places to leave out of the encoder; those with a label unless given.
            return_dict: False for a tuple.

        Returns:
            ``loss``, the mean cross-entropy over the places with a label, if there are labels; ``logits``
            ``[N, V]`` of the N masked places, row by row of the batch.

        Raises:
            TypeError, ValueError, IndexError: inputs that can't be served; see ``inputs.check``. Also if neither
                ``labels`` nor ``masked`` is given, or a place has a label and isn't masked.
        """
        for name, given in (("labels", labels), ("masked", masked)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}, and input_ids {tuple(input_ids.shape)}; they must match"
                )
        if masked is not None:
            masked = masked.to(device=input_ids.device, dtype=torch.bool)
            if labels is not None and bool(((labels != IGNORED_LABEL) & ~masked).any()):
                raise ValueError("labels has a label at a place that masked doesn't mark; its token is in plain sight")
        elif labels is not None:
            masked = labels != IGNORED_LABEL
        else:
            raise ValueError("neither labels nor masked is given; one of them must say which tokens are masked")
        valid = torch.ones_like(masked) if attention_mask is None else attention_mask.to(masked)
        places: dict[str, Any] = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        seen = self.bert(
            torch.where(masked, 0, input_ids), attention_mask=valid & ~masked, return_dict=True, **places
        ).last_hidden_state
        mask_token = self.decoder.embeddings.word_embeddings.weight[0]
        shown = torch.where(masked.unsqueeze(-1), mask_token, self.to_decoder(seen))
        states = self.decoder(
            inputs_embeds=shown, attention_mask=valid, read_positions=masked, return_dict=True, **places
        ).last_hidden_state
        where = masked.flatten().nonzero().squeeze(1)
        logits = self.predictions(self.from_decoder(states.flatten(0, 1)[where]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels.flatten()[where])
        found = MaskedLMOutput(loss=loss, logits=logits)
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


def _sinusoids(positions: int, features: int) -> Tensor:
    """``[positions, features]``: sines and cosines of ever lower frequency (Vaswani et al., arXiv:1706.03762, 3.5)."""
    frequencies = 10000.0 ** (-torch.arange(0, features, 2) / features)
    angles = torch.arange(positions).unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :features]


def _decoder_config(config: BertConfig) -> BertConfig:
    decoder = copy.deepcopy(config)
    decoder.vocab_size = 1
    decoder.pad_token_id = None
    decoder.hidden_size = config.decoder_hidden_size
    decoder.num_hidden_layers = config.decoder_num_hidden_layers
    decoder.num_attention_heads = config.decoder_num_attention_heads
    decoder.intermediate_size = config.decoder_intermediate_size
    return decoder
