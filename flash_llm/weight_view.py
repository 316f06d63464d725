"""``WeightView``: the ``weight`` of a packed layer, unpacked only when its values are needed.

Much code reads only the dtype or the device of a weight (T5 in each forward), which must not unpack
it. Other code writes to a weight in place. This would change a copy, so it is refused. All other
operations on a view are done on the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map_only

from flash_llm import ops
from flash_llm.ops import PackedWeight


class WeightView(Tensor):
    """A read-only dense ``[M, K]`` weight, of the dtype and on the device of the packed one.

    Operations return plain tensors, but views of it (``t()``, slices, ``data``) are read-only too.
    Because it has ``__torch_function__``, the Transformer layers of ``torch.nn`` do not use their
    fused forms, which read weights instead of calling the layers' ``forward``.

    Args:
        packed: the weight, unpacked at the first operation that needs values.
        assign: called with the tensor that replaces ``data``.

    Raises:
        NotImplementedError: an operation writes into it; it says what to do instead.
    """

    _source: PackedWeight | Tensor
    _assign: Callable[[Tensor], None] | None
    # The init functions of transformers skip it: a packed weight is never initialised randomly.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls, packed: PackedWeight | Tensor, assign: Callable[[Tensor], None] | None = None
    ) -> WeightView:
        """Make a tensor without memory."""
        # torch refuses views in inference mode of tensors made outside of it, and the reverse.
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inference else nullcontext():
            view: WeightView = Tensor._make_wrapper_subclass(
                cls,
                packed.shape,
                strides=packed.stride() if isinstance(packed, Tensor) else None,
                dtype=packed.dtype,
                device=packed.device,
            )
        view._source = packed
        view._assign = assign
        return view

    def dense(self) -> Tensor:
        """Return the values as a plain tensor, the same one in each call."""
        if isinstance(self._source, PackedWeight):
            self._source = ops.unpack(self._source)
        return self._source

    @property
    def data(self) -> Tensor:
        """The view itself, as it has no gradient; a tensor that is assigned is packed."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._assign is not None:
            self._assign(value)
        else:
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self._source = value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.apply_:  # not an operator, so __torch_dispatch__ does not see it
            raise _read_only("apply_")
        if func in _NEED_MEMORY:
            args = tree_map_only(cls, cls.dense, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.is_write and tree_any(lambda part: isinstance(part, cls), value):
                raise _read_only(func)
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._source)
        result = func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs))
        if any(returned.alias_info is not None for returned in schema.returns):
            return tree_map_only(Tensor, cls, result)
        return result


# These access the memory of a tensor, which a view does not have, without calling an operator.
_NEED_MEMORY = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__dlpack__,
    Tensor.__format__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.share_memory_,
    Tensor.storage,
    Tensor.tolist,
    Tensor.untyped_storage,
}


def _read_only(operation: object) -> NotImplementedError:
    # Not a TypeError: after that Python would compute ``w += x`` as ``w = w + x``, without a write.
    return NotImplementedError(
        f"flash_llm.SparseLinear: weight is packed, so {operation} cannot write into it; change a "
        "clone() and assign that to the layer's weight, or use the dense layer that to_linear() "
        "returns"
    )
