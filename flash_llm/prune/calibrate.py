"""Prune a model in place, layer by layer, with statistics of the inputs that each layer sees.

Transformer blocks are pruned in the order in which they run. Each block is calibrated on the
outputs of the pruned blocks before it (as in SparseGPT and Wanda), so that it can compensate for
their errors: the block runs on every sample to collect statistics, its layers are pruned, and it
runs again to compute the inputs of the next block (``blocks.py``).

Layers outside this scheme (a projection outside the stacks, blocks that are called twice or do not
feed one another) are pruned last, on statistics of one pass of the model with all other layers
pruned; the report says which layers those are. The mathematics are in ``criteria.py`` (magnitude,
Wanda), ``sparsegpt.py``, ``admm.py``, ``gptq.py``, ``grids.py`` and ``allocation.py``, the
statistics in ``inputs.py``, and the table of methods in ``methods.py``.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.progress import ProgressBar, remark, track
from flash_llm.prune.allocation import outlier_ratio, owl_sparsities
from flash_llm.prune.blocks import (
    Sample,
    Stack,
    calibration_mode,
    find_stacks,
    forward,
    record_calls,
    taking_turns,
)
from flash_llm.prune.criteria import check_prune_target, global_magnitude_masks
from flash_llm.prune.gptq import gptq
from flash_llm.prune.grids import GRIDS, round_to_grid
from flash_llm.prune.inputs import Inputs, Statistic, collect_inputs, squares
from flash_llm.prune.layers import check_inputs, check_weights, matrix
from flash_llm.prune.methods import METHODS
from flash_llm.prune.reconstruction import SingularHessianError, relative_error
from flash_llm.prune.report import PrunedLayer, PruneRecipe, PruneReport
from flash_llm.prune.resume import ResumeFolder
from flash_llm.prune.samples import Calibration, Tokenizer, count_tokens, samples_for
from flash_llm.prune.sensitivity import LEVELS, allocate, measure_layers
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS, parse_patterns, select_layers

logger = logging.getLogger("flash_llm")

ALLOCATIONS = ("uniform", "owl", "sensitivity")
"""The named allocations; all but the first are measured on the calibration text."""

LARGEST_DAMPING = 1.0
"""Damping is raised tenfold while a Hessian is singular, up to this limit."""

DEFAULT = "_default"
"""Key of an allocation dict for the layers that no pattern matches."""


def prune_(
    model: nn.Module,
    *,
    method: str = "wanda",
    sparsity: float | None = None,
    scope: str = "row",
    allocation: str | Mapping[str, float] = "uniform",
    calibration: Calibration | None = None,
    tokenizer: Tokenizer | None = None,
    nsamples: int | None = None,
    seqlen: int = 2048,
    seed: int | None = None,
    damping: float = 0.01,
    preserve_mask: bool = False,
    values: str | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    device: torch.device | str | None = None,
    resume_dir: str | os.PathLike[str] | None = None,
    progress: bool | ProgressBar = False,
) -> PruneReport:
    """Set the least important weights of a model to zero, in place; the weights stay dense.

    Pack the result with :func:`flash_llm.sparsify_`, and store the report beside the saved model
    with :meth:`flash_llm.PruneReport.save`. The arguments are checked before any weight changes; a
    failure after that (out of memory, say) leaves the layers pruned that were finished by then.

    Args:
        model: called as ``model(ids)`` with int64 token ids ``[B, L]``. Weights of any floating
            point dtype; the forward passes run in it, the mathematics of pruning in float32.
        method: ``"magnitude"`` (``|W|``), ``"wanda"`` (``|W| * ||x||``, arXiv 2306.11695),
            ``"sparsegpt"`` (arXiv 2301.00774) or ``"admm"`` (ALPS, arXiv 2406.07831), from the
            fastest to the slowest. The last two also update the weights that stay; they need a
            ``[K, K]`` float32 matrix for each distinct input of a block.
        sparsity: fraction of zeros in [0, 1]; optional for an N:M scope, and for an allocation that
            gives the sparsity of every layer.
        scope: ``"row"`` (the fraction holds in every output row), ``"layer"``, ``"N:M"``, or, for
            magnitude, ``"global"`` (one threshold for all targeted layers).
        allocation: ``"uniform"``; ``"owl"`` (blocks with more outliers are pruned less, by up to
            0.08 of sparsity, and the mean over all weights is ``sparsity``; arXiv 2310.05175);
            ``"sensitivity"`` (layers whose outputs change more are pruned less, as
            :func:`flash_llm.sensitivity` measures it with Wanda and its report allocates); or a
            dict from patterns, as in ``targets``, to sparsities: the first pattern that matches a
            layer counts, ``"_default"`` (or ``sparsity``) is for layers that no pattern matches.
        calibration: text that the model should stay good at: the name of a ``.txt`` or ``.jsonl``
            file (objects with a ``"text"``), token ids ``[S, L]`` (each row is a sample), what a
            tokenizer returns (``"input_ids"`` and perhaps ``"attention_mask"``), or an iterable,
            such as a list or a DataLoader, of strings, of token tensors ``[L]`` or ``[B, L]``, or
            of dicts as a tokenizer returns them; for encoder-decoders and models of pictures or
            sound, dicts of the model's arguments (:func:`flash_llm.prune.samples.samples_for`).
            128 samples are customary. Magnitude needs none and ignores it, unless the allocation is
            measured.
        tokenizer: a Hugging Face tokenizer, or ``f(text) -> {"input_ids": [...]}``; for files and
            strings.
        nsamples: number of samples to use; None for all.
        seqlen: tokens per sample. Longer sequences are truncated; shorter sequences in memory are
            used as they are, with a warning; files are cut into samples of exactly this length.
        seed: a number draws the samples at random from all, without replacement. None takes the
            first ``nsamples`` of an iterable and reads no further, and of a file ``nsamples`` that
            are spread evenly over it. Nothing else is random.
        damping: fraction of the Hessian's mean diagonal that is added to its diagonal (SparseGPT
            and ADMM). While rounding still leaves the Hessian of a layer singular, its damping is
            raised tenfold, up to 1, with a warning that names the layer; 0 is never raised.
        preserve_mask: weights that are already zero stay zero (SparseGPT and ADMM; the other
            methods prune zeros first anyway).
        values: round the weights that stay to ``"int8"`` or ``"fp8_e4m3"`` (a scale for each row)
            or ``"int4"`` (a scale for each row and 128 columns); the model keeps its dtype, and
            zeros may become more. SparseGPT and ADMM round one column after another and let the
            later columns compensate, so that a sparsity of 0 is GPTQ (arXiv 2210.17323); the other
            methods round to nearest. ``"int4_asymmetric"``, ``"int3"`` and ``"int2"`` (a scale and
            a zero point for each row and 128 columns) are for comparison only. None rounds nothing.
        targets: patterns of the layers to prune, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers to leave alone; wins over ``targets``.
        device: where blocks run and are pruned, one at a time; everything else stays on the
            model's device. None means the model's device for blocks, too.
        resume_dir: folder for the layers that are finished. After an interruption, call again with
            the same arguments and the dense model: pruning continues with the first unfinished
            layer and gives the same bits. The folder takes as many bytes as the pruned layers, and
            can be removed once the model is saved. Scope ``"global"``, which needs no inputs,
            starts over.
        progress: True for a tqdm bar over the samples of the first pass, and then one over the
            blocks with the last layer's name, sparsity and error, or a callable such as
            ``rich.progress.track``.

    Returns:
        A :class:`flash_llm.PruneReport`, one entry per pruned layer.

    Raises:
        TypeError: an argument or a sample has the wrong type, or a targeted weight is not floating
            point.
        ValueError: unknown method, allocation or values; invalid sparsity, scope or damping, or a
            scope and an allocation that contradict one another; calibration missing or empty, or a
            file of fewer than ``seqlen`` tokens; a token id outside the vocabulary; a pattern that
            matches nothing; a targeted weight that is not finite, on the meta device or tied to
            another module; calibration activations that are not finite; a Hessian that damping
            leaves singular, or new weights that overflow the dtype of the old or the scales of
            ``values`` (the message names the layer); a ``resume_dir`` of another run (the message
            names the difference).
        OSError: the calibration file cannot be read, or ``resume_dir`` cannot be written.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=2, max_position_embeddings=64)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> tokens = torch.arange(64).view(2, 32)
        >>> report = prune_(model, sparsity=0.75, calibration=tokens, seqlen=32)
        >>> len(report.layers), report.sparsity
        (14, 0.75)
    """
    recipe = make_recipe(
        method=method,
        sparsity=sparsity,
        scope=scope,
        allocation=allocation,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        damping=damping,
        preserve_mask=preserve_mask,
        values=values,
        targets=targets,
        ignore=ignore,
        calibration=calibration,
    )
    layers = select_layers(model, targets, ignore)
    sparsities = layer_sparsities(model, layers, sparsity, scope, allocation)
    check_weights(model, layers)
    samples: list[Sample] = []
    measured = isinstance(allocation, str) and allocation != "uniform"
    if needs_calibration(recipe):
        samples = samples_for(model, calibration, tokenizer, nsamples, seqlen, seed)

    start = time.perf_counter()
    done = None
    if resume_dir is not None:
        done = ResumeFolder(Path(resume_dir), model, layers, recipe, samples)
    with calibration_mode(model):
        stacks = find_stacks(model, layers, None if device is None else torch.device(device))
        if measured:

            def measure() -> dict[str, float | None]:
                assert sparsity is not None  # checked by layer_sparsities
                if allocation == "owl":
                    return _owl_sparsities(model, stacks, layers, samples, sparsity, progress)
                found = measure_layers(
                    model, stacks, layers, samples, LEVELS, "wanda", scope, progress
                )
                return {**allocate(LEVELS, found, sparsity)}

            sparsities = measure() if done is None else done.allocation(measure)
        pruner = _Pruner(model, layers, sparsities, recipe, done)
        if scope == "global":
            assert sparsity is not None
            pruner.prune_globally(sparsity, progress)
        elif METHODS[method].statistic is None:
            for name in track(list(layers), "pruning", progress):
                pruner.prune(name, None, sequential=False)
        else:
            pruner.prune_calibrated(stacks, samples, progress)
    return PruneReport(
        recipe=recipe,
        layers=tuple(pruner.entries[name] for name in layers),
        num_samples=len(samples),
        num_tokens=count_tokens(samples),
        seconds=time.perf_counter() - start,
    )


def make_recipe(**arguments: Any) -> PruneRecipe:
    """Check the arguments of :func:`prune_` that can be checked without the model.

    Args:
        arguments: of :func:`prune_` other than the model; the others have its defaults.

    Returns:
        The checked arguments.

    Raises:
        TypeError: as :func:`prune_`, or it has no argument of that name.
        ValueError: as :func:`prune_`.
    """
    bound = inspect.signature(prune_).bind(None, **arguments)
    bound.apply_defaults()
    found = {field.name: bound.arguments[field.name] for field in fields(PruneRecipe)}
    method, allocation, damping = found["method"], found["allocation"], found["damping"]
    if method not in METHODS:
        raise ValueError(
            f"flash_llm.prune_: method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    if found["values"] is not None and found["values"] not in GRIDS:
        raise ValueError(
            f"flash_llm.prune_: values must be one of {', '.join(GRIDS)} or None, got "
            f"{found['values']!r}"
        )
    _check_allocation(method, found["scope"], allocation)
    if not 0.0 <= damping < math.inf:
        raise ValueError(f"flash_llm.prune_: damping must be finite and at least 0, got {damping}")
    found["allocation"] = allocation if isinstance(allocation, str) else dict(allocation)
    for name in ("targets", "ignore"):
        found[name] = parse_patterns(name, found[name])
    calibration, found["calibration"] = found["calibration"], None
    recipe = PruneRecipe(**found)
    if needs_calibration(recipe) and isinstance(calibration, (str, os.PathLike)):
        return replace(recipe, calibration=str(calibration))
    return recipe


def needs_calibration(recipe: PruneRecipe) -> bool:
    """Whether the method or the allocation depends on the inputs of the layers."""
    measured = isinstance(recipe.allocation, str) and recipe.allocation != "uniform"
    return measured or METHODS[recipe.method].statistic is not None


def _check_allocation(method: str, scope: str, allocation: str | Mapping[str, float]) -> None:
    if isinstance(allocation, str):
        if allocation not in ALLOCATIONS:
            raise ValueError(
                f"flash_llm.prune_: allocation must be one of {', '.join(ALLOCATIONS)} or a dict "
                f"from patterns to sparsities, got {allocation!r}"
            )
    elif not isinstance(allocation, Mapping):
        raise TypeError(
            "flash_llm.prune_: allocation must be a string or a dict, got "
            f"{type(allocation).__name__}"
        )
    if scope == "global" and method != "magnitude":
        raise ValueError(f'flash_llm.prune_: scope "global" is for magnitude, got method {method}')
    if allocation != "uniform" and (scope == "global" or ":" in scope):
        raise ValueError(
            f'flash_llm.prune_: scope "{scope}" decides the sparsity of each layer; allocation '
            f"must be uniform, got {allocation!r}"
        )


def layer_sparsities(
    model: nn.Module,
    layers: dict[str, nn.Module],
    sparsity: float | None,
    scope: str,
    allocation: str | Mapping[str, float],
) -> dict[str, float | None]:
    """Return the checked target of each layer; for a measured allocation, the uniform target.

    Raises:
        ValueError: as :func:`prune_`.
    """
    scope = "layer" if scope == "global" else scope
    if isinstance(allocation, str):
        check_prune_target(sparsity, scope)
        return dict.fromkeys(layers, sparsity)
    if DEFAULT in allocation and sparsity is not None:
        raise ValueError(
            f'flash_llm.prune_: sparsity and allocation["{DEFAULT}"] are the same; give one of them'
        )
    targets: dict[str, float] = {}
    for pattern, target in allocation.items():
        check_prune_target(target, scope)
        if pattern == DEFAULT:
            continue
        matched = set(select_layers(model, pattern, ()).values())
        names = [name for name, layer in layers.items() if layer in matched]
        if not names:
            raise ValueError(
                f'flash_llm.prune_: allocation "{pattern}" matches no layer that is to be pruned'
            )
        for name in names:
            targets.setdefault(name, target)
    default = allocation.get(DEFAULT, sparsity)
    if default is None and len(targets) < len(layers):
        missing = next(name for name in layers if name not in targets)
        raise ValueError(
            f"flash_llm.prune_: no pattern of allocation matches {missing}; give sparsity or "
            f'"{DEFAULT}"'
        )
    if default is not None:
        check_prune_target(default, scope)
    return {name: targets.get(name, default) for name in layers}


def _owl_sparsities(
    model: nn.Module,
    stacks: list[Stack],
    layers: dict[str, nn.Module],
    samples: Sequence[Sample],
    sparsity: float,
    progress: bool | ProgressBar,
) -> dict[str, float | None]:
    """OWL's targets from one pass of the dense model; a layer outside the stacks is a block."""
    with taking_turns(stacks), collect_inputs(layers, squares) as inputs:
        for sample in track(samples, "measuring", progress):
            forward(model, sample, logits_to_keep=1)
    prefixes = [stack.prefix(index) for stack in stacks for index in range(len(stack.blocks))]
    blocks: dict[str, list[str]] = {}
    for name in inputs:
        check_inputs(name, inputs[name], matrix(layers[name]))
        block = next((prefix for prefix in prefixes if name.startswith(prefix)), name)
        blocks.setdefault(block, []).append(name)
    weights = [[matrix(layers[name]) for name in names] for names in blocks.values()]
    norms = [
        [inputs[name].norm.to(weight.device) for name, weight in zip(names, block, strict=True)]
        for names, block in zip(blocks.values(), weights, strict=True)
    ]
    targets = owl_sparsities(
        [outlier_ratio(*pair) for pair in zip(weights, norms, strict=True)],
        [sum(weight.numel() for weight in block) for block in weights],
        sparsity,
    )
    # Nothing is known about the outliers of a layer that no token reached: it gets the mean.
    sparsities: dict[str, float | None] = dict.fromkeys(layers, sparsity)
    for names, target in zip(blocks.values(), targets, strict=True):
        sparsities.update(dict.fromkeys(names, target))
    return sparsities


class _Pruner:
    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        sparsities: dict[str, float | None],
        recipe: PruneRecipe,
        done: ResumeFolder | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.sparsities = sparsities
        self.recipe = recipe
        self.done = done
        self.entries: dict[str, PrunedLayer] = {}

    def prune(self, name: str, inputs: Inputs | None, *, sequential: bool) -> None:
        """Prune one layer, or restore it from the run that is resumed, and record the result."""
        weight = matrix(self.layers[name])
        if self.done is not None and self.done.holds(name):
            self.entries[name] = self.done.restore(name, weight)
            return
        error = None
        method = METHODS[self.recipe.method]
        if inputs is not None:
            check_inputs(name, inputs, weight)
        elif method.statistic is not None:
            logger.warning(
                "flash_llm.prune_: no calibration token reached %s; pruned by magnitude", name
            )
            method = METHODS["magnitude"]
        if method.updates_weights:
            assert inputs is not None
            pruned = self._reconstruct(name, weight, inputs)
            self._refuse_overflow(name, pruned)
            error = relative_error(weight, pruned, inputs.total.to(weight.device))
            weight.copy_(pruned)
        else:
            mask = method(weight, inputs, self.sparsities[name], self.recipe.scope)
            self._apply(name, mask)
        self._note(name, inputs, sequential, error)
        if self.done is not None:
            self.done.keep(self.entries[name], weight)

    def _apply(self, name: str, mask: Tensor) -> None:
        """Mask a weight, and round what stays to nearest."""
        weight = matrix(self.layers[name])
        if self.recipe.values is None:
            weight.masked_fill_(~mask, 0.0)
            return
        rounded = round_to_grid(weight.masked_fill(~mask, 0.0), self.recipe.values)
        self._refuse_overflow(name, rounded)
        weight.copy_(rounded)

    def _refuse_overflow(self, name: str, weight: Tensor) -> None:
        if not bool(weight.isfinite().all()):
            number = self.recipe.values or weight.dtype
            raise ValueError(f"flash_llm.prune_: the new weights of {name} overflow {number}")

    def _reconstruct(self, name: str, weight: Tensor, inputs: Inputs) -> Tensor:
        """Return the new weight; the damping is raised while the Hessian is singular.

        Channels that are large on the same few tokens only (massive activations) are collinear. The
        damping, a fraction of the mean diagonal, may be too small to change their diagonal entries
        in float32.
        """
        damping = self.recipe.damping
        while True:
            try:
                pruned = METHODS[self.recipe.method](
                    weight,
                    inputs,
                    self.sparsities[name],
                    self.recipe.scope,
                    damping=damping,
                    preserve_mask=self.recipe.preserve_mask,
                )
                if self.recipe.values is None:
                    return pruned
                hessian = inputs.total.to(weight.device)
                return gptq(pruned, hessian, self.recipe.values, damping=damping)
            except SingularHessianError as problem:
                if damping == 0 or 10 * damping > LARGEST_DAMPING:
                    raise ValueError(f"flash_llm.prune_: {name}: {problem}") from problem
                damping *= 10
                logger.warning(
                    "flash_llm.prune_: %s: %s; now with a damping of %g", name, problem, damping
                )

    def prune_globally(self, sparsity: float, progress: bool | ProgressBar) -> None:
        """Prune all layers by magnitude, with one threshold for all."""
        weights = [matrix(layer) for layer in self.layers.values()]
        masks = global_magnitude_masks(weights, sparsity)
        for name in track(list(self.layers), "pruning", progress):
            self._apply(name, next(masks))
            self._note(name, None, False, None)

    def _note(
        self, name: str, inputs: Inputs | None, sequential: bool, error: float | None
    ) -> None:
        weight = matrix(self.layers[name])
        self.entries[name] = PrunedLayer(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            sparsity=(weight == 0).sum().item() / max(weight.numel(), 1),
            num_tokens=0 if inputs is None else inputs.num_tokens,
            sequential=sequential,
            error=error,
        )

    def prune_calibrated(
        self, stacks: list[Stack], samples: Sequence[Sample], progress: bool | ProgressBar
    ) -> None:
        """Prune block by block, then the layers outside the blocks."""
        statistic = METHODS[self.recipe.method].statistic
        assert statistic is not None  # prune_ calibrates no other method
        for stack in stacks:
            # Earlier stacks are pruned: a decoder is recorded with the pruned encoder's outputs.
            with taking_turns([other for other in stacks if other is not stack]):
                record_calls(self.model, [stack], samples, progress)
            if not stack.chained:
                continue
            bar = track(range(len(stack.blocks)), "pruning", progress)
            for index in bar:
                names = self._prune_block(stack, index, statistic)
                if names:
                    last = self.entries[names[-1]]
                    error = "" if last.error is None else f", error {last.error:.3f}"
                    remark(bar, f"{last.name}: sparsity {last.sparsity:.3f}{error}")

        rest = {name: layer for name, layer in self.layers.items() if name not in self.entries}
        if rest:
            with taking_turns(stacks), collect_inputs(rest, statistic) as inputs:
                for sample in track(samples, "pruning the rest", progress):
                    forward(self.model, sample)
            for name in rest:
                self.prune(name, inputs.pop(name, None), sequential=False)

    def _prune_block(self, stack: Stack, index: int, statistic: Statistic) -> list[str]:
        """Prune the layers in a block, pass its outputs to the next, and return their names."""
        inside = [name for name in self.layers if name.startswith(stack.prefix(index))]
        to_do = {
            name: self.layers[name]
            for name in inside
            if self.done is None or not self.done.holds(name)
        }
        with stack.on_device(index) as block:
            # Restored layers are still dense here, as in the run that collected their statistics.
            with collect_inputs(to_do, statistic) as inputs:
                if to_do:
                    for call in stack.calls[index]:
                        stack.run(block, call)
            for name in inside:
                self.prune(name, inputs.pop(name, None), sequential=True)
            if index + 1 < len(stack.blocks):
                stack.advance(index)
        return inside
