"""Adapters of PEFT over packed layers, so that merging one gives what it should.

PEFT takes a :class:`SparseLinear` for the ``nn.Linear`` that it is, and training needs no more.
Merging writes into the base layer's weight, and a packed weight cannot be written to: the sum of a
sparse weight and an adapter's has few zeros. So ``merge`` of every kind of adapter first replaces a
packed base layer by an ``nn.Linear``, which then holds the merged weight, rounded to the layer's
dtype; prune and pack that one again if it is to be sparse. ``unmerge`` puts the packed layer back
when no adapter is merged any more, weight and bias bit for bit.

:mod:`flash_llm.integrations.hf` imports this module as soon as PEFT is there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from flash_llm.linear import SparseLinear

_HELD = "_packed_base"  # attribute of the layer of PEFT whose base layer is dense meanwhile


@dataclasses.dataclass
class _PackedBase:
    """A packed layer, kept while adapters are merged into a dense one in its place."""

    layer: SparseLinear
    bias: Tensor | None  # its values: the parameter is shared, and merging may change it
    tuners: list[Any]  # layers of PEFT, one around the other, that merged into the dense layer
    busy: bool = False

    def restored(self, like: Tensor) -> SparseLinear:
        """Return the layer as it was, on the device of ``like``."""
        layer = self.layer.to(like.device)
        if self.bias is not None:
            layer.bias.data = self.bias.to(like.device)
        return layer


def _over_packed(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a ``merge`` or ``unmerge`` so that it finds a dense base layer."""

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


# PEFT has no place where other packages say how their layers are merged.
_layer: Any = BaseTunerLayer
_classes = [_layer]
for _cls in _classes:
    _classes.extend(sub for sub in _cls.__subclasses__() if sub not in _classes)
for _cls in _classes:
    _wrap(_cls)
_layer.__init_subclass__ = classmethod(_wrap_new)
