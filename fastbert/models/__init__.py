"""BERT with Hugging Face's names, parameters and outputs, computed on packed tokens by ``fastbert.ops``."""
