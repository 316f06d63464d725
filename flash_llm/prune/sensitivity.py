"""Sensitivity: how much each layer's outputs change when it alone is pruned.

The mask of each layer is computed for several sparsities from its inputs in the dense model, and
the relative change of its outputs on the calibration tokens is measured. No weight of the model
changes. :meth:`SensitivityReport.allocate` distributes a target sparsity over the layers such that
the sum of the squared changes is minimal.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from flash_llm.progress import ProgressBar, track
from flash_llm.prune.allocation import least_error_sparsities
from flash_llm.prune.blocks import (
    Sample,
    Stack,
    calibration_mode,
    find_stacks,
    forward,
    record_calls,
    taking_turns,
)
from flash_llm.prune.criteria import check_prune_target
from flash_llm.prune.inputs import Inputs, collect_inputs, gram
from flash_llm.prune.layers import check_inputs, check_weights, matrix
from flash_llm.prune.methods import METHODS
from flash_llm.prune.reconstruction import relative_error
from flash_llm.prune.samples import Calibration, Tokenizer, samples_for
from flash_llm.report_base import SavedReport
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS, select_layers
from flash_llm.table import aligned, grouped, shape_text

logger = logging.getLogger("flash_llm")

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The sparsities that are measured by default."""


@dataclass(frozen=True)
class LayerSensitivity:
    """How much pruning one layer changes its outputs.

    Attributes:
        name: qualified module name.
        shape: ``(M, K)`` = (out_features, in_features).
        num_tokens: number of calibration tokens that reached the layer.
        errors: for each level, ``|W X - W' X| / |W X|`` over the calibration tokens X; empty if no
            token reached the layer.
    """

    name: str
    shape: tuple[int, int]
    num_tokens: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class SensitivityReport(SavedReport):
    """What :func:`flash_llm.sensitivity` measured; ``print`` it for a table.

    ``save`` writes it to ``sensitivity_report.json``.

    Attributes:
        method: the method that chose the weights to prune.
        levels: the sparsities, increasing.
        layers: every layer, in model order.
        num_samples: calibration samples.
        seconds: wall-clock time.
    """

    method: str
    levels: tuple[float, ...]
    layers: tuple[LayerSensitivity, ...]
    num_samples: int
    seconds: float

    FILE_NAME: ClassVar[str] = "sensitivity_report.json"

    def allocate(self, sparsity: float) -> dict[str, float]:
        """Return the sparsity of each layer for a target sparsity of the whole, at the least error.

        The error is the sum over the layers of the squared relative errors, interpolated between
        the levels (:func:`flash_llm.prune.allocation.least_error_sparsities`). Every sparsity is
        close to the target; a layer that no token reached gets the target itself.

        Args:
            sparsity: target fraction of zeros over all weights, in [0, 1].

        Returns:
            Sparsities in [0, 1] by layer: an ``allocation`` for :func:`flash_llm.prune_`.

        Raises:
            ValueError: ``sparsity`` is outside [0, 1].
        """
        return allocate(self.levels, self.layers, sparsity)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw error against sparsity, a line per kind of layer: the median over the blocks.

        The band around a line is the range. Layers are of a kind that have the last part of their
        names in common.

        Args:
            path: where to write the figure; its ending says the format.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib (extra ``plot``) is not installed.
            ValueError: there is nothing to draw.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError(
                "plots need matplotlib, which is not installed; run: pip install 'flash-llm[plot]'"
            ) from error
        drawn = [layer for layer in self.layers if layer.errors]
        if not drawn:
            raise ValueError("there is nothing to plot: no calibration token reached a layer")
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        axis = figure.subplots()
        for kind, layers in grouped(drawn, lambda layer: layer.name.rpartition(".")[2]).items():
            errors = torch.tensor([layer.errors for layer in layers], dtype=torch.float64)
            (line,) = axis.plot(self.levels, errors.median(dim=0).values, marker="o", label=kind)
            axis.fill_between(
                self.levels,
                errors.amin(dim=0).tolist(),
                errors.amax(dim=0).tolist(),
                color=line.get_color(),
                alpha=0.1,
            )
        axis.set_xlabel("sparsity of the layer")
        axis.set_ylabel("relative change of its outputs (median, range)")
        axis.set_title(f"Sensitivity to pruning by {self.method}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def __str__(self) -> str:
        table = [("layer", "shape", *(f"{level:.3g}" for level in self.levels))]
        for layer in self.layers:
            errors = [f"{error:.4f}" for error in layer.errors] or ["-"] * len(self.levels)
            table.append((layer.name, shape_text(layer.shape), *errors))
        return "\n".join(
            [
                *aligned(table, left={0, 1}),
                f"Relative change of the outputs of {len(self.layers)} layers, each pruned by "
                f"{self.method} to each sparsity ({self.num_samples} calibration samples; - where "
                f"no token reached the layer), in {self.seconds:.1f} s",
            ]
        )


def sensitivity(
    model: nn.Module,
    calibration: Calibration,
    levels: Sequence[float] = LEVELS,
    *,
    method: str = "wanda",
    scope: str = "row",
    tokenizer: Tokenizer | None = None,
    nsamples: int | None = None,
    seqlen: int = 2048,
    seed: int | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    device: torch.device | str | None = None,
    progress: bool | ProgressBar = False,
) -> SensitivityReport:
    """Measure how much each layer's outputs change when it alone is pruned; changes no weight.

    For each layer and level: ``|W X - W' X| / |W X|`` in the Frobenius norm, where X are the inputs
    of the layer in the dense model on the calibration tokens, and W' is the pruned weight.

    Args:
        model: dense; called as ``model(ids)`` with int64 token ids ``[B, L]``.
        calibration: text, as in :func:`flash_llm.prune_`.
        levels: sparsities to measure, in (0, 1), each once.
        method: a method that does not update the weights that stay, such as ``"wanda"`` or
            ``"magnitude"``.
        scope: ``"row"`` or ``"layer"``.
        tokenizer: for files and strings.
        nsamples: number of samples to use; None for all.
        seqlen: tokens per sample.
        seed: for drawing the samples, as in :func:`flash_llm.prune_`.
        targets: patterns of the layers to measure, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers to leave out; wins over ``targets``.
        device: where blocks run, one at a time; None means where the model is.
        progress: True for a tqdm bar, or a callable such as ``rich.progress.track``.

    Returns:
        A :class:`SensitivityReport`, which prints, saves, plots and allocates.

    Raises:
        TypeError: an argument or a sample has the wrong type, or a weight is not floating point.
        ValueError: a level is outside (0, 1) or given twice, or there is none; unknown method or
            scope; calibration missing or empty; a weight or an activation is not finite; a pattern
            matches nothing.
        OSError: the calibration file cannot be read.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=2, max_position_embeddings=64)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> tokens = torch.arange(64).view(2, 32)
        >>> report = sensitivity(model, tokens, levels=(0.5, 0.7), seqlen=32)
        >>> len(report.layers), report.layers[0].errors[0] < report.layers[0].errors[1]
        (14, True)
    """
    known = [name for name, row in METHODS.items() if not row.updates_weights]
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {method!r}")
    if scope not in ("row", "layer"):
        raise ValueError(f'scope must be "row" or "layer", got {scope!r}')
    steps = tuple(sorted(levels))
    for level in steps:
        check_prune_target(level, scope)
    if not steps or len(set(steps)) < len(steps) or steps[0] <= 0 or steps[-1] >= 1:
        raise ValueError(f"levels must be different sparsities in (0, 1), got {list(levels)}")
    layers = select_layers(model, targets, ignore)
    check_weights(model, layers)
    samples = samples_for(model, calibration, tokenizer, nsamples, seqlen, seed)

    start = time.perf_counter()
    with calibration_mode(model):
        found = measure_layers(
            model,
            find_stacks(model, layers, None if device is None else torch.device(device)),
            layers,
            samples,
            steps,
            method,
            scope,
            progress,
        )
    return SensitivityReport(
        method=method,
        levels=steps,
        layers=tuple(found),
        num_samples=len(samples),
        seconds=time.perf_counter() - start,
    )


def measure_layers(
    model: nn.Module,
    stacks: list[Stack],
    layers: dict[str, nn.Module],
    samples: Sequence[Sample],
    levels: Sequence[float],
    method: str = "wanda",
    scope: str = "row",
    progress: bool | ProgressBar = False,
) -> list[LayerSensitivity]:
    """Measure checked layers of a model that is in :func:`calibration_mode`.

    Args:
        model: dense.
        stacks: of the model; their calls are deleted.
        layers: linear layers by name.
        samples: from :func:`flash_llm.prune.samples.samples_for`.
        levels: increasing sparsities.
        method: as in :func:`sensitivity`.
        scope: ``"row"`` or ``"layer"``.
        progress: as in :func:`sensitivity`.

    Returns:
        One entry per layer, in their order.
    """
    found: dict[str, LayerSensitivity] = {}

    def measure(name: str, inputs: Inputs | None) -> None:
        weight = matrix(layers[name])
        errors = []
        if inputs is None:
            logger.warning("flash_llm.sensitivity: no calibration token reached %s", name)
        else:
            check_inputs(name, inputs, weight)
            hessian = inputs.total.to(weight.device)
            for level in levels:
                mask = METHODS[method](weight, inputs, level, scope)
                errors.append(relative_error(weight, weight * mask, hessian))
        found[name] = LayerSensitivity(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            num_tokens=0 if inputs is None else inputs.num_tokens,
            errors=tuple(errors),
        )

    if stacks:
        record_calls(model, stacks, samples, progress)
    blocks = [
        (stack, index) for stack in stacks if stack.chained for index in range(len(stack.blocks))
    ]
    for stack, index in track(blocks, "measuring", progress):
        inside = {n: layer for n, layer in layers.items() if n.startswith(stack.prefix(index))}
        with stack.on_device(index), collect_inputs(inside, gram) as inputs:
            stack.advance(index)  # the last block too: its layers' inputs are collected
            for name in inside:
                measure(name, inputs.pop(name, None))
    rest = {name: layer for name, layer in layers.items() if name not in found}
    if rest:
        with taking_turns(stacks), collect_inputs(rest, gram) as inputs:
            for sample in track(samples, "measuring", progress):
                forward(model, sample)
        for name in rest:
            measure(name, inputs.pop(name, None))
    return [found[name] for name in layers]


def allocate(
    levels: Sequence[float], layers: Sequence[LayerSensitivity], sparsity: float
) -> dict[str, float]:
    """Return the sparsities that :meth:`SensitivityReport.allocate` describes."""
    known = [layer for layer in layers if layer.errors]
    found = least_error_sparsities(
        levels,
        [layer.errors for layer in known],
        [layer.shape[0] * layer.shape[1] for layer in known],
        sparsity,
    )
    shares = dict.fromkeys((layer.name for layer in layers), sparsity)
    shares.update(zip((layer.name for layer in known), found, strict=True))
    return shares
