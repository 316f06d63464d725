"""What pruning was asked for and what it did: a table, or a JSON file to keep beside the model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from flash_llm.io.files import from_json, read_json, write_whole
from flash_llm.table import aligned, kind, span

REPORT_NAME = "prune_report.json"
"""The file that :meth:`PruneReport.save` writes."""


@dataclass(frozen=True)
class PruneRecipe:
    """What :func:`flash_llm.prune_` was asked for, under the names of its arguments.

    Attributes:
        method: pruning method.
        sparsity: target fraction of zeros; None where scope or allocation say it.
        scope: group within which the sparsity holds.
        allocation: how the target is shared out among the layers.
        nsamples: calibration samples to use at most.
        seqlen: tokens of a sample at most.
        seed: what the samples were drawn with.
        damping: fraction of the mean diagonal added to the Hessian.
        preserve_mask: whether zeros stay zeros.
        targets: patterns of the layers to prune.
        ignore: patterns of the layers to leave alone.
        calibration: name of the calibration file; None for what was in memory, or where none was
            used.
    """

    method: str
    sparsity: float | None
    scope: str
    allocation: str | dict[str, float]
    nsamples: int | None
    seqlen: int
    seed: int | None
    damping: float
    preserve_mask: bool
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    calibration: str | None = None


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did to one layer.

    Attributes:
        name: qualified module name.
        shape: ``(M, K)`` = (out_features, in_features).
        sparsity: fraction of zeros in the weight afterwards.
        num_tokens: calibration tokens that reached the layer; 0 when the method needs none, or
            when no token came by (an expert that was never chosen) and magnitude had to decide.
        sequential: True when the statistics come from the outputs of already pruned blocks.
        error: ``|W X - W' X| / |W X|`` over the calibration tokens X, the relative change of the
            layer's outputs; None for methods that do not know it (magnitude, Wanda).
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    num_tokens: int
    sequential: bool
    error: float | None = None


@dataclass(frozen=True)
class PruneReport:
    """What :func:`flash_llm.prune_` did; ``print`` it for a table.

    Attributes:
        recipe: what was asked for.
        layers: every pruned layer, in model order.
        num_samples: calibration samples.
        num_tokens: tokens of all of them.
        seconds: wall-clock time; of a run that was resumed, since then.
    """

    recipe: PruneRecipe
    layers: tuple[PrunedLayer, ...]
    num_samples: int
    num_tokens: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the weights of all pruned layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(s * layer.sparsity for s, layer in zip(sizes, self.layers, strict=True))
        return zeros / max(sum(sizes), 1)

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps({**asdict(self), "sparsity": self.sparsity}, indent=2)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``prune_report.json``, with the recipe in it, beside a saved model.

        Args:
            folder: made if it is not there; an earlier report in it is replaced.

        Returns:
            The file.

        Raises:
            OSError: it cannot be written; an earlier one is left as it was.
        """
        return save_report(folder, REPORT_NAME, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PruneReport:
        """Read what :meth:`save` wrote.

        Args:
            folder: of the saved model.

        Raises:
            OSError: there is no report, or it cannot be read.
            ValueError: it is no report of this version.
        """
        path = Path(folder) / REPORT_NAME
        try:
            stored = read_json(path)
            stored.pop("sparsity", None)  # follows from the layers
            report: PruneReport = from_json(cls, stored)
        except ValueError as error:
            raise ValueError(f"{path} is no report of prune_: {error}") from None
        return report

    def summary(self) -> str:
        """The table of ``print`` with one line for all layers that differ in a number only."""
        groups: dict[tuple[str, tuple[int, int]], list[PrunedLayer]] = {}
        for layer in self.layers:
            groups.setdefault((kind(layer.name), layer.shape), []).append(layer)
        table = [("layers", "number", "shape", "sparsity", "error")]
        for (name, (m, k)), layers in groups.items():
            sparsities, errors = (x.sparsity for x in layers), (x.error for x in layers)
            table.append((name, str(len(layers)), f"{m}x{k}", span(sparsities), span(errors)))
        return "\n".join([*aligned(table, left={0, 2}), self._totals()])

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("layer")])
        lines = [f"{'layer':<{width}}  {'shape':>13}  sparsity  tokens  inputs     error"]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            inputs = "-" if layer.num_tokens == 0 else "pruned" if layer.sequential else "one pass"
            lines.append(
                f"{layer.name:<{width}}  {shape:>13}  {layer.sparsity:8.4f}  "
                f"{layer.num_tokens:>6}  {inputs:<8}  "
                + ("-" if layer.error is None else f"{layer.error:.4f}")
            )
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        return (
            f"{len(self.layers)} layers pruned by {self.recipe.method} to sparsity "
            f"{self.sparsity:.4f} ({self.num_samples} calibration samples) in {self.seconds:.1f} s"
        )


def save_report(folder: str | os.PathLike[str], name: str, text: str) -> Path:
    """Write a report whole into a folder, which is made if it is not there; returns the file.

    Raises:
        OSError: it cannot be written; an earlier one is left as it was.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    return path
