"""Merging of PEFT adapters over packed layers.

A :class:`SparseLinear` is an ``nn.Linear``, which is all that PEFT needs for training. Merging,
however, writes into the base layer's weight, and a packed weight cannot be written to: the sum of a
sparse weight and an adapter's has few zeros. So ``merge`` of every kind of adapter first replaces a
packed base layer by an ``nn.Linear``, which then holds the merged weight, rounded to the layer's
dtype. To make it sparse again, prune and pack it. Once no adapter is merged any more, ``unmerge``
restores the packed layer, weight and bias bit for bit.

:mod:`flash_llm.integrations.hf` imports this module as soon as PEFT is imported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from flash_llm.linear import SparseLinear

_HELD = "_packed_base"  # attribute of a PEFT layer while its base layer is dense


@dataclasses.dataclass
class _PackedBase:
    """A packed layer that is kept while adapters are merged into its dense replacement."""

    layer: SparseLinear
    bias: Tensor | None  # a copy: the layers share the parameter, and merging may change it
    tuners: list[Any]  # nested PEFT layers that merged into the dense layer
    busy: bool = False

    def restored(self, like: Tensor) -> SparseLinear:
        """Return the packed layer as it was, on the device of ``like``."""
        layer = self.layer.to(like.device)
        if self.bias is not None:
            layer.bias.data = self.bias.to(like.device)
        return layer


def _over_packed(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a ``merge`` or ``unmerge`` so that its base layer is dense during the call."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        owner = self
        while isinstance(getattr(owner, "base_layer", None), BaseTunerLayer):
            owner = owner.base_layer
        base = getattr(owner, "base_layer", None)
        held: _PackedBase | None = vars(owner).get(_HELD)
        if held is None and isinstance(base, SparseLinear):
            held = _PackedBase(base, None if base.bias is None else base.bias.detach().clone(), [])
            setattr(owner, _HELD, held)
            owner.base_layer = base.to_linear()
        if held is None or held.busy:
            return method(self, *args, **options)
        if not any(tuner is self for tuner in held.tuners):
            held.tuners.append(self)
        held.busy = True
        try:
            return method(self, *args, **options)
        finally:
            held.busy = False
            if not any(tuner.merged for tuner in held.tuners):
                owner.base_layer = held.restored(owner.base_layer.weight)
                del vars(owner)[_HELD]

    return call


def _wrap(cls: type) -> None:
    for name in ("merge", "unmerge"):
        if name in vars(cls):
            setattr(cls, name, _over_packed(vars(cls)[name]))


def _wrap_new(cls: Any, /, **options: Any) -> None:
    super(BaseTunerLayer, cls).__init_subclass__(**options)
    _wrap(cls)


# PEFT has no extension point for merging, so the methods of all its layers are wrapped.
_layer: Any = BaseTunerLayer
_classes = [_layer]
for _cls in _classes:
    _classes.extend(sub for sub in _cls.__subclasses__() if sub not in _classes)
for _cls in _classes:
    _wrap(_cls)
_layer.__init_subclass__ = classmethod(_wrap_new)
