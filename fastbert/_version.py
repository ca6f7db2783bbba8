"""The version of the package, which the build reads from here, and the name that pip knows the package by."""

__version__ = "0.1.0"

# On PyPI the name fastbert is another project's.
DISTRIBUTION = "fastbert-torch"
