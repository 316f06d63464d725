"""Compare a checkpoint, packed or dense, with the dense checkpoint that it was made from."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flash_llm.io.checkpoint import DTYPES, checkpoint_files
from flash_llm.io.dense_view import DenseView, is_conv1d_model, is_conv1d_name
from flash_llm.report_base import Report
from flash_llm.table import aligned, grouped, kind, natural, shape_text, span

# Number of elements that are compared at a time, in float64.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class TensorError:
    """Difference between a tensor and its reference.

    Attributes:
        name: of the tensor; for a packed layer, the name of its dense weight.
        shape: of the dense tensor.
        packed: whether the tensor is stored packed.
        sparsity: fraction of zeros in [0, 1].
        reference_sparsity: fraction of zeros in the reference.
        relative_error: Frobenius norm of the difference divided by that of the reference. Infinite
            if only the reference is zero, if one element is NaN or infinite and the other is not
            the same, and if the dtypes differ, except for a cast of floating-point values to fewer
            bits, such as by ``dtype=`` of a conversion. NaN equals NaN. Never 0 if an element
            differs.
        max_abs_error: largest absolute difference of two elements.
        dtype: as safetensors spells it.
        reference_dtype: dtype of the reference.
    """

    name: str
    shape: tuple[int, ...]
    packed: bool
    sparsity: float
    reference_sparsity: float
    relative_error: float
    max_abs_error: float
    dtype: str
    reference_dtype: str

    @property
    def equal(self) -> bool:
        """Whether values and dtypes are equal."""
        return self.relative_error == 0 and self.dtype == self.reference_dtype

    @property
    def dtype_text(self) -> str:
        """The dtype, and that of the reference if it differs."""
        same = self.dtype == self.reference_dtype
        return self.dtype if same else f"{self.dtype}, was {self.reference_dtype}"


@dataclasses.dataclass(frozen=True)
class VerifyReport(Report):
    """One row for each tensor; prints as a table of the tensors that are packed or differ.

    Attributes:
        rows: in the natural order of the names.
    """

    rows: tuple[TensorError, ...]

    IN_JSON: ClassVar[tuple[str, ...]] = ("max_relative_error",)

    @property
    def max_relative_error(self) -> float:
        """The largest relative error of all tensors; 0 without tensors."""
        return max((row.relative_error for row in self.rows), default=0.0)

    def summary(self) -> str:
        """Return the same table; tensors whose names differ only in indices share a line."""
        groups = grouped(
            self._shown(), lambda row: (kind(row.name), row.shape, row.packed, row.dtype_text)
        )
        table = [
            ("tensors", "number", "shape", "stored", "dtype", "zeros", "before", "largest error")
        ]
        for (name, shape, packed, dtype), rows in groups.items():
            table.append(
                (
                    name,
                    str(len(rows)),
                    shape_text(shape),
                    "packed" if packed else "dense",
                    dtype,
                    span(row.sparsity for row in rows),
                    span(row.reference_sparsity for row in rows),
                    f"{max(row.relative_error for row in rows):.2e}",
                )
            )
        return "\n".join([*aligned(table, left={0, 2, 3, 4}), self._totals()])

    def __str__(self) -> str:
        table = [
            ("tensor", "shape", "stored", "dtype", "zeros", "before", "relative error", "largest")
        ]
        for row in self._shown():
            table.append(
                (
                    row.name,
                    shape_text(row.shape),
                    "packed" if row.packed else "dense",
                    row.dtype_text,
                    f"{row.sparsity:.4f}",
                    f"{row.reference_sparsity:.4f}",
                    f"{row.relative_error:.2e}",
                    f"{row.max_abs_error:.2e}",
                )
            )
        return "\n".join([*aligned(table, left={0, 1, 2, 3}), self._totals()])

    def _shown(self) -> list[TensorError]:
        return [row for row in self.rows if row.packed or not row.equal]

    def _totals(self) -> str:
        equal = sum(row.equal for row in self.rows)
        return (
            f"{equal} of {len(self.rows)} tensors are equal; largest relative error "
            f"{self.max_relative_error:.3g}"
        )


def verify_checkpoint(
    folder: str | os.PathLike[str], reference: str | os.PathLike[str]
) -> VerifyReport:
    """Compare every tensor of a folder with the tensor of that name in a reference folder.

    After a conversion nothing may differ; after pruning the errors show how much was removed. Two
    tensors are in memory at a time.

    Args:
        folder: safetensors, packed or dense.
        reference: safetensors, dense, with the same tensors.

    Raises:
        FileNotFoundError: a folder holds no checkpoint.
        ValueError: a file is broken; the folders hold tensors of different names or shapes.
    """
    view, base = (DenseView(checkpoint_files(path)) for path in (folder, reference))
    if base.checkpoint.packed:
        raise ValueError(f"flash_llm.verify_checkpoint: {reference} is packed; it must be dense")
    names, expected = (set(v.names) for v in (view, base))
    for name in sorted(names ^ expected):
        there, absent = (folder, reference) if name in names else (reference, folder)
        raise ValueError(f"flash_llm.verify_checkpoint: {there} has {name}, {absent} has not")
    transposed = _transposed(view, base, Path(folder), Path(reference))
    ordered = sorted(expected, key=natural)
    for name in ordered:  # before memory of the stated size is allocated
        shape = view.shape(name)[::-1] if name in transposed else view.shape(name)
        if shape != base.shape(name):
            raise ValueError(
                f"flash_llm.verify_checkpoint: {name} must have shape {list(base.shape(name))}, "
                f"got {list(shape)}"
            )
    return VerifyReport(tuple(_compare(name, view, base, name in transposed) for name in ordered))


def _transposed(view: DenseView, base: DenseView, *folders: Path) -> set[str]:
    """Return the packed weights of Conv1D layers, which the reference holds as ``[K, M]``."""
    packed = {
        name
        for name in view.names
        if view.is_packed(name) and is_conv1d_name(name.removesuffix(".weight"))
    }
    configs = [known for known in map(is_conv1d_model, folders) if known is not None]
    # Without a configuration, the layers that are not square show whether weights are transposed.
    turned = any(view.shape(name) == base.shape(name)[::-1] != base.shape(name) for name in packed)
    return packed if (any(configs) if configs else turned) else set()


def _compare(name: str, view: DenseView, base: DenseView, transposed: bool) -> TensorError:
    dtype, reference_dtype = view.dtype(name), base.dtype(name)
    tensor, reference = view.tensor(name), base.tensor(name)
    if transposed:
        tensor = tensor.t()
    difference, scale, largest, zeros, reference_zeros = 0.0, 0.0, 0.0, 0, 0
    flat, flat_reference = tensor.reshape(-1), reference.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        here, there = (t[begin : begin + _CHUNK] for t in (flat, flat_reference))
        values, expected = _wide(here), _wide(there)
        zeros += int((values == 0).sum())
        reference_zeros += int((expected == 0).sum())
        changed = (values != expected) & ~(values.isnan() & expected.isnan())
        gap = torch.where(changed, (values - expected).abs(), 0.0)
        gap = gap.nan_to_num(nan=math.inf, posinf=math.inf)
        exact = not here.is_floating_point() and not here.is_complex()
        if exact and here.dtype == there.dtype:
            # Different integers beyond 2^53 may be equal in float64; they differ by at least 1.
            gap = torch.where(_bits(here) != _bits(there), gap.clamp(min=1.0), gap)
        largest = max(largest, float(gap.max()))
        difference = math.hypot(difference, _norm(gap))
        scale = math.hypot(scale, _norm(expected.abs().nan_to_num(nan=0.0, posinf=0.0)))
    if not _comparable(dtype, reference_dtype) or not math.isfinite(difference):
        relative = math.inf
    elif largest == 0:
        relative = 0.0
    else:
        relative = max(difference / scale, sys.float_info.min) if scale else math.inf
    count = max(reference.numel(), 1)
    return TensorError(
        name=name,
        shape=tuple(reference.shape),
        packed=view.is_packed(name),
        sparsity=zeros / count,
        reference_sparsity=reference_zeros / count,
        relative_error=relative,
        max_abs_error=largest,
        dtype=dtype,
        reference_dtype=reference_dtype,
    )


def _comparable(dtype: str, reference: str) -> bool:
    """Whether the dtype is that of the reference, or a floating-point type of fewer bits."""
    kinds = DTYPES[dtype], DTYPES[reference]
    floats = all(kind.is_floating_point for kind in kinds)
    return dtype == reference or (floats and kinds[0].itemsize < kinds[1].itemsize)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _bits(tensor: Tensor) -> Tensor:
    """Return integers of the same bits, because torch cannot compare all of its dtypes."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(signed[tensor.itemsize])


def _norm(values: Tensor) -> float:
    """Return the Euclidean norm, also of values whose squares overflow or vanish in float64."""
    largest = float(values.max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float((values / largest).norm())
