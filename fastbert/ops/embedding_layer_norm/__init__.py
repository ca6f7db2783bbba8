"""dropout(LayerNorm(word + position + token type)): BERT's input embeddings."""

from fastbert.ops.embedding_layer_norm.api import embedding_layer_norm

__all__ = ["embedding_layer_norm"]
