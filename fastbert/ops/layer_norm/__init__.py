"""LayerNorm over the last dimension, with float32 statistics."""

from fastbert.ops.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
