"""Whether modules are still what they were when something was found out about them.

What a forward has to know of its modules (which of them may be bypassed, which weights can be joined) follows from
their classes, children, hooks and parameters. To look at each of them takes longer than to launch the kernels of a few
layers. To see that nothing has changed takes a few calls for all of them together.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn

_DICT = attrgetter("__dict__")
_CHILDREN = itemgetter("_modules")
_HOOKS = tuple(map(itemgetter, ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")))
_TENSORS = tuple(map(itemgetter, ("_parameters", "_buffers")))
_VALUES = methodcaller("values")
# What the kernels are given of a module, besides its tensors.
_NUMBERS = ("training", "eps", "scaling", "normalized_shape")
_SCALARS = (bool, str, int, float)

Dicts = list[dict[str, Any]]


class Snapshot:
    """A module ``root`` and modules below it as they are now, and what was found out about them.

    It holds as long as each has its class, its children, its hooks and its ``forward``, whether that is the class's or
    one that took its place; with ``tensors`` also its parameters, buffers, mode, eps, scaling and normalized shape, and
    the settings of a module of another package, such as an adapter's. Of tensors the objects and their types count:
    what is in them, and where, is for the caller to look at. Modules of TorchScript show other children at every look,
    so that no snapshot of them holds.

    A copy of a snapshot, a pickled one included, is None, as it would be of other modules. ``root`` isn't kept: it may
    have snapshots of itself among its attributes, and is still freed with its last reference.

    Attributes:
        found: for the caller's use.
        tensors: the parameters and buffers, where these were asked for.
    """

    found: Any = None

    def __init__(self, root: nn.Module, below: Iterable[nn.Module], tensors: bool = False) -> None:
        self._below = [module for module in below if module is not root]
        modules = [root, *self._below]
        dicts = list(map(_DICT, modules))
        self._types = list(map(type, modules))
        self._children = [dict(children) for children in map(_CHILDREN, dicts)]
        self._hooks = [dict(hooks) for hooks in _hooks(dicts)]
        # What stands in the place of a class's forward.
        self._forwards = _values(dicts, "forward")
        self._complete = tensors
        held = _tensors(dicts) if tensors else []
        self._held = held
        self._tensor_ids, self._tensor_types = list(map(id, held)), list(map(type, held))
        self._numbers = [_values(dicts, name) for name in _NUMBERS] if tensors else []
        self._others = [own for kind, own in zip(self._types, dicts, strict=True) if tensors and _is_foreign(kind)]
        self._settings = list(map(_settings, self._others))
        self.tensors: list[Tensor] = [tensor for tensor in held if tensor is not None]

    def holds(self, root: nn.Module) -> bool:
        """Whether ``root`` and the modules below it are as they were."""
        modules = [root, *self._below]
        if list(map(type, modules)) != self._types:
            return False
        dicts = list(map(_DICT, modules))
        if list(map(_CHILDREN, dicts)) != self._children:
            return False
        if _hooks(dicts) != self._hooks or _values(dicts, "forward") != self._forwards:
            return False
        return not self._complete or self._tensors_hold(dicts)

    def _tensors_hold(self, dicts: Dicts) -> bool:
        # By their ids: two tensors that aren't the same would be compared element by element.
        held = _tensors(dicts)
        if list(map(id, held)) != self._tensor_ids or list(map(type, held)) != self._tensor_types:
            return False
        if [_values(dicts, name) for name in _NUMBERS] != self._numbers:
            return False
        return list(map(_settings, self._others)) == self._settings

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def _is_foreign(kind: type) -> bool:
    """Whether a class is neither torch's, nor transformers', nor fastbert's, whose settings are known."""
    return kind.__module__.split(".")[0] not in ("torch", "transformers", "fastbert")


def _settings(attributes: dict[str, Any]) -> dict[str, Any]:
    """Switches and names among a module's attributes, and the switches, names and numbers in its containers.

    A number alone is left out: a module that counts its calls would never be what it was.
    """
    found: dict[str, Any] = {}
    for name, value in attributes.items():
        kind = type(value)
        if kind is bool or kind is str:
            found[name] = value
        elif kind is dict:
            found[name] = {key: one for key, one in value.items() if type(one) in _SCALARS}
        elif kind in (list, tuple, set):
            found[name] = kind(one for one in value if type(one) in _SCALARS)
    return found


def _hooks(dicts: Dicts) -> list[Any]:
    """The tables of hooks that aren't empty; no two hooks of a process have the same key in theirs."""
    return list(filter(None, chain.from_iterable(map(table, dicts) for table in _HOOKS)))


def _values(dicts: Dicts, name: str) -> list[Any]:
    """The attribute of each module, None where it has none of its own."""
    return list(map(dict.get, dicts, repeat(name)))


def _tensors(dicts: Dicts) -> list[Any]:
    """Parameters and buffers, None for one that isn't set."""
    tables = filter(None, chain.from_iterable(map(table, dicts) for table in _TENSORS))
    return list(chain.from_iterable(map(_VALUES, tables)))
