"""Prune a model in place, layer by layer, with statistics of the inputs that each layer sees.

Transformer blocks are pruned in the order in which they run, and each block is calibrated on what
the already pruned blocks before it put out (as in SparseGPT and Wanda), so that a block can make up
for what was lost before it. No attribute path of any model family is written here:

1. The stacks are the outermost ``nn.ModuleList``s whose elements contain targeted layers.
2. One pass of the dense model records the arguments of every block, for every sample. An argument
   that is an output of the block before it is not stored but marked as a link; all else (masks,
   position embeddings, which some models vary from block to block) is kept as it came.
3. Block by block: run it on every sample to collect statistics, prune its layers, run it again and
   feed its outputs into the links of the next.

What does not fit that shape (a projection outside the stacks, blocks that are called twice or not
fed by one another) is pruned last, on the statistics of one pass of the model as it then stands;
the report says which layers those were. The mathematics live in ``criteria.py`` (magnitude, Wanda),
``sparsegpt.py``, ``admm.py`` and ``allocation.py``, and the statistics in ``inputs.py``.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.evaluate import ProgressBar, check_token_ids, evaluation_mode, track
from flash_llm.linear import SparseLinear
from flash_llm.prune.admm import admm
from flash_llm.prune.allocation import outlier_ratio, owl_sparsities
from flash_llm.prune.criteria import (
    check_prune_target,
    global_magnitude_masks,
    magnitude_mask,
    wanda_mask,
)
from flash_llm.prune.inputs import Inputs, collect_inputs, gram, squares
from flash_llm.prune.reconstruction import SingularHessianError, relative_error
from flash_llm.prune.report import PrunedLayer, PruneReport
from flash_llm.prune.sparsegpt import sparsegpt
from flash_llm.sparsify import DEFAULT_IGNORE, DEFAULT_TARGETS, refuse_tied, select_layers

logger = logging.getLogger("flash_llm")

RECONSTRUCTIONS = {"sparsegpt": sparsegpt, "admm": admm}
"""The methods that turn a weight and the Gram matrix of its inputs into a new weight."""

METHODS = ("magnitude", "wanda", *RECONSTRUCTIONS)

LARGEST_DAMPING = 1.0
"""Damping is raised tenfold where a Hessian is singular, but not beyond this."""

DEFAULT = "_default"
"""The key of an allocation's dict for the layers that no pattern matches."""


def prune_(
    model: nn.Module,
    *,
    method: str = "wanda",
    sparsity: float | None = None,
    scope: str = "row",
    allocation: str | Mapping[str, float] = "uniform",
    calibration: Tensor | Iterable[Tensor] | Iterable[str] | None = None,
    tokenizer: Callable[[str], Any] | None = None,
    nsamples: int | None = None,
    seqlen: int = 2048,
    seed: int | None = None,
    damping: float = 0.01,
    preserve_mask: bool = False,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    progress: bool | ProgressBar = False,
) -> PruneReport:
    """Set the least important weights of a model to zero, in place; the weights stay dense.

    Pack the result with :func:`flash_llm.sparsify_`. The arguments are checked before any weight
    changes; a failure after that (out of memory, say) leaves the blocks done so far pruned.

    Args:
        model: called as ``model(ids)`` with int64 token ids ``[B, L]``. Weights of any floating
            point dtype; the forward passes run in it, the mathematics of pruning in float32.
        method: ``"magnitude"`` (``|W|``), ``"wanda"`` (``|W| * ||x||``, arXiv 2306.11695),
            ``"sparsegpt"`` (arXiv 2301.00774) or ``"admm"`` (ALPS, arXiv 2406.07831). The last two
            also change the weights that stay, and take longer in this order; they hold
            ``[K, K]`` float32 per distinct input of one block.
        sparsity: fraction of zeros in [0, 1]; may be left out for an N:M scope, and for an
            allocation that says it for every layer.
        scope: ``"row"`` (the fraction holds in every output row), ``"layer"``, ``"N:M"``, or, for
            magnitude, ``"global"`` (one threshold for all targeted layers).
        allocation: ``"uniform"``; ``"owl"`` (blocks with more outliers are pruned less, by up to
            0.08 of sparsity, and the mean over all weights is ``sparsity``; arXiv 2310.05175); or a
            dict from patterns, as in ``targets``, to sparsities: the first pattern that matches a
            layer counts, ``"_default"`` (or ``sparsity``) is for layers that none matches.
        calibration: text that the model should stay good at: token ids ``[S, L]`` (each row is a
            sample), an iterable of token tensors ``[L]`` or ``[B, L]`` without padding, or an
            iterable of strings, which needs ``tokenizer``. 128 samples are customary. Magnitude
            needs none and ignores it, unless the allocation is OWL.
        tokenizer: a Hugging Face tokenizer, or ``f(text) -> {"input_ids": [...]}``.
        nsamples: use only so many samples; None for all.
        seqlen: cut each sample to so many tokens; shorter ones are used as they are.
        seed: None takes the first ``nsamples`` and reads no further; a number draws them at random
            from all, without replacement. Nothing else is random.
        damping: fraction of the mean diagonal added to the Hessian (SparseGPT and ADMM). Where
            rounding still leaves it singular, tenfold, with a warning that names the layer, up to
            1; 0 is never raised.
        preserve_mask: weights that are zero already stay zero (SparseGPT and ADMM; with the others
            they are the first ones pruned anyway).
        targets: patterns of the layers to prune, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers to leave alone; wins over ``targets``.
        progress: True for a tqdm bar over the blocks, or a callable such as
            ``rich.progress.track``.

    Returns:
        A :class:`PruneReport`, one entry per pruned layer.

    Raises:
        TypeError: an argument or a sample has the wrong type, or a targeted weight is not floating
            point.
        ValueError: unknown method or allocation; invalid sparsity, scope or damping, or a scope and
            an allocation that contradict one another; calibration missing or empty; a token id
            outside the vocabulary; a pattern that matches nothing; a targeted weight that is not
            finite, on the meta device or tied to another module; calibration activations that are
            not finite; a Hessian that damping leaves singular, or new weights that overflow the
            dtype of the old (the message names the layer).

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=2, max_position_embeddings=64)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> report = prune_(model, sparsity=0.75, calibration=torch.arange(64).view(2, 32))
        >>> len(report.layers), report.sparsity
        (14, 0.75)
    """
    if method not in METHODS:
        raise ValueError(
            f"flash_llm.prune_: method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    _check_allocation(method, scope, allocation)
    if not 0.0 <= damping < math.inf:
        raise ValueError(f"flash_llm.prune_: damping must be finite and at least 0, got {damping}")
    layers = select_layers(model, targets, ignore)
    sparsities = _layer_sparsities(model, layers, sparsity, scope, allocation)
    _check_weights(model, layers)
    samples: list[Tensor] = []
    if method != "magnitude" or allocation == "owl":
        samples = _token_samples(calibration, tokenizer, nsamples, seqlen, seed)
        for sample in samples:
            check_token_ids(sample, model)

    start = time.perf_counter()
    with evaluation_mode(model):
        if allocation == "owl":
            assert sparsity is not None  # _layer_sparsities saw to it
            sparsities = _owl_sparsities(model, layers, samples, sparsity)
        pruner = _Pruner(model, layers, sparsities, method, scope, damping, preserve_mask)
        if scope == "global":
            assert sparsity is not None
            pruner.prune_globally(sparsity, progress)
        elif method == "magnitude":
            for name in track(list(layers), "pruning", progress):
                pruner.prune(name, None, sequential=False)
        else:
            pruner.prune_calibrated(samples, progress)
    return PruneReport(
        method=method,
        scope=scope,
        allocation=allocation if isinstance(allocation, str) else dict(allocation),
        layers=tuple(pruner.done[name] for name in layers),
        num_samples=len(samples),
        seconds=time.perf_counter() - start,
    )


def _check_allocation(method: str, scope: str, allocation: str | Mapping[str, float]) -> None:
    if isinstance(allocation, str):
        if allocation not in ("uniform", "owl"):
            raise ValueError(
                'flash_llm.prune_: allocation must be "uniform", "owl" or a dict from patterns to '
                f"sparsities, got {allocation!r}"
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


def _layer_sparsities(
    model: nn.Module,
    layers: dict[str, nn.Module],
    sparsity: float | None,
    scope: str,
    allocation: str | Mapping[str, float],
) -> dict[str, float | None]:
    """The checked target of each layer; OWL's own are not known yet, and are uniform here."""
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
    model: nn.Module, layers: dict[str, nn.Module], samples: list[Tensor], sparsity: float
) -> dict[str, float | None]:
    """OWL's targets, from one pass of the dense model; a layer outside the stacks is a block."""
    with collect_inputs(layers, squares) as inputs:
        for sample in samples:
            _forward(model, sample, logits_to_keep=1)
    prefixes = [
        f"{stack.name}.{index}."
        for stack in _find_stacks(model, layers)
        for index in range(len(stack.blocks))
    ]
    blocks: dict[str, list[str]] = {}
    for name in inputs:
        _check_inputs(name, inputs[name], _matrix(layers[name]))
        block = next((prefix for prefix in prefixes if name.startswith(prefix)), name)
        blocks.setdefault(block, []).append(name)
    weights = [[_matrix(layers[name]) for name in names] for names in blocks.values()]
    norms = [
        [inputs[name].norm.to(weight.device) for name, weight in zip(names, block, strict=True)]
        for names, block in zip(blocks.values(), weights, strict=True)
    ]
    targets = owl_sparsities(
        [outlier_ratio(*pair) for pair in zip(weights, norms, strict=True)],
        [sum(weight.numel() for weight in block) for block in weights],
        sparsity,
    )
    # Layers that no token reached say nothing about outliers and stay at the mean.
    sparsities: dict[str, float | None] = dict.fromkeys(layers, sparsity)
    for names, target in zip(blocks.values(), targets, strict=True):
        sparsities.update(dict.fromkeys(names, target))
    return sparsities


@dataclass(frozen=True)
class _Link:
    """Stands in a recorded call for output number ``index`` of the block before."""

    index: int


@dataclass
class _Call:
    """Arguments of one call of a block, with links in place of the previous block's outputs."""

    args: list[Any]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> list[Any]:
        return _as_list(block(*self.args, **self.kwargs))

    def fill_links(self, outputs: list[Any]) -> None:
        self.args = [outputs[a.index] if isinstance(a, _Link) else a for a in self.args]
        self.kwargs = {
            k: outputs[a.index] if isinstance(a, _Link) else a for k, a in self.kwargs.items()
        }


@dataclass
class _Stack:
    """A list of blocks and, per block and sample, the call that was recorded."""

    name: str
    blocks: list[nn.Module]
    calls: list[list[_Call]]
    chained: bool = True


class _Pruner:
    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        sparsities: dict[str, float | None],
        method: str,
        scope: str,
        damping: float,
        preserve_mask: bool,
    ) -> None:
        self.model = model
        self.layers = layers
        self.sparsities = sparsities
        self.method = method
        self.scope = scope
        self.damping = damping
        self.preserve_mask = preserve_mask
        self.statistic = gram if method in RECONSTRUCTIONS else squares
        self.done: dict[str, PrunedLayer] = {}

    def prune(self, name: str, inputs: Inputs | None, *, sequential: bool) -> None:
        """Prune one layer and note what became of it."""
        weight, sparsity = _matrix(self.layers[name]), self.sparsities[name]
        error = None
        if self.method == "magnitude" or inputs is None:
            if self.method != "magnitude":
                logger.warning(
                    "flash_llm.prune_: no calibration token reached %s; pruned by magnitude",
                    name,
                )
            weight.masked_fill_(~magnitude_mask(weight, sparsity, self.scope), 0.0)
        elif self.method == "wanda":
            _check_inputs(name, inputs, weight)
            norm = inputs.norm.to(weight.device)
            weight.masked_fill_(~wanda_mask(weight, norm, sparsity, self.scope), 0.0)
        else:
            _check_inputs(name, inputs, weight)
            hessian = inputs.total.to(weight.device)
            pruned = self._reconstruct(name, weight, hessian)
            if not bool(pruned.isfinite().all()):
                raise ValueError(
                    f"flash_llm.prune_: the new weights of {name} overflow {weight.dtype}"
                )
            error = relative_error(weight, pruned, hessian)
            weight.copy_(pruned)
        self._note(name, inputs, sequential, error)

    def _reconstruct(self, name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        """The new weight; where rounding leaves the Hessian singular, with ten times the damping.

        Channels that are large on the same few tokens only (massive activations) are collinear, and
        damping, a fraction of the mean, may be below what float32 resolves of them.
        """
        damping = self.damping
        while True:
            try:
                return RECONSTRUCTIONS[self.method](
                    weight,
                    hessian,
                    self.sparsities[name],
                    self.scope,
                    damping=damping,
                    preserve_mask=self.preserve_mask,
                )
            except SingularHessianError as problem:
                if damping == 0 or 10 * damping > LARGEST_DAMPING:
                    raise ValueError(f"flash_llm.prune_: {name}: {problem}") from problem
                damping *= 10
                logger.warning(
                    "flash_llm.prune_: %s: %s; now with a damping of %g", name, problem, damping
                )

    def prune_globally(self, sparsity: float, progress: bool | ProgressBar) -> None:
        """Prune all layers by magnitude, with one threshold for all."""
        weights = [_matrix(layer) for layer in self.layers.values()]
        masks = global_magnitude_masks(weights, sparsity)
        for name in track(list(self.layers), "pruning", progress):
            _matrix(self.layers[name]).masked_fill_(~next(masks), 0.0)
            self._note(name, None, False, None)

    def _note(
        self, name: str, inputs: Inputs | None, sequential: bool, error: float | None
    ) -> None:
        weight = _matrix(self.layers[name])
        self.done[name] = PrunedLayer(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            sparsity=(weight == 0).sum().item() / max(weight.numel(), 1),
            num_tokens=0 if inputs is None else inputs.num_tokens,
            sequential=sequential,
            error=error,
        )

    def prune_calibrated(self, samples: list[Tensor], progress: bool | ProgressBar) -> None:
        stacks = _find_stacks(self.model, self.layers)
        if stacks:
            _record_calls(self.model, stacks, samples)
        steps = [
            (stack, index)
            for stack in stacks
            if stack.chained
            for index in range(len(stack.blocks))
        ]
        for stack, index in track(steps, "pruning", progress):
            self._prune_block(stack, index)

        rest = {name: layer for name, layer in self.layers.items() if name not in self.done}
        if rest:
            with collect_inputs(rest, self.statistic) as inputs:
                for sample in samples:
                    _forward(self.model, sample)
            for name in rest:
                self.prune(name, inputs.pop(name, None), sequential=False)

    def _prune_block(self, stack: _Stack, index: int) -> None:
        block, calls = stack.blocks[index], stack.calls[index]
        prefix = f"{stack.name}.{index}."
        inside = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        if inside:
            with collect_inputs(inside, self.statistic) as inputs:
                for call in calls:
                    call.run(block)
            for name in inside:
                self.prune(name, inputs.pop(name, None), sequential=True)
        if index + 1 < len(stack.blocks):
            for call, following in zip(calls, stack.calls[index + 1], strict=True):
                following.fill_links(call.run(block))
        calls.clear()


def _find_stacks(model: nn.Module, layers: dict[str, nn.Module]) -> list[_Stack]:
    """The outermost ModuleLists that contain targeted layers (experts lie inside a block)."""
    stacks: list[_Stack] = []
    for name, module in model.named_modules():  # parents come before their children
        inside = any(name.startswith(f"{stack.name}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside:
            if any(layer.startswith(f"{name}.") for layer in layers):
                stacks.append(_Stack(name, list(module), [[] for _ in module]))
    return stacks


def _record_calls(model: nn.Module, stacks: list[_Stack], samples: list[Tensor]) -> None:
    """Run the dense model once per sample and fill ``calls`` and ``chained`` of every stack."""
    outputs: dict[nn.Module, list[Any]] = {}
    with contextlib.ExitStack() as hooks:
        for stack in stacks:
            for index, block in enumerate(stack.blocks):

                def record(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    stack: _Stack = stack,
                    index: int = index,
                ) -> None:
                    earlier = [outputs.get(block, []) for block in stack.blocks[:index]]
                    call = _link_call(args, kwargs, earlier)
                    stack.chained &= call is not None
                    if call is not None:
                        stack.calls[index].append(call)

                def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
                    outputs[block] = _as_list(output)

                hooks.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(keep).remove)
        for sample in samples:
            outputs.clear()
            # The logits are not needed; models that can leave them out are asked to.
            _forward(model, sample, logits_to_keep=1)
    for stack in stacks:
        stack.chained &= all(len(calls) == len(samples) for calls in stack.calls)
        if not stack.chained:
            stack.calls.clear()
            logger.warning(
                "flash_llm.prune_: the blocks of %s do not feed one another in order; its layers "
                "are calibrated in one pass instead of block by block",
                stack.name,
            )


def _link_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], earlier: list[list[Any]]
) -> _Call | None:
    """Replace the previous block's outputs by links; None when the block is not fed by it alone."""
    before = earlier[-1] if earlier else []
    previous = {id(t): i for i, t in enumerate(before) if isinstance(t, Tensor)}
    older = {id(t) for outputs in earlier[:-1] for t in outputs if isinstance(t, Tensor)}
    arguments = [*args, *kwargs.values()]
    if earlier and not any(id(a) in previous for a in arguments):
        return None
    if any(id(a) in older and id(a) not in previous for a in arguments):
        return None

    def link(argument: Any) -> Any:
        return _Link(previous[id(argument)]) if id(argument) in previous else argument

    return _Call([link(a) for a in args], {k: link(a) for k, a in kwargs.items()})


def _forward(model: nn.Module, sample: Tensor, **wanted: Any) -> None:
    """Run the model without a key/value cache, passing ``wanted`` options that it knows."""
    known = inspect.signature(model.forward).parameters
    options = {k: v for k, v in {"use_cache": False, **wanted}.items() if k in known}
    model(sample.to(next(model.parameters()).device), **options)


def _as_list(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _matrix(layer: nn.Module) -> Tensor:
    """The weight as ``[M, K]``, sharing memory; GPT-2's Conv1D stores it transposed."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if type(layer).__name__ == "Conv1D" else weight


def _check_inputs(name: str, inputs: Inputs, weight: Tensor) -> None:
    if not bool(inputs.total.isfinite().all()):
        raise ValueError(
            f"flash_llm.prune_: the calibration inputs of {name} are not finite; the model "
            f"overflows in {weight.dtype} on this text"
        )


def _check_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            raise TypeError(f"flash_llm.prune_: {name} is packed already; prune before packing")
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(
                f"flash_llm.prune_: {name}.weight must be a floating point parameter, got {found}"
            )
        if weight.dim() != 2:
            raise ValueError(
                f"flash_llm.prune_: {name}.weight must be a matrix, got {list(weight.shape)}"
            )
        if weight.is_meta:
            raise ValueError(
                f"flash_llm.prune_: {name}.weight is on the meta device; load the weights first"
            )
        if not bool(weight.isfinite().all()):
            raise ValueError(f"flash_llm.prune_: {name}.weight must be finite, it holds NaN or Inf")
    refuse_tied(
        model, list(layers.items()), "flash_llm.prune_", "pruning one would prune the other"
    )


def _token_samples(
    calibration: Tensor | Iterable[Tensor] | Iterable[str] | None,
    tokenizer: Callable[[str], Any] | None,
    nsamples: int | None,
    seqlen: int,
    seed: int | None,
) -> list[Tensor]:
    """Calibration data as int64 token ids ``[B, L]`` with ``L <= seqlen``."""
    if calibration is None:
        raise ValueError("flash_llm.prune_: this method needs calibration text; pass calibration=")
    if isinstance(calibration, str):
        raise TypeError("flash_llm.prune_: calibration must be a list of strings, not one string")
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "flash_llm.prune_: calibration must be token tensors or strings, got "
            f"{type(calibration).__name__}"
        )
    if nsamples is not None and nsamples < 1:
        raise ValueError(f"flash_llm.prune_: nsamples must be at least 1, got {nsamples}")
    if seqlen < 1:
        raise ValueError(f"flash_llm.prune_: seqlen must be at least 1, got {seqlen}")
    if isinstance(calibration, Tensor) and calibration.dim() == 1:
        calibration = calibration[None]

    chosen: Iterable[Any] = itertools.islice(iter(calibration), nsamples)
    if nsamples is not None and seed is not None:
        every = list(calibration)
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        chosen = [every[index] for index in sorted(order[:nsamples].tolist())]

    samples = []
    for sample in chosen:
        if isinstance(sample, str):
            if tokenizer is None:
                raise ValueError(
                    "flash_llm.prune_: calibration strings need a tokenizer; pass tokenizer="
                )
            sample = torch.tensor(tokenizer(sample)["input_ids"], dtype=torch.int64)
        if not isinstance(sample, Tensor):
            raise TypeError(
                "flash_llm.prune_: a calibration sample must be a token tensor or a string, got "
                f"{type(sample).__name__}"
            )
        if sample.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"flash_llm.prune_: calibration ids must be int32 or int64, got {sample.dtype}"
            )
        if sample.dim() not in (1, 2):
            raise ValueError(
                f"flash_llm.prune_: a calibration sample must have shape [L] or [B, L], got "
                f"{list(sample.shape)}"
            )
        sample = (sample[None] if sample.dim() == 1 else sample)[:, :seqlen].to(torch.int64)
        if sample.numel():
            samples.append(sample)
    if not samples:
        raise ValueError("flash_llm.prune_: calibration holds no tokens")
    return samples
