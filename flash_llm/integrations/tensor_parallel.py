"""Tensor parallel of transformers: every process packs its own part of a layer.

transformers (``from_pretrained(..., distributed_config=DistributedConfig(tp_size=n))``) makes a
``DTensor`` of each parameter that its plan names, and replaces ``forward`` of the layer by one that
splits inputs and combines outputs. A packed weight is no parameter: it is taken whole here, cut as
the plan cuts a dense weight, and packed again.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from flash_llm.linear import SparseLinear, is_dtensor


def styles(model: nn.Module) -> dict[nn.Module, tuple[Any, Any]]:
    """Return style and device mesh of the linear layers that a plan of transformers distributes.

    Args:
        model: any module; plans belong to the models of transformers in it.
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
    """Return a layer with the whole weight of one whose weight is distributed, without bias.

    All processes of the mesh must call this together.

    Args:
        linear: ``nn.Linear``; a weight that is no ``DTensor`` is whole already.
    """
    weight: Any = linear.weight
    whole: Tensor = weight.full_tensor() if is_dtensor(weight) else weight
    layer = nn.Linear(whole.shape[1], whole.shape[0], bias=False, device="meta", dtype=whole.dtype)
    layer.weight = nn.Parameter(whole.detach(), requires_grad=False)
    return layer


def shard_(layer: SparseLinear, style: Any, mesh: Any) -> None:
    """Let a layer keep this process's part of its weight; the bias stays as it is.

    Args:
        layer: with the whole weight.
        style: of transformers, which says how the weight is cut.
        mesh: of the processes.
    """
    # Its forward must see plain tensors, and no bias where outputs are summed over the processes.
    layer._hf_quantized_needs_local_tp = True
    dense = layer.to_linear()
    style.shard_param(dense, "weight", mesh)
    weight: Any = dense.weight
    if is_dtensor(weight):
        layer.keep_part(weight.to_local())


def carry_plan(old: nn.Module, new: SparseLinear, style: Any, mesh: Any) -> None:
    """Let a packed layer take the place of a dense one that a plan distributes.

    Args:
        old: whose ``forward`` the plan replaced.
        new: with the whole weight of ``old``, and its bias.
        style: of the plan, for this layer.
        mesh: of the processes.
    """
    shard_(new, style, mesh)
    if "config" in vars(old):  # the style of DeepSeek's latent attention reads it
        new.config = old.config
    style.install_forward(new, mesh)
