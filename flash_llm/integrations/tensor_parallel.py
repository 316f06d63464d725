"""Tensor parallelism of transformers: every process packs its own part of a layer.

transformers (``from_pretrained(..., distributed_config=DistributedConfig(tp_size=n))``) makes a
``DTensor`` of each parameter that its plan names, and replaces the layer's ``forward`` by one that
splits inputs and combines outputs. A packed weight is not a parameter, so this module starts from
the whole weight, cuts it as the plan cuts a dense one, and packs the part again.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from flash_llm.linear import SparseLinear, is_dtensor, local_part
from flash_llm.quantize import GROUP, check_parts, scales_of_elements


def styles(model: nn.Module) -> dict[nn.Module, tuple[Any, Any]]:
    """Return style and device mesh of each linear layer that a transformers plan distributes.

    Args:
        model: any module; each model of transformers inside it has its own plan.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return {}
    found: dict[nn.Module, tuple[Any, Any]] = {}
    for inner in model.modules():
        if not isinstance(inner, transformers.PreTrainedModel):
            continue
        mesh, size = getattr(inner, "_device_mesh", None), getattr(inner, "_tp_size", None)
        if mesh is None or size is None or size < 2:
            continue
        from transformers.distributed.tensor_parallel import (
            ALL_PARALLEL_STYLES,
            _get_parameter_tp_plan,
        )

        for name, module in inner.named_modules():
            style = _get_parameter_tp_plan(name, inner.tp_plan, is_weight=False)
            if style is not None and isinstance(module, nn.Linear):
                found[module] = ALL_PARALLEL_STYLES[style], mesh["tp"] if mesh.ndim > 1 else mesh
    return found


def gathered(linear: nn.Module) -> nn.Linear:
    """Return a layer with the whole weight of a distributed layer, without bias.

    All processes of the mesh must call this together.

    Args:
        linear: ``nn.Linear``; a weight that is not a ``DTensor`` is already whole.
    """
    weight: Any = linear.weight
    whole: Tensor = weight.full_tensor() if is_dtensor(weight) else weight
    layer = nn.Linear(whole.shape[1], whole.shape[0], bias=False, device="meta", dtype=whole.dtype)
    layer.weight = nn.Parameter(whole.detach(), requires_grad=False)
    return layer


def shard_(layer: SparseLinear, style: Any, mesh: Any) -> None:
    """Reduce a layer to this process's part of its weight; the bias stays as it is.

    Args:
        layer: packed layer with the whole weight.
        style: the transformers style, which says how the weight is cut.
        mesh: the device mesh of the processes.

    Raises:
        ValueError: a process would get columns that begin within a group that shares scales. All
            processes raise it, and the layer does not change.
    """
    packed = layer.packed
    if packed.values == "16-bit":
        part, scales = _part(packed.to_dense(), style, mesh), None
    else:
        values, stored = packed.to_quantized()
        part = _part(values, style, mesh)
        columns = values.shape[1]
        if part.shape[1] != columns:
            check_parts(packed.values, columns, -(-columns // mesh.size()))
        # Cut like the values, whatever the style: every element with its scale.
        scales = _part(scales_of_elements(stored, columns), style, mesh)
        scales = scales[:, 0] if stored.dim() == 1 else scales[:, ::GROUP]
    # With this flag transformers passes plain tensors to forward, and leaves the bias out where it
    # sums outputs over the processes.
    layer._hf_quantized_needs_local_tp = True
    if part.shape != packed.shape:
        layer.keep_part(part, scales)


def _part(weight: Tensor, style: Any, mesh: Any) -> Tensor:
    """Return this process's part of a tensor of a weight's shape; all of it if it is not cut."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    style.shard_param(linear, "weight", mesh)
    return local_part(linear.weight)


def carry_plan(old: nn.Module, new: SparseLinear, style: Any, mesh: Any) -> None:
    """Let a packed layer split inputs and combine outputs as the dense layer that it replaces.

    Args:
        old: the dense layer, whose ``forward`` the plan replaced.
        new: the packed layer, with its part of the weight (:func:`shard_`) and the bias of ``old``.
        style: the plan's style for this layer.
        mesh: the device mesh of the processes.
    """
    if "config" in vars(old):  # read by the style of DeepSeek's latent attention
        new.config = old.config
    style.install_forward(new, mesh)
