"""The differentiable operations of BERT, each with a reference and faster implementations behind one function.

Every function takes ``impl=None`` (choose the fastest that can serve the call) or the name of an implementation, which
then runs or raises :class:`fastbert.backends.select.UnsupportedError`. Results are contiguous. None of them can be
differentiated twice; trying to raises.
"""

from fastbert.ops.bias_dropout_residual import bias_dropout_residual

__all__ = ["bias_dropout_residual"]
