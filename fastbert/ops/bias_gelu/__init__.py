"""gelu(x + bias)."""

from fastbert.ops.bias_gelu.api import bias_gelu

__all__ = ["bias_gelu"]
