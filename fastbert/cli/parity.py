"""Do two models give the same numbers? Differences on valid tokens, and of the sentence embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertModel

from fastbert.cli.batches import Batch, mean_pool

# Section 6 of the design: float32, up to BERT-base.
_FLOAT32_TOLERANCE = 1e-5
_BASE_LAYERS, _BASE_HIDDEN = 12, 768
# Two texts are equally near if float32 can hardly tell their cosines apart.
_TIE = 1e-6


class Parity(NamedTuple):
    """How near fastbert is to the reference, which is Hugging Face in float32.

    Attributes:
        difference: the largest on valid tokens.
        hugging_face_difference: that of Hugging Face in the same dtype; None in float32, where it is the reference.
        tolerance: what ``difference`` may be.
        rule: where the tolerance comes from.
        cosine_min, cosine_mean: of each mean-pooled sentence embedding with the reference's.
        neighbours_kept: fraction of the texts whose nearest other text is the reference's; None with fewer than three.
        passed: ``difference`` is within ``tolerance``, and in float32 all neighbours are kept.
    """

    difference: float
    hugging_face_difference: float | None
    tolerance: float
    rule: str
    cosine_min: float
    cosine_mean: float
    neighbours_kept: float | None
    passed: bool


def float32_tolerance(config: BertConfig) -> tuple[float, str]:
    """(tolerance, its rule): rounding errors add up over the layers, and in products with the root of their length."""
    deeper = max(1.0, config.num_hidden_layers / _BASE_LAYERS)
    wider = max(1.0, math.sqrt(config.hidden_size / _BASE_HIDDEN))
    rule = f"{_FLOAT32_TOLERANCE:g}"
    if deeper > 1.0:
        rule += f" × {config.num_hidden_layers} layers / {_BASE_LAYERS}"
    if wider > 1.0:
        rule += f" × √({config.hidden_size} / {_BASE_HIDDEN})"
    return _FLOAT32_TOLERANCE * deeper * wider, rule


@torch.inference_mode()
def measure(
    batches: Sequence[Batch], hugging_face: BertModel, fast: BertModel, float32: BertModel | None
) -> Parity | None:
    """Run the models on all batches and compare them; None if the reference itself isn't finite.

    Args:
        hugging_face, fast: in the dtype that is compared.
        float32: Hugging Face's model in float32, the reference; None if ``hugging_face`` is that already.
    """
    fast_difference = hugging_face_difference = largest = torch.zeros(())
    reference_sentences, fast_sentences = [], []
    for batch in batches:
        valid = batch.attention_mask.bool()
        theirs, ours = _states(hugging_face, batch), _states(fast, batch)
        reference = theirs if float32 is None else _states(float32, batch)
        if not reference[valid].isfinite().all():
            return None
        # torch.maximum keeps a NaN, and a NaN is within no tolerance.
        fast_difference = torch.maximum(fast_difference, _largest(ours - reference, valid))
        hugging_face_difference = torch.maximum(hugging_face_difference, _largest(theirs - reference, valid))
        largest = torch.maximum(largest, _largest(reference, valid))
        reference_sentences.append(mean_pool(reference, batch.attention_mask).cpu())
        fast_sentences.append(mean_pool(ours, batch.attention_mask).cpu())
    if float32 is None:
        tolerance, rule = float32_tolerance(hugging_face.config)
    else:
        dtype = hugging_face.dtype
        dtype_name = str(dtype).removeprefix("torch.")
        # Rounding to nearest moves a value by at most half of its last place.
        rounding = torch.finfo(dtype).eps / 2 * float(largest)
        tolerance = 2 * float(hugging_face_difference) + rounding
        rule = f"2 × Hugging Face's + {rounding:.2g} for rounding the largest state to {dtype_name}"
    reference_directions = F.normalize(torch.cat(reference_sentences).double(), dim=1)
    fast_directions = F.normalize(torch.cat(fast_sentences).double(), dim=1)
    cosines = (reference_directions * fast_directions).sum(1)
    kept = _neighbours_kept(reference_directions, fast_directions)
    within = float(fast_difference) <= tolerance
    return Parity(
        difference=float(fast_difference),
        hugging_face_difference=None if float32 is None else float(hugging_face_difference),
        tolerance=tolerance,
        rule=rule,
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        neighbours_kept=kept,
        passed=within and (float32 is not None or kept in (None, 1.0)),
    )


def _states(model: BertModel, batch: Batch) -> Tensor:
    states: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return states.float()


def _largest(states: Tensor, valid: Tensor) -> Tensor:
    return states[valid].abs().max().cpu()


def _neighbours_kept(reference: Tensor, other: Tensor) -> float | None:
    """The fraction of rows (unit vectors ``[N, H]``) whose nearest other row in ``other`` is one in ``reference``."""
    if len(reference) < 3:
        return None
    similarity = (reference @ reference.T).fill_diagonal_(-math.inf)
    nearest = (other @ other.T).fill_diagonal_(-math.inf).argmax(1, keepdim=True)
    kept = similarity.gather(1, nearest).squeeze(1) >= similarity.max(1).values - _TIE
    return float(kept.double().mean())
