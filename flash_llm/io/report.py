"""The contents of a checkpoint and how it was pruned: what ``flash-llm report`` shows."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

from flash_llm.io.checkpoint import Checkpoint, checkpoint_files
from flash_llm.io.convert import inspect_checkpoint
from flash_llm.prune.report import PruneReport
from flash_llm.report_base import Report
from flash_llm.sparsify import SparsifyReport


@dataclasses.dataclass(frozen=True)
class CheckpointReport(Report):
    """Sizes, formats and sparsities of a checkpoint, and the report of its pruning.

    Attributes:
        folder: of the checkpoint.
        num_files: number of safetensors files.
        nbytes: bytes of all tensors.
        formats: number of weights by the name of the packed format, or ``"dense"``.
        weights: a row for each weight, as in :func:`flash_llm.inspect_checkpoint`.
        pruning: the report that ``flash-llm prune`` saved beside the model; None without one.
    """

    folder: str
    num_files: int
    nbytes: int
    formats: dict[str, int]
    weights: SparsifyReport
    pruning: PruneReport | None

    def __str__(self) -> str:
        return self._text(str(self.weights), str(self.pruning))

    def summary(self) -> str:
        """Return the same text; layers whose names differ only in indices share a line."""
        return self._text(self.weights.summary(), self.pruning.summary() if self.pruning else "")

    def _text(self, weights: str, pruning: str) -> str:
        counts = ", ".join(f"{count} {format}" for format, count in self.formats.items())
        parts = [
            f"{self.folder}: {self.nbytes / 1e6:.3f} MB in {self.num_files} files; "
            f"weights: {counts or 'none'}",
            weights,
        ]
        if self.pruning is None:
            parts.append("There is no report of its pruning.")
        else:
            parts.append(pruning)
        return "\n\n".join(parts)


def total_line(folder: str | os.PathLike[str]) -> str:
    """Return one line with the number and bytes of all tensors of a checkpoint.

    Args:
        folder: packed or dense.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: a file is broken.
    """
    checkpoint = Checkpoint(checkpoint_files(folder))
    return (
        f"{folder}: {len(checkpoint.tensors)} tensors, {checkpoint.nbytes / 1e6:.3f} MB in "
        f"{len(checkpoint.files)} files"
    )


def report_checkpoint(folder: str | os.PathLike[str]) -> CheckpointReport:
    """Return the contents of a safetensors folder, and the report of its pruning if there is one.

    Args:
        folder: packed or dense.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: a file, or the report of the pruning, is broken.
    """
    folder = Path(folder)
    files = checkpoint_files(folder)
    weights = inspect_checkpoint(folder)
    formats = Counter(
        str(row.format) if row.decision == "packed" else "dense" for row in weights.rows
    )
    pruned = (folder / PruneReport.FILE_NAME).is_file()
    return CheckpointReport(
        folder=str(folder),
        num_files=len(files),
        nbytes=Checkpoint(files).nbytes,
        formats=dict(formats),
        weights=weights,
        pruning=PruneReport.load(folder) if pruned else None,
    )
