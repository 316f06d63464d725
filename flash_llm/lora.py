"""LoRA adapters of PEFT over packed layers, so that merging one gives what it should.

PEFT takes a :class:`SparseLinear` for the ``nn.Linear`` that it is, and training needs no more.
But it merges an adapter by adding to ``weight.data``, and a packed layer's ``weight`` is a copy:
nothing would be merged, in silence. :mod:`flash_llm.hf` imports this module as soon as PEFT is
there.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear, model
from torch import nn

from flash_llm.linear import SparseLinear


class SparseLoraLinear(Linear):
    """LoRA (arXiv 2106.09685) over a packed layer.

    A sum of a sparse weight and a low-rank one has few zeros, so merging (``merge_adapter``,
    ``merge_and_unload``) replaces the packed layer by an ``nn.Linear`` with the sum, rounded to the
    layer's dtype; prune and pack that one again if it is to be sparse. Unmerging puts the packed
    layer back, bit for bit.
    """

    _packed: tuple[SparseLinear, ...] = ()  # while merged; in a tuple it is no submodule

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into a dense copy of the base layer, and make that the base layer.

        Args:
            safe_merge: check the sum for NaN and infinity before it is used.
            adapter_names: the adapters to merge, None for all active ones.

        Raises:
            ValueError: ``safe_merge`` found a number that is not finite; the base stays packed.
        """
        base = self.base_layer
        if isinstance(base, SparseLinear):
            self._packed, self.base_layer = (base,), base.to_linear()
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            self._put_packed_back()

    def unmerge(self) -> None:
        """Take all adapters out again; the base layer is the packed one as it was."""
        super().unmerge()
        self._put_packed_back()

    def _put_packed_back(self) -> None:
        if self._packed and not self.merged:
            merged: Any = self.base_layer
            self.base_layer = self._packed[0].to(merged.weight.device)
            self._packed = ()


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> Any:
    """Make the LoRA layer for ``target``; PEFT's own function for all that is not packed."""
    if isinstance(target, SparseLinear) and options.get("parameter_name") is None:
        return SparseLoraLinear(target, adapter_name, config=config, **options)
    return _dispatch_default(target, adapter_name, config=config, **options)


# PEFT has no registry for layers of other packages; the last of its dispatchers handles nn.Linear.
_peft: Any = model
_dispatch_default = _peft.dispatch_default
_peft.dispatch_default = _dispatch
