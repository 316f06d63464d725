"""Recipe and report of pruning: a table, or a JSON file beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flash_llm.report_base import SavedReport
from flash_llm.table import aligned, grouped, kind, shape_text, span


@dataclass(frozen=True)
class PruneRecipe:
    """The arguments of :func:`flash_llm.prune_`, by their names.

    Attributes:
        method: pruning method.
        sparsity: target fraction of zeros; None if scope or allocation gives it.
        scope: group within which the sparsity holds.
        allocation: how the target is distributed over the layers.
        nsamples: largest number of calibration samples.
        seqlen: largest number of tokens of a sample.
        seed: for drawing the samples.
        damping: fraction of the mean diagonal added to the Hessian.
        preserve_mask: whether zeros stay zeros.
        targets: patterns of the layers to prune.
        ignore: patterns of the layers to leave alone.
        calibration: name of the calibration file; None if the text was in memory or not needed.
        values: type of the values that stay; None if they are not rounded.
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
    values: str | None = None


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did to one layer.

    Attributes:
        name: qualified module name.
        shape: ``(M, K)`` = (out_features, in_features).
        sparsity: fraction of zeros in the pruned weight.
        num_tokens: calibration tokens that reached the layer; 0 if the method needs none, or if no
            token reached the layer (an expert that was never chosen) and magnitude was used.
        sequential: True if the statistics are of the outputs of already pruned blocks.
        error: ``|W X - W' X| / |W X|`` over the calibration tokens X, the relative change of the
            layer's outputs; None for methods that do not compute it (magnitude, Wanda).
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    num_tokens: int
    sequential: bool
    error: float | None = None


@dataclass(frozen=True)
class PruneReport(SavedReport):
    """What :func:`flash_llm.prune_` did; ``print`` it for a table.

    ``save`` writes it, with the recipe in it, to ``prune_report.json`` beside a saved model.

    Attributes:
        recipe: the arguments.
        layers: every pruned layer, in model order.
        num_samples: calibration samples.
        num_tokens: tokens of all of them.
        seconds: wall-clock time; of a resumed run, the time since it was resumed.
    """

    recipe: PruneRecipe
    layers: tuple[PrunedLayer, ...]
    num_samples: int
    num_tokens: int
    seconds: float

    FILE_NAME: ClassVar[str] = "prune_report.json"
    IN_JSON: ClassVar[tuple[str, ...]] = ("sparsity",)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the weights of all pruned layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(s * layer.sparsity for s, layer in zip(sizes, self.layers, strict=True))
        return zeros / max(sum(sizes), 1)

    def summary(self) -> str:
        """Return the table of ``print``; layers whose names differ only in indices share a line."""
        table = [("layers", "number", "shape", "sparsity", "error")]
        groups = grouped(self.layers, lambda layer: (kind(layer.name), layer.shape))
        for (name, shape), layers in groups.items():
            sparsities = span(layer.sparsity for layer in layers)
            errors = span(layer.error for layer in layers)
            table.append((name, str(len(layers)), shape_text(shape), sparsities, errors))
        return "\n".join([*aligned(table, left={0, 2}), self._totals()])

    def __str__(self) -> str:
        table = [("layer", "shape", "sparsity", "tokens", "inputs", "error")]
        for layer in self.layers:
            inputs = "pruned" if layer.sequential else "one pass"
            table.append(
                (
                    layer.name,
                    shape_text(layer.shape),
                    f"{layer.sparsity:.4f}",
                    str(layer.num_tokens),
                    "-" if layer.num_tokens == 0 else inputs,
                    span([layer.error]),
                )
            )
        return "\n".join([*aligned(table, left={0, 1, 4}), self._totals()])

    def _totals(self) -> str:
        values = f" and {self.recipe.values} values" if self.recipe.values else ""
        return (
            f"{len(self.layers)} layers pruned by {self.recipe.method} to sparsity "
            f"{self.sparsity:.4f}{values} ({self.num_samples} calibration samples) in "
            f"{self.seconds:.1f} s"
        )
