"""Tensor parallelism of transformers: every process packs its own part of a layer.

transformers (``from_pretrained(..., distributed_config=DistributedConfig(tp_size=n))``) makes a
``DTensor`` of each parameter that its plan names, and replaces the layer's ``forward`` by one that
splits inputs and combines outputs. A packed weight is not a parameter, so this module starts from
the whole weight, cuts it as the plan cuts a dense one, and packs the part again.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.linear import SparseLinear, is_dtensor, local_part
from flash_llm.quantize import GROUP, scales_of_elements


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
    """
    # With this flag transformers passes plain tensors to forward, and leaves the bias out where it
    # sums outputs over the processes.
    layer._hf_quantized_needs_local_tp = True
    packed = layer.packed
    if packed.values == "16-bit":
        part, scales = _part(packed.to_dense(), style, mesh), None
    else:
        values, stored = packed.to_quantized()
        part = _part(values, style, mesh)
        # Cut like the values, whatever the style: every element with its scale.
        scales = _scales_of_part(
            _part(scales_of_elements(stored, values.shape[1]), style, mesh), stored.dim() == 2
        )
    if part.shape != packed.shape:
        layer.keep_part(part, scales)


def _scales_of_part(of_elements: Tensor, grouped: bool) -> Tensor:
    """Return the scales of a part of a quantised weight.

    Args:
        of_elements: ``[M', K']``, the scale of each element.
        grouped: whether groups of columns have scales, or whole rows.

    Raises:
        ValueError: a group of columns of the part has several scales, because the part begins
            within a group of the weight.
    """
    if not grouped:
        return of_elements[:, 0]
    scales = of_elements[:, ::GROUP]
    if not torch.equal(scales_of_elements(scales, of_elements.shape[1]), of_elements):
        raise ValueError(
            f"a part of {of_elements.shape[1]} columns cuts the groups of {GROUP} columns in which "
            "int4 values share a scale; take fewer processes or other values"
        )
    return scales


def _part(weight: Tensor, style: Any, mesh: Any) -> Tensor:
    """Return this process's part of a tensor of a weight's shape; all of it if it is not cut."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    style.shard_param(linear, "weight", mesh)
    return local_part(linear.weight)


def carry_plan(old: nn.Module, new: SparseLinear, style: Any, mesh: Any) -> None:
    """Distribute a packed layer as a plan distributes the dense layer that it replaces.

    Args:
        old: the dense layer, whose ``forward`` the plan replaced.
        new: the packed layer, with the whole weight and the bias of ``old``.
        style: the plan's style for this layer.
        mesh: the device mesh of the processes.
    """
    shard_(new, style, mesh)
    if "config" in vars(old):  # read by the style of DeepSeek's latent attention
        new.config = old.config
    style.install_forward(new, mesh)
