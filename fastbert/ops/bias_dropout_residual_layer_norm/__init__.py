"""LayerNorm(residual + dropout(x + bias)): how every sub-layer of BERT ends."""

from fastbert.ops.bias_dropout_residual_layer_norm.api import bias_dropout_residual_layer_norm

__all__ = ["bias_dropout_residual_layer_norm"]
