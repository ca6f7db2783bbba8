"""Where the valid tokens of a padded batch are."""

from fastbert.ops.unpad.api import unpad

__all__ = ["unpad"]
