"""Grids, the numbers that weights of 8 or fewer bits can hold, and rounding to nearest.

Everything here is done by torch's operators, so that it gives the same values on every device.

A number of a grid is a step, such as an integer from -7 to 7, times a scale. Every row has a scale
of its own, or one for each group of columns. The scale is the largest magnitude of the row or group
divided by the largest step. So it can be computed from the rounded weight, and rounding a weight
again changes nothing: a pruned model needs no scales beside its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Fractions of the largest magnitude that :meth:`Grid.fit` tries as the end of a grid. Where a few
weights are much larger than the others, the others gain more by smaller steps than these lose."""


# Rows are quantised in parts of this many elements, which bounds the float32 copies.
_PART_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Grid:
    """A type of values, and how their scales are chosen.

    Attributes:
        bits: of a value.
        largest: the largest step.
        group: neighbouring columns of a row that share a scale, from column 0 on (the last group
            may be shorter); None for the whole row.
        scale_dtype: of the scales.
        is_float: steps are the numbers of float8_e4m3fn up to ``largest``; otherwise integers.
        has_zero_point: steps are any ``2 * largest + 2`` neighbouring integers with 0 among them;
            otherwise they are symmetric.
    """

    bits: int
    largest: float
    group: int | None = None
    scale_dtype: torch.dtype = torch.float32
    is_float: bool = False
    has_zero_point: bool = False

    @property
    def scale_bits(self) -> int:
        """Bits that are stored for each scale and zero point."""
        return self.scale_dtype.itemsize * 8 + (self.bits if self.has_zero_point else 0)

    def fit(self, columns: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Scaled:
        """Choose the scales of one group of columns.

        Args:
            columns: ``[G, ...]`` float32 or float64, the columns of a group; there is a scale for
                each of their elements.
            dtype: in which the rounded weight will be stored. The end of a symmetric grid is a
                number of this dtype, so that the scale can be computed from the stored weight.
            importance: ``[G]`` positive factors of the squared errors of the columns ``[G, M]``. If
                given, the end of each grid is the fraction of the largest magnitude, of those in
                :data:`SHRINK`, that minimises their sum; otherwise it is the largest magnitude.
        """
        lowest, highest = columns.amin(dim=0).clamp_(max=0), columns.amax(dim=0).clamp_(min=0)
        if importance is None:
            return self._between(lowest, highest, dtype)
        fraction, least = torch.ones_like(lowest), torch.full_like(lowest, torch.inf)
        for candidate in SHRINK:
            scaled = self._between(lowest * candidate, highest * candidate, dtype)
            error = importance @ (columns - scaled.round(columns)).square_()
            better = error < least
            least = torch.where(better, error, least)
            fraction.masked_fill_(better, candidate)
        return self._between(lowest * fraction, highest * fraction, dtype)

    def round(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Round each weight to the nearest number of the grid of its row or group.

        Args:
            weight: ``[M, K]`` float32 or float64; not changed.
            dtype: in which the rounded weight will be stored.

        Returns:
            ``[M, K]`` of the dtype of ``weight``, to be converted to ``dtype``. NaN where a scale
            overflows, and in the groups of weights that are not finite.
        """
        groups = self.groups(weight)
        return self.ungrouped(self.fit(groups, dtype).round(groups), weight.shape[1])

    def groups(self, weight: Tensor) -> Tensor:
        """Return the groups of columns of a weight as :meth:`fit` takes them.

        Args:
            weight: ``[M, K]``.

        Returns:
            ``[columns of a group, groups, M]``; the last group is padded with zeros.
        """
        rows, cols = weight.shape
        size = self.group or max(cols, 1)
        padded = torch.nn.functional.pad(weight, (0, -cols % size))
        return padded.view(rows, -(-cols // size), size).permute(2, 1, 0)

    def ungrouped(self, groups: Tensor, columns: int) -> Tensor:
        """Return the ``[M, columns]`` weight of which :meth:`groups` returned ``groups``."""
        return groups.permute(2, 1, 0).flatten(1)[:, :columns]

    def _between(self, lowest: Tensor, highest: Tensor, dtype: torch.dtype) -> Scaled:
        """Return the grid from ``lowest``, at most 0, to ``highest``, at least 0."""
        if self.has_zero_point:
            steps = 2 * self.largest + 1
            scale = self._stored((highest - lowest) / steps, lowest.dtype)
            low = (lowest / scale).round()
            return Scaled(self, scale, low, low + steps)
        end = torch.maximum(-lowest, highest).to(dtype).float()
        scale = self._stored(end / self.largest, lowest.dtype)
        return Scaled(self, scale, -self.largest, self.largest)

    def _stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Round scales to the dtype they are stored in; that of a group of zeros is 1."""
        # Packed weights store normal numbers only; of grids that none stores any will do.
        least = 2.0**-24 if self.has_zero_point else torch.finfo(self.scale_dtype).tiny
        rounded = scale.to(self.scale_dtype).to(dtype).clamp(min=least)
        return rounded.masked_fill_(scale == 0, 1.0)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A grid with the scales of one group of columns.

    Attributes:
        grid: the type of the values.
        scale: positive, one for each element of a column.
        low: the smallest step; a tensor if it differs between scales.
        high: the largest step, likewise.
    """

    grid: Grid
    scale: Tensor
    low: Tensor | float
    high: Tensor | float

    def steps(self, values: Tensor) -> Tensor:
        """Return the steps nearest to one or more columns, in their dtype; of two, the even one."""
        steps = (values / self.scale).clamp_(self.low, self.high)  # type: ignore[arg-type]
        if self.grid.is_float:
            return steps.to(torch.float8_e4m3fn).to(values.dtype)
        return steps.round_()

    def round(self, values: Tensor) -> Tensor:
        """Return the numbers of the grid nearest to one or more columns."""
        return self.steps(values).mul_(self.scale)


GROUP = 128
"""Columns that share a scale, where a row has more than one."""

GRIDS: dict[str, Grid] = {
    "int8": Grid(8, 127),
    "fp8_e4m3": Grid(8, 448, is_float=True),
    "int4": Grid(4, 7, GROUP, torch.float16),
    "int4_asymmetric": Grid(4, 7, GROUP, torch.float16, has_zero_point=True),
    "int3": Grid(3, 3, GROUP, torch.float16, has_zero_point=True),
    "int2": Grid(2, 1, GROUP, torch.float16, has_zero_point=True),
}
"""The grids by the name that :func:`flash_llm.prune_` takes. Packed weights store the steps and
scales of those without a zero point (:data:`flash_llm.ops.STORED_VALUES`), and of the others, which
are what other libraries store for dense weights, 16-bit numbers."""


def grid_of(values: str) -> Grid:
    """Return the grid of a type of values.

    Raises:
        ValueError: there is no such type.
    """
    if values not in GRIDS:
        raise ValueError(f"values must be one of {', '.join(GRIDS)}, got {values!r}")
    return GRIDS[values]


def check_weight(weight: Tensor) -> None:
    """Check that a weight is a floating point matrix.

    Raises:
        TypeError: the weight is not floating point.
        ValueError: the weight is not a matrix.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be a [M, K] matrix, got shape {list(weight.shape)}")


def round_to_grid(weight: Tensor, values: str) -> Tensor:
    """Round each weight to the nearest number of the grid of its row or group.

    Args:
        weight: ``[M, K]`` finite floating point, any device and strides; not changed.
        values: one of :data:`GRIDS`.

    Returns:
        ``[M, K]``, contiguous, of the weight's dtype. Zeros stay zeros. Rounding the result again
        gives the same numbers, except on a grid with a zero point. NaN where a scale overflows.

    Raises:
        TypeError: the weight is not floating point.
        ValueError: the weight is not a finite matrix, or ``values`` is unknown.

    Example:
        >>> round_to_grid(torch.tensor([[127.0, 0.6, -3.4]]), "int8")
        tensor([[127.,   1.,  -3.]])
    """
    grid = grid_of(values)
    check_weight(weight)
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite")
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return grid.round(exact, weight.dtype).to(weight.dtype).contiguous()


def scales_shape(m: int, k: int, values: str) -> tuple[int, ...]:
    """Shape of the scales of an ``[m, k]`` weight.

    Args:
        m: rows.
        k: columns.
        values: one of :data:`GRIDS`.
    """
    group = grid_of(values).group
    return (m,) if group is None else (m, -(-k // group))


def check_parts(values: str, columns: int, part: int) -> None:
    """Check that no part of a weight's columns begins within a group that shares scales.

    Args:
        values: one of :data:`GRIDS`.
        columns: of the whole weight.
        part: columns of every part; only the last one may have fewer.

    Raises:
        ValueError: a part does.
    """
    group = grid_of(values).group
    if group is not None and part < columns and part % group:
        raise ValueError(
            f"parts of {part} of the {columns} columns cut the groups of {group} columns in which "
            f"{values} values share a scale; take fewer processes or other values"
        )


def stored_dtype(values: str) -> torch.dtype:
    """Dtype of the tensor of values that :func:`round_to_values` returns.

    Args:
        values: one of :data:`GRIDS` without a zero point.
    """
    return torch.float8_e4m3fn if grid_of(values).is_float else torch.int8


def round_to_values(weight: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """Round a weight to values of few bits: each element is nearly a value times its scale.

    A scale is the largest magnitude of its row or group divided by the largest value, so no value
    is clipped, but at least the smallest normal number of the type that stores it. The scale of
    zeros alone is 1. Ties are rounded to even.

    Args:
        weight: ``[M, K]`` floating point, on any device; its elements are rounded to float32 first.
        values: one of :data:`GRIDS` without a zero point.

    Returns:
        Values ``[M, K]``, float8_e4m3fn for ``"fp8_e4m3"`` and otherwise int8, and scales, float32,
        of shape :func:`scales_shape`.

    Raises:
        TypeError: the weight is not floating point.
        ValueError: the weight is not a matrix, ``values`` is unknown, or an element is NaN or
            infinite in float32, or so large that its scale is infinite.
    """
    check_weight(weight)
    grid, (m, k) = grid_of(values), weight.shape
    stored = stored_dtype(values)
    rounded = torch.empty(m, k, dtype=stored, device=weight.device)
    scales = torch.ones(scales_shape(m, k, values), dtype=torch.float32, device=weight.device)
    rows = max(1, _PART_ELEMENTS // max(k, 1))
    for first in range(0, m if k else 0, rows):
        part = slice(first, first + rows)
        groups = grid.groups(weight[part].float())
        scaled = grid.fit(groups, weight.dtype)
        of_rows = scaled.scale.t()
        finite = groups.isfinite().all(dim=0).t() & of_rows.isfinite()
        if not bool(finite.all()):
            row = first + int((~finite.all(dim=1)).int().argmax())
            raise ValueError(
                f"flash_llm: row {row} of the weight has an element that is NaN, infinite or too "
                f"large, which {values} values cannot hold"
            )
        scales[part] = of_rows.reshape(scales[part].shape)
        # Adding 0 makes 0 of -0.
        steps = scaled.steps(groups) + 0.0
        rounded[part] = grid.ungrouped(steps, k).to(stored)
    return rounded, scales


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`round_to_values` of ``"int8"``."""
    return round_to_values(weight, "int8")


def scales_of_elements(scales: Tensor, columns: int) -> Tensor:
    """Return the scale of each element of a weight.

    Args:
        scales: ``[M]``, or ``[M, G]`` with one for each group of :data:`GROUP` columns.
        columns: K.

    Returns:
        ``[M, K]`` of the dtype of ``scales``.
    """
    if scales.dim() == 1:
        return scales[:, None].expand(-1, columns)
    return scales.repeat_interleave(GROUP, dim=1)[:, :columns]


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that quantised values stand for; :func:`flash_llm.unpack` returns the same.

    Args:
        values: ``[M, K]``, int8 or float8_e4m3fn.
        scales: float32, as :func:`round_to_values` returns them.
        dtype: float16 or bfloat16.

    Returns:
        ``[M, K]`` of ``dtype``: each product rounded to float32, then to ``dtype``.
    """
    return (values.float() * scales_of_elements(scales, values.shape[1])).to(dtype)
