"""Attention over packed sequences, without scores in memory."""

from fastbert.ops.attention.api import attention

__all__ = ["attention"]
