"""A performance-optimised BERT for PyTorch: a drop-in replacement for Hugging Face's ``BertModel`` and its heads."""
