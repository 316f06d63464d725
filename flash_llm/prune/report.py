"""What pruning did to a model: a table, or JSON to keep beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


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
        method: pruning method.
        scope: group within which the sparsity holds.
        allocation: how the target was shared out among the layers, as it was asked for.
        layers: every pruned layer, in model order.
        num_samples: calibration samples.
        seconds: wall-clock time.
    """

    method: str
    scope: str
    allocation: str | dict[str, float]
    layers: tuple[PrunedLayer, ...]
    num_samples: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the weights of all pruned layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(s * layer.sparsity for s, layer in zip(sizes, self.layers, strict=True))
        return zeros / max(sum(sizes), 1)

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps({**asdict(self), "sparsity": self.sparsity})

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
        lines.append(
            f"{len(self.layers)} layers pruned by {self.method} to sparsity {self.sparsity:.4f} "
            f"({self.num_samples} calibration samples) in {self.seconds:.1f} s"
        )
        return "\n".join(lines)
