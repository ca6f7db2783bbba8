"""residual + dropout(x + bias), in one pass."""

from fastbert.ops.bias_dropout_residual.api import bias_dropout_residual

__all__ = ["bias_dropout_residual"]
