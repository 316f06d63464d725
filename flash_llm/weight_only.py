"""torch's weight-only INT8 and INT4 products on the CPU, for comparison with packed layers.

Weights are rounded to nearest, without calibration: to 8 bits with a scale for each row, or to 4
bits with a scale and a zero for each group of columns. This module uses private operators of torch.
It is for the demo and the benchmarks, not for storing models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_ONLY_VALUES = ("int8", "int4")
"""Value types that torch's products have. Those of packed weights are
:data:`flash_llm.ops.STORED_VALUES`."""
GROUP = 64
"""Default number of columns of an INT4 weight that share a scale. 128 does not divide the widths of
SmolLM2. Its weights were dequantised from groups of 32, so groups of 32 would look better than on
other models."""


def round_to_nearest(weight: Tensor, values: str, group: int = GROUP) -> Tensor:
    """Round a weight and dequantise it.

    Args:
        weight: ``[M, K]`` finite float16, bfloat16 or float32.
        values: one of :data:`WEIGHT_ONLY_VALUES`.
        group: columns of an INT4 weight that share a scale.

    Returns:
        ``[M, K]`` of the weight's dtype.

    Raises:
        ValueError: ``values`` is unknown, or K is not a multiple of ``group`` (INT4).
    """
    if _is_int8(values):
        steps, scales = _int8(weight)
        rounded = steps.float() * scales.float()[:, None]
    else:
        steps, scales, zeros = _int4(weight, group)
        groups = steps.view(*scales.shape, group).float()
        rounded = (groups - 8) * scales.float()[..., None] + zeros.float()[..., None]
    return rounded.view_as(weight).to(weight.dtype)


class WeightOnlyLinear(nn.Module):
    """``y = x @ W.T + b`` by torch's weight-only product.

    Args:
        weight: ``[M, K]`` finite bfloat16, on the CPU; M is a multiple of 16.
        bias: ``[M]`` bfloat16 or None.
        values: one of :data:`WEIGHT_ONLY_VALUES`.
        group: columns of an INT4 weight that share a scale: 32, 64, 128 or 256.

    Raises:
        ValueError: ``values`` is unknown, or K is not a multiple of ``group`` (INT4).
    """

    weight: Tensor
    scales: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, values: str, group: int = GROUP
    ) -> None:
        super().__init__()
        self.values = values
        self.group = group
        if _is_int8(values):
            stored, scales = _int8(weight)
        else:
            steps, *both = _int4(weight, group)
            stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)
            scales = torch.stack(both, dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("weight", stored)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``y [..., M]`` bfloat16 for ``x [..., K]`` bfloat16."""
        flat = x.reshape(-1, x.shape[-1])
        if self.values == "int8":
            y: Tensor = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat, self.weight, self.group, self.scales
            )
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def quantize_(model: nn.Module, layers: Iterable[str], values: str) -> None:
    """Replace linear layers by :class:`WeightOnlyLinear`, in place.

    Args:
        model: in bfloat16, on the CPU.
        layers: names of ``nn.Linear`` layers.
        values: one of :data:`WEIGHT_ONLY_VALUES`.
    """
    for name in layers:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, WeightOnlyLinear(layer.weight, layer.bias, values))


def round_(model: nn.Module, layers: Iterable[str], values: str, group: int = GROUP) -> None:
    """Round the weights of linear layers in place; the layers remain ``nn.Linear``.

    Args:
        model: of any dtype and device.
        layers: names of ``nn.Linear`` layers.
        values: one of :data:`WEIGHT_ONLY_VALUES`.
        group: columns of an INT4 weight that share a scale.
    """
    with torch.no_grad():
        for name in layers:
            layer: Any = model.get_submodule(name)
            layer.weight.copy_(round_to_nearest(layer.weight, values, group))


def _is_int8(values: str) -> bool:
    if values not in WEIGHT_ONLY_VALUES:
        raise ValueError(f"values must be one of {', '.join(WEIGHT_ONLY_VALUES)}, got {values!r}")
    return values == "int8"


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Steps ``[M, K]`` int8 and scales ``[M]`` of the weight's dtype."""
    exact = weight.detach().float()
    scales = _scales(exact.abs().amax(dim=1) / 127, weight.dtype)
    steps = (exact / scales.float()[:, None]).round().clamp(-127, 127)
    return steps.to(torch.int8), scales


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps ``[M, K]`` int32 in 0 … 15, scales and zeros ``[M, K / group]``.

    The operator computes ``(step - 8) * scale + zero``.
    """
    if weight.shape[1] % group:
        raise ValueError(f"K must be a multiple of {group}, got {weight.shape[1]}")
    exact = weight.detach().float().view(len(weight), -1, group)
    lowest, highest = exact.aminmax(dim=-1)
    scales = _scales((highest - lowest) / 15, weight.dtype)
    zeros = (lowest + 8 * scales.float()).to(weight.dtype)
    steps = (exact - zeros.float()[..., None]) / scales.float()[..., None] + 8
    return steps.round().clamp(0, 15).to(torch.int32).flatten(1), scales, zeros


def _scales(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of a dtype, none of them zero."""
    return steps.to(dtype).clamp(min=torch.finfo(dtype).tiny)
