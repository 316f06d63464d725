"""Compare a checkpoint, packed or dense, with the dense one that it was made from."""

from __future__ import annotations

import dataclasses
import json
import os

from torch import Tensor

from flash_llm.checkpoint import checkpoint_files
from flash_llm.convert import DenseView
from flash_llm.table import aligned, kind, natural, span


@dataclasses.dataclass(frozen=True)
class TensorError:
    """How far a tensor is from its reference.

    Attributes:
        name: of the tensor; a packed layer's goes by the name of its dense weight.
        shape: of the dense tensor.
        packed: whether it is stored packed.
        sparsity: fraction of zeros in [0, 1].
        reference_sparsity: of the reference.
        relative_error: Frobenius norm of the difference over that of the reference; 0 where both
            are zero, infinite where only the reference is.
        max_abs_error: largest difference of two elements.
    """

    name: str
    shape: tuple[int, ...]
    packed: bool
    sparsity: float
    reference_sparsity: float
    relative_error: float
    max_abs_error: float


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """One row for each tensor; prints as a table of those that are packed or differ.

    Attributes:
        rows: in the natural order of the names.
    """

    rows: tuple[TensorError, ...]

    @property
    def max_relative_error(self) -> float:
        """The largest relative error of any tensor; 0 without tensors."""
        return max((row.relative_error for row in self.rows), default=0.0)

    def to_json(self) -> str:
        """Return ``{"rows": [...], "max_relative_error"}`` as indented JSON."""
        return json.dumps(
            {
                "rows": [dataclasses.asdict(row) for row in self.rows],
                "max_relative_error": self.max_relative_error,
            },
            indent=2,
        )

    def summary(self) -> str:
        """The table of ``print`` with one line for all tensors that differ in a number only."""
        groups: dict[tuple[str, tuple[int, ...], bool], list[TensorError]] = {}
        for row in self._shown():
            groups.setdefault((kind(row.name), row.shape, row.packed), []).append(row)
        table = [("tensors", "number", "shape", "stored", "zeros", "before", "largest rel. error")]
        for (name, shape, packed), rows in groups.items():
            table.append(
                (
                    name,
                    str(len(rows)),
                    "x".join(map(str, shape)),
                    "packed" if packed else "dense",
                    span(row.sparsity for row in rows),
                    span(row.reference_sparsity for row in rows),
                    f"{max(row.relative_error for row in rows):.2e}",
                )
            )
        return "\n".join([*aligned(table, left={0, 2, 3}), self._totals()])

    def __str__(self) -> str:
        table = [("tensor", "shape", "stored", "zeros", "before", "relative error", "largest")]
        for row in self._shown():
            table.append(
                (
                    row.name,
                    "x".join(map(str, row.shape)),
                    "packed" if row.packed else "dense",
                    f"{row.sparsity:.4f}",
                    f"{row.reference_sparsity:.4f}",
                    f"{row.relative_error:.2e}",
                    f"{row.max_abs_error:.2e}",
                )
            )
        lines = aligned(table, left={0, 1, 2})
        return "\n".join([*lines, self._totals()])

    def _shown(self) -> list[TensorError]:
        return [row for row in self.rows if row.packed or row.relative_error > 0]

    def _totals(self) -> str:
        equal = len(self.rows) - sum(row.relative_error > 0 for row in self.rows)
        return (
            f"{equal} of {len(self.rows)} tensors are equal; largest relative error "
            f"{self.max_relative_error:.3g}"
        )


def verify_checkpoint(
    folder: str | os.PathLike[str], reference: str | os.PathLike[str]
) -> VerifyReport:
    """Compare every tensor of a folder with that of a reference folder.

    After a conversion nothing may differ; after pruning the errors say how much was taken away.
    Two tensors are in memory at a time.

    Args:
        folder: safetensors, packed or dense.
        reference: safetensors, dense, with the same tensors.

    Raises:
        FileNotFoundError: a folder holds no checkpoint.
        ValueError: a file is broken; the folders do not hold tensors of the same names and shapes.
    """
    view, base = (DenseView(checkpoint_files(path)) for path in (folder, reference))
    if base.checkpoint.packed:
        raise ValueError(f"flash_llm.verify_checkpoint: {reference} is packed; it must be dense")
    names, expected = (set(v.names) for v in (view, base))
    for name in sorted(names ^ expected):
        there, absent = (folder, reference) if name in names else (reference, folder)
        raise ValueError(f"flash_llm.verify_checkpoint: {there} has {name}, {absent} has not")
    return VerifyReport(tuple(_compare(name, view, base) for name in sorted(expected, key=natural)))


def _compare(name: str, view: DenseView, base: DenseView) -> TensorError:
    tensor, reference = view.tensor(name), base.tensor(name)
    if tensor.shape != reference.shape:
        raise ValueError(
            f"flash_llm.verify_checkpoint: {name} must have shape {list(reference.shape)}, got "
            f"{list(tensor.shape)}"
        )
    difference = tensor.double() - reference.double()
    norm, scale = float(difference.norm()), float(reference.double().norm())
    relative = norm / scale if scale else float("inf") if norm else 0.0
    return TensorError(
        name=name,
        shape=tuple(reference.shape),
        packed=name.removesuffix(".weight") in view.checkpoint.packed,
        sparsity=_sparsity(tensor),
        reference_sparsity=_sparsity(reference),
        relative_error=relative,
        max_abs_error=float(difference.abs().max()) if difference.numel() else 0.0,
    )


def _sparsity(tensor: Tensor) -> float:
    return float((tensor == 0).sum()) / max(tensor.numel(), 1)
