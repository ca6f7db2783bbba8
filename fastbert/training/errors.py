"""What is wrong with data or settings that a user gave."""


class DataError(ValueError):
    """A file, a folder or a setting can't be trained on; the message says why, in one line, and what may be there."""


def install(extra: str) -> str:
    """How to get the packages of an extra. A package index has another project of this name."""
    return f"`pip install '.[{extra}]'` in fastbert's source tree"
