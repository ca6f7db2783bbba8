"""Triton's interpreter in less time, with the results that it has anyway.

What it does for nothing is left out: it replaces the members of ``triton.language`` by its own at each call of a
function in a kernel, works out whether integers overflow, but tells nobody, and makes a table of dtypes for each value.
"""

import dataclasses

from triton import language
from triton.runtime import interpreter


class _Scope:
    """What a launch restores when it ends."""

    def __init__(self, scope, replaced):
        self.scope = scope
        self.replaced = replaced

    def restore(self):
        self.replaced.clear()
        self.scope.restore()


class _Once:
    """Stands in for ``interpreter._patch_lang``: the members of a module are replaced once a launch."""

    def __init__(self, patch_lang):
        self.patch_lang = patch_lang
        self.modules = {}  # by the globals of a function
        self.replaced = set()

    def __call__(self, function):
        key = id(function.__globals__)
        if key not in self.modules:
            known = {id(language), id(language.core)}
            self.modules[key] = known & {id(value) for value in function.__globals__.values()}
        modules = self.modules[key]
        if self.replaced and modules <= self.replaced:
            return None
        self.replaced |= modules
        return _Scope(self.patch_lang(function), self.replaced)


class _Dtypes:
    """Stands in for ``interpreter._get_np_dtype``: the dtype of NumPy by the name of Triton's."""

    def __init__(self, get_np_dtype):
        self.get_np_dtype = get_np_dtype
        self.known = {}

    def __call__(self, dtype):
        scalar = dtype.scalar
        if isinstance(scalar, language.pointer_type):
            return self.get_np_dtype(scalar)
        if scalar.name not in self.known:
            self.known[scalar.name] = self.get_np_dtype(scalar)
        return self.known[scalar.name]


def speed_up() -> None:
    """Call it once, before the first launch."""
    interpreter._patch_lang = _Once(interpreter._patch_lang)
    interpreter._get_np_dtype = _Dtypes(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "overflows are told of"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
