"""gelu(x Wᵀ + b): BERT's intermediate layer."""

from fastbert.ops.linear_gelu.api import linear_gelu

__all__ = ["linear_gelu"]
