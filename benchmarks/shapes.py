"""The shapes that are measured: models, and batches by the lengths of their sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

# Lengths in word pieces, [CLS] and [SEP] included, at every twentieth of the docstrings of Python 3.11's standard
# library: of their sentences, of whole docstrings, and of those of modules that have 128 or more. Tokenized by
# all-MiniLM-L6-v2; cut at 64, 256 and 512.
SENTENCES = (5, 8, 9, 11, 12, 12, 13, 14, 15, 16, 17, 18, 20, 21, 23, 26, 28, 32, 37, 48, 64)
DOCSTRINGS = (3, 8, 10, 11, 12, 13, 15, 16, 18, 21, 25, 30, 35, 41, 48, 59, 73, 91, 125, 193, 256)
DOCUMENTS = (142, 159, 202, 213, 227, 242, 257, 288, 298, 325, 340, 364, 413, 459, 512, 512, 512, 512, 512, 512, 512)


@dataclass(frozen=True)
class Model:
    """The sizes of a BERT; ``vocabulary`` is that of the published English checkpoints."""

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30_522

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self, **changes: object) -> transformers.BertConfig:
        return transformers.BertConfig(
            vocab_size=self.vocabulary,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate,
            **changes,
        )

    def forward_flops(self, lengths: Sequence[int]) -> float:
        """Of the encoder's products: 2L(4H² + 2HI) a token, and 4LHn² for attention over n tokens."""
        products = 2.0 * self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate) * sum(lengths)
        return products + sum(4.0 * self.layers * self.hidden * length**2 for length in lengths)


MODELS = {
    model.name: model
    for model in (
        Model("BERT-base", 12, 768, 12, 3072),
        Model("BERT-large", 24, 1024, 16, 4096),
        Model("MiniLM-L6", 6, 384, 12, 1536),
    )
}


@dataclass(frozen=True)
class Batch:
    """Sequences of these lengths, right-padded to ``seqlen``."""

    name: str
    lengths: tuple[int, ...]
    seqlen: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding_ratio(self) -> float:
        """The fraction of positions that are padding."""
        return 1.0 - self.tokens / (len(self.lengths) * self.seqlen)

    def mask(self) -> Tensor:
        """Bool ``[B, S]``."""
        return torch.arange(self.seqlen) < torch.tensor(self.lengths)[:, None]

    def cu_seqlens(self) -> Tensor:
        """Int32 ``[B + 1]``."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    def inputs(self, vocabulary: int) -> dict[str, Tensor]:
        """Random ids, and the mask as tokenizers give it."""
        mask = self.mask()
        ids = torch.randint(1000, vocabulary, mask.shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids * mask, "attention_mask": mask.long()}


def full(batch: int, seqlen: int) -> Batch:
    """A batch without padding."""
    return Batch(f"{batch}x{seqlen}", (seqlen,) * batch, seqlen)


def even(batch: int, seqlen: int, share: float) -> Batch:
    """Lengths spread evenly up to ``seqlen``, of which ``share`` is valid."""
    shortest = round(seqlen * (2 * share - 1))
    lengths = torch.linspace(max(1, shortest), seqlen, batch).round().int().tolist()
    return Batch(f"{batch}x{seqlen}-{share:.0%}".removesuffix("%"), _shuffled(lengths), seqlen)


def drawn(name: str, batch: int, quantiles: Sequence[int]) -> Batch:
    """``batch`` lengths at even steps through a distribution, padded to the longest of them."""
    places = (torch.arange(batch) + 0.5) / batch * (len(quantiles) - 1)
    below = places.floor().long()
    table = torch.tensor(quantiles, dtype=torch.float64)
    lengths = (table[below] + (places - below) * (table[below + 1] - table[below])).round().int().tolist()
    return Batch(f"{name}-{batch}", _shuffled(lengths), max(lengths))


def _shuffled(lengths: list[int]) -> tuple[int, ...]:
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    return tuple(lengths[index] for index in order)
