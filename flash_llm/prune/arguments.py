"""Copy, compare and change the arguments of a block: nested tensors and objects.

An argument is a tensor, an immutable value, a module, or something that holds others: a tuple, list
or dict, or an object with attributes, such as a key/value cache.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Memo = dict[int, tuple[Any, Any]]
"""Originals and their copies, by the id of the original."""


def copied(function: Callable[[Tensor], Tensor], value: Any, memo: Memo | None = None) -> Any:
    """Copy a value, and replace the tensors in it.

    Args:
        function: returns the tensor that replaces a tensor.
        value: modules in it, and objects that cannot be copied, are shared with the copy.
        memo: receives every pair of an original and its copy. An original that it already holds is
            not copied again, so that two arguments that share an object share its copy.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    twin: Any
    if isinstance(value, Tensor):
        twin = function(value)
    elif isinstance(value, tuple):
        items = [copied(function, item, memo) for item in value]
        twin = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    else:
        if isinstance(value, nn.Module):
            return value
        try:
            twin = copy.copy(value)
        except Exception:  # a class may raise anything to prevent copies
            return value
        if twin is value:  # it is immutable
            return value
        memo[id(value)] = (value, twin)
        _assign(twin, {key: copied(function, part, memo) for key, part in _parts(value).items()})
    memo[id(value)] = (value, twin)
    return twin


def equal(one: Any, other: Any, compared: set[tuple[int, int]] | None = None) -> bool:
    """Whether two values are equal; NaN equals NaN."""
    compared = set() if compared is None else compared
    if one is other and not isinstance(one, Tensor) and not _parts(one):
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        if torch.equal(one, other):
            return True
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if (id(one), id(other)) in compared:  # an object that contains itself
        return True
    compared.add((id(one), id(other)))
    parts, others = _parts(one), _parts(other)
    if not parts and not others:
        return isinstance(one, (list, dict, deque)) or bool(one == other)
    return parts.keys() == others.keys() and all(
        equal(part, others[key], compared) for key, part in parts.items()
    )


def changeable(value: Any) -> Iterator[Any]:
    """Yield the tensors, containers and objects in a value, itself included, that are mutable."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        parts = {} if isinstance(item, Tensor) else _parts(item)
        if id(item) in seen:
            continue
        seen.add(id(item))
        stack.extend(parts.values())
        if not isinstance(item, tuple) and (parts or isinstance(item, (Tensor, list, dict, deque))):
            yield item


def carry_back(memo: Memo, function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply the changes that a call made to copies of its arguments to the originals.

    Args:
        memo: filled by :func:`copied` when it copied the arguments.
        function: moves a tensor to the device of the originals.
        output: of the call.

    Returns:
        The output, with the originals in place of their copies.
    """
    pairs = [(original, twin) for original, twin in memo.values() if twin is not original]
    back: Memo = {id(twin): (twin, original) for original, twin in pairs}
    for original, twin in pairs:
        if isinstance(twin, Tensor):
            # The version of a tensor that was just moved is 0.
            if twin.is_inference() or twin._version > 0:
                original.copy_(twin)
        elif not isinstance(twin, tuple):
            _assign(original, {k: copied(function, p, back) for k, p in _parts(twin).items()})
    return copied(function, output, back)


def _parts(value: Any) -> dict[Any, Any]:
    """Return the items of a container by index or key, and attributes by ``(".", name)``.

    Modules, classes and immutable values have no parts.
    """
    if isinstance(value, (Tensor, nn.Module, type, ModuleType)):
        return {}
    parts: dict[Any, Any] = {}
    if isinstance(value, (tuple, list, deque)):
        parts.update(enumerate(value))
    elif isinstance(value, dict):
        parts.update(value)
    attributes = getattr(value, "__dict__", {})
    parts.update(((".", name), part) for name, part in attributes.items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                parts[(".", name)] = getattr(value, name)
    return parts


def _assign(value: Any, parts: dict[Any, Any]) -> None:
    """Replace all parts of a container or an object by these."""
    for key in [key for key in _parts(value) if key not in parts]:
        if isinstance(key, tuple) and key[:1] == (".",):
            object.__delattr__(value, key[1])
        elif isinstance(value, dict):
            del value[key]
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(parts[index] for index in range(sum(type(k) is int for k in parts)))
    for key, part in parts.items():
        if isinstance(key, tuple) and key[:1] == (".",):
            object.__setattr__(value, key[1], part)
        elif isinstance(value, dict):
            value[key] = part
