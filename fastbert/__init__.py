"""A performance-optimised BERT for PyTorch: a drop-in replacement for Hugging Face's ``BertModel`` and its heads.

``from fastbert import BertModel`` instead of ``from transformers import BertModel``; or :func:`accelerate` on a model
that is already loaded; or :func:`patch` in front of code that can't be edited. :func:`explain` tells what runs where
and why; :func:`cuda_graphs` takes the host out of small batches on a GPU. The fused operations themselves are in
:mod:`fastbert.ops`.
"""

import importlib.util
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from fastbert._version import __version__ as __version__

if TYPE_CHECKING or PurePath(*sys.argv[:1]).stem != "fastbert":
    from fastbert._public import *  # noqa: F403  all that its __all__ names, and that is this module's too
    from fastbert._public import __all__ as __all__
else:
    # The command of that name: its --help and a mistyped option answer without torch, which takes seconds to import.
    def __getattr__(name):
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is None:
            from fastbert import _public

            if name in _public.__all__:
                return getattr(_public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
