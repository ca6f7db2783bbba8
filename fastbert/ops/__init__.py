"""The differentiable operations of BERT, each with a reference and faster implementations behind one function.

Every function takes ``impl=None`` (choose the fastest that can serve the call) or the name of an implementation, which
then runs or raises :class:`fastbert.backends.select.UnsupportedError`. Results are contiguous. None of them can be
differentiated twice; trying to raises.
"""

from fastbert.ops.attention import attention
from fastbert.ops.bias_dropout_residual import bias_dropout_residual
from fastbert.ops.bias_dropout_residual_layer_norm import bias_dropout_residual_layer_norm
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.embedding_layer_norm import embedding_layer_norm
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.linear_gelu import linear_gelu

__all__ = [
    "attention",
    "bias_dropout_residual",
    "bias_dropout_residual_layer_norm",
    "bias_gelu",
    "embedding_layer_norm",
    "layer_norm",
    "linear_gelu",
]
