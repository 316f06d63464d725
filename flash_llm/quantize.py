"""Quantised values of a weight: which there are, and rounding to nearest.

Everything here is done by torch's operators, so that it gives the same values on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are quantised in parts of this many elements, which bounds the float32 copies.
_PART_ELEMENTS = 1 << 24


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a weight to int8: ``weight ~ values * scales[:, None]``.

    A row's scale is its largest magnitude divided by 127, so no value is clipped, but at least the
    smallest normal float32. A row of zeros has scale 1. Ties are rounded to even.

    Args:
        weight: ``[M, K]`` float16, bfloat16 or float32, on any device.

    Returns:
        Values, int8 ``[M, K]`` in -127 ... 127, and scales, float32 ``[M]``.

    Raises:
        ValueError: the weight is not two-dimensional, or an element is NaN or infinite.
    """
    if weight.dim() != 2:
        raise ValueError(
            f"flash_llm: weight must be two-dimensional [M, K], got {weight.dim()} dimensions"
        )
    m, k = weight.shape
    values = torch.empty(m, k, dtype=torch.int8, device=weight.device)
    scales = torch.ones(m, dtype=torch.float32, device=weight.device)
    if k == 0:
        return values, scales
    rows = max(1, _PART_ELEMENTS // k)
    for first in range(0, m, rows):
        part = weight[first : first + rows].float()
        largest = part.abs().amax(dim=1)
        if not bool(largest.isfinite().all()):
            row = first + int((~largest.isfinite()).int().argmax())
            raise ValueError(
                f"flash_llm: row {row} of the weight has an element that is NaN or infinite, "
                "which int8 values cannot hold"
            )
        scale = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        scale[largest == 0] = 1
        scales[first : first + rows] = scale
        values[first : first + rows] = (part / scale[:, None]).round_().clamp_(-127, 127)
    return values, scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that quantised values stand for; :func:`flash_llm.unpack` returns the same.

    Args:
        values: int8 ``[M, K]``.
        scales: float32 ``[M]``.
        dtype: float16 or bfloat16.

    Returns:
        ``[M, K]`` of ``dtype``: each product rounded to float32, then to ``dtype``.
    """
    return (values.float() * scales[:, None]).to(dtype)
