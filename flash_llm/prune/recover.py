"""Recovery: after pruning, train the weights that stay, block by block, towards the dense model.

Each block gets the outputs of the recovered blocks before it as inputs, and is trained to give the
outputs of the dense model at this point, so that errors do not accumulate. Zeros stay zeros, and
weights stay on a grid: the block computes with rounded weights, whose gradients change the weights
before rounding. There are no labels, and only one block is trained at a time, in float32: it takes
five times the memory of one block (weights, gradients, two moments of Adam and the dense block) and
two sets of activations between blocks.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flash_llm.io.checkpoint import Checkpoint, checkpoint_files
from flash_llm.linear import is_conv1d
from flash_llm.progress import ProgressBar, remark, track
from flash_llm.prune.blocks import (
    Call,
    Stack,
    calibration_mode,
    find_stacks,
    on,
    record_calls,
)
from flash_llm.prune.grids import Grid, grid_of
from flash_llm.prune.layers import check_weights
from flash_llm.prune.samples import Calibration, Tokenizer, samples_for
from flash_llm.report_base import SavedReport
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS, select_layers
from flash_llm.table import aligned


@dataclass(frozen=True)
class RecoveredBlock:
    """What recovery did to one block.

    Attributes:
        name: qualified module name.
        before: ``|Y' - Y| / |Y|`` in the Frobenius norm before the block was trained: Y are the
            outputs of the dense model's block on the calibration tokens, Y' those of this block
            after the recovered blocks before it.
        after: the same after training; never larger.
        epoch: the epoch whose weights were kept; 0 means the weights from before training.
    """

    name: str
    before: float
    after: float
    epoch: int


@dataclass(frozen=True)
class RecoveryReport(SavedReport):
    """What :func:`flash_llm.recover_` did; ``print`` it for a table.

    ``save`` writes it to ``recovery_report.json`` beside a saved model.

    Attributes:
        blocks: every block, in order.
        epochs: passes over the samples per block.
        learning_rate: of Adam, at the beginning.
        num_samples: calibration samples.
        seconds: wall-clock time.
    """

    blocks: tuple[RecoveredBlock, ...]
    epochs: int
    learning_rate: float
    num_samples: int
    seconds: float

    FILE_NAME: ClassVar[str] = "recovery_report.json"

    def __str__(self) -> str:
        table = [("block", "before", "after", "epoch")]
        for block in self.blocks:
            table.append(
                (block.name, f"{block.before:.4f}", f"{block.after:.4f}", str(block.epoch))
            )
        return "\n".join(
            [
                *aligned(table, left={0}),
                f"{len(self.blocks)} blocks recovered ({self.epochs} epochs over "
                f"{self.num_samples} calibration samples) in {self.seconds:.1f} s",
            ]
        )


def recover_(
    model: nn.Module,
    dense: nn.Module | str | os.PathLike[str],
    *,
    calibration: Calibration,
    tokenizer: Tokenizer | None = None,
    nsamples: int | None = None,
    seqlen: int = 2048,
    seed: int = 0,
    epochs: int = 8,
    learning_rate: float = 5e-4,
    values: str | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    device: torch.device | str | None = None,
    progress: bool | ProgressBar = False,
) -> RecoveryReport:
    """Train a model pruned by :func:`flash_llm.prune_` towards the dense model, in place.

    Call it before :func:`flash_llm.sparsify_`. Block by block, Adam minimises the squared
    difference between the outputs of the block and of the dense model's, one calibration sample at
    a time, and the weights of the epoch with the smallest error over all samples are kept. All
    parameters of a block are trained, except the zeros of the pruned layers. Training runs in
    float32; errors are computed with the weights rounded to their dtype.

    Args:
        model: pruned, not packed; called as ``model(ids)`` with int64 token ids ``[B, L]``.
        dense: the model before pruning, or a folder of safetensors with its weights, from which
            one block is loaded at a time.
        calibration: text, as in :func:`flash_llm.prune_`; may be the text used for pruning.
        tokenizer: for files and strings.
        nsamples: number of samples to use; None for all.
        seqlen: tokens per sample.
        seed: for drawing the samples, as in :func:`flash_llm.prune_`, and for their order in each
            epoch.
        epochs: passes over the samples per block, at least 1.
        learning_rate: of Adam at the beginning; it falls to 0 along a cosine. On five blocks of
            SmolLM2 (SparseGPT at 0.6, 1536 tokens) 5e-4 was better than 1e-4, also
            on held-out text.
        values: type of the values of the pruned layers, as in :func:`flash_llm.prune_`: their
            weights are rounded to nearest in every step, and in the end. None rounds nothing.
        targets: patterns of the layers whose zeros must stay, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers that are trained freely; wins over ``targets``.
        device: where blocks are trained, one at a time; None means where the model is.
        progress: True for a tqdm bar, or a callable such as ``rich.progress.track``.

    Returns:
        A :class:`RecoveryReport`, one entry per block.

    Raises:
        TypeError: an argument or a sample has the wrong type; a layer is packed already.
        ValueError: ``epochs`` or ``learning_rate`` is out of range; ``values`` is unknown;
            ``dense`` has no tensor of a name or one of another shape; calibration missing or empty;
            a weight or the outputs of a block are not finite; a pattern matches nothing.
        NotImplementedError: the model has no blocks that feed one another in order.
        OSError: a file cannot be read.

    Example:
        >>> import copy, transformers, flash_llm
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=2, max_position_embeddings=64)
        >>> dense = transformers.LlamaForCausalLM(config)
        >>> model, tokens = copy.deepcopy(dense), torch.arange(64).view(2, 32)
        >>> pruned = flash_llm.prune_(model, sparsity=0.75, calibration=tokens, seqlen=32)
        >>> report = recover_(model, dense, calibration=tokens, seqlen=32, epochs=2)
        >>> [block.after < block.before for block in report.blocks]
        [True, True]
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an integer of at least 1, got {epochs!r}")
    if not 0.0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    grid = None if values is None else grid_of(values)
    layers = select_layers(model, targets, ignore)
    check_weights(model, layers)
    stacks = find_stacks(model, layers, None if device is None else torch.device(device))
    read = _dense_tensors(dense, model, stacks)
    samples = samples_for(model, calibration, tokenizer, nsamples, seqlen, seed)

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    found = []
    with calibration_mode(model):
        record_calls(model, stacks, samples, progress)
        unchained = [stack.name for stack in stacks if not stack.chained]
        if unchained or not stacks:
            raise NotImplementedError(
                "flash_llm.recover_: the model must consist of blocks that feed one another in "
                + (f"order, those of {unchained[0]} do not" if unchained else "order, it has none")
            )
        steps = []
        for stack in stacks:
            # The twin holds the activations of the dense model, the stack those of the recovered.
            twin, passed_on = stack.with_same_calls(), stack.passed_on()
            steps += [(stack, twin, passed_on, index) for index in range(len(stack.blocks))]
        bar = track(steps, "recovering", progress)
        for stack, twin, passed_on, index in bar:
            name = f"{stack.name}.{index}"
            inside = [layer for layer in layers if layer.startswith(f"{name}.")]
            frozen = [f"{layer.removeprefix(f'{name}.')}.weight" for layer in inside]
            with stack.on_device(index) as block:
                wanted = _dense_outputs(twin, index, _dense_copy(block, name, read), passed_on)
                student = _Student(
                    *(block, frozen, grid, stack, stack.calls[index], wanted, passed_on)
                )
                before, after, epoch = student.train_(epochs, learning_rate, generator)
                if not math.isfinite(before):
                    raise ValueError(f"flash_llm.recover_: the outputs of {name} are not finite")
                stack.advance(index)
            found.append(RecoveredBlock(name, before, after, epoch))
            remark(bar, f"{name}: error {before:.4f} to {after:.4f}")
    return RecoveryReport(
        blocks=tuple(found),
        epochs=epochs,
        learning_rate=learning_rate,
        num_samples=len(samples),
        seconds=time.perf_counter() - start,
    )


def _dense_tensors(
    dense: nn.Module | str | os.PathLike[str], model: nn.Module, stacks: list[Stack]
) -> Callable[[str], Tensor]:
    """Check the dense model, and return a function that returns its tensors by name."""
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    if isinstance(dense, nn.Module):
        state = dense.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        read = state.__getitem__
    elif isinstance(dense, (str, os.PathLike)):
        checkpoint = Checkpoint(checkpoint_files(dense))
        shapes = {name: checkpoint.shape(name) for name in checkpoint.tensors}
        read = checkpoint.tensor
    else:
        raise TypeError(f"dense must be a module or a folder, got {type(dense).__name__}")
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{stack.name}.") for stack in stacks):
            continue
        if name not in shapes:
            raise ValueError(f"dense must have the tensor {name}, it has none of that name")
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"{name} of dense must have the shape {list(tensor.shape)}, got "
                f"{list(shapes[name])}"
            )
    return read


def _dense_copy(block: nn.Module, name: str, read: Callable[[str], Tensor]) -> nn.Module:
    """Return the dense block in float32, on the device of the pruned one."""
    twin = copy.deepcopy(block).float()
    for key, tensor in twin.state_dict().items():
        tensor.copy_(read(f"{name}.{key}"))
    return twin


def _dense_outputs(
    twin: Stack, index: int, block: nn.Module, passed_on: list[int]
) -> list[list[Tensor]]:
    """Return the outputs of the dense block for each sample, at home, and pass them to the next."""
    wanted = []
    for number, call in enumerate(twin.calls[index]):
        results = twin.run(block, call.float())
        for i in passed_on:  # moved once: targets and inputs of the next block share the tensors
            results[i] = on(twin.home, results[i])
        wanted.append([results[i] for i in passed_on])
        twin.hand_on(index, number, results)
    twin.calls[index].clear()
    return wanted


class _Student:
    """A block in training: its copy in float32, its inputs and its target outputs.

    Args:
        block: pruned, on the compute device.
        frozen: names of its parameters whose zeros stay zeros.
        grid: of these parameters; None for numbers of their dtype.
        stack: of the block.
        calls: the inputs, for each sample.
        wanted: for each sample, the targets of the outputs that the next block takes.
        passed_on: indices of these outputs.
    """

    def __init__(
        self,
        block: nn.Module,
        frozen: list[str],
        grid: Grid | None,
        stack: Stack,
        calls: list[Call],
        wanted: list[list[Tensor]],
        passed_on: list[int],
    ) -> None:
        self.block = block
        self.module = copy.deepcopy(block).float().requires_grad_(True)
        self.stack = stack
        self.calls = [call.float() for call in calls]
        self.wanted = wanted
        self.passed_on = passed_on
        self.energy = math.fsum(
            tensor.double().square().sum().item() for tensors in wanted for tensor in tensors
        )
        weights = [self.module.get_parameter(name) for name in frozen]
        self.kept = [(weight, weight.detach() != 0) for weight in weights]
        self.grids = {} if grid is None else dict.fromkeys(frozen, grid)

    def distance(self, sample: int, outputs: list[Tensor]) -> Tensor:
        """Return the sum of squared differences between one sample's outputs and its targets."""
        wanted = on(self.stack.device, self.wanted[sample])
        pairs = zip(self.passed_on, wanted, strict=True)
        return torch.stack([(outputs[i] - tensor).square().sum() for i, tensor in pairs]).sum()

    def changes(self) -> contextlib.AbstractContextManager[Any]:
        """Allow changes in place during differentiation; only where needed, because it copies."""
        if self.stack.in_place:
            return torch.autograd.graph.allow_mutation_on_saved_tensors()
        return contextlib.nullcontext()

    def nearest(self, name: str) -> Tensor:
        """Return a parameter in float32, rounded to its grid if it has one."""
        weight = self.module.get_parameter(name).detach()
        if name not in self.grids:
            return weight
        grid, dtype = self.grids[name], self.block.get_parameter(name).dtype
        if is_conv1d(self.block.get_submodule(name.removesuffix(".weight"))):
            return grid.round(weight.t(), dtype).t()
        return grid.round(weight, dtype)

    def rounded(self) -> dict[str, Tensor]:
        """Return the parameters rounded to their grids and to the dtypes of the block."""
        return {
            name: self.nearest(name).to(parameter.dtype, copy=True)
            for name, parameter in self.block.named_parameters()
        }

    def used(self) -> dict[str, Tensor]:
        """Return the parameters for a step of training: a rounded one passes its gradient on."""
        used: dict[str, Tensor] = dict(self.module.named_parameters())
        for name in self.grids:
            used[name] = used[name] + (self.nearest(name) - used[name]).detach()
        return used

    def outputs(self, parameters: dict[str, Tensor], call: Call) -> list[Tensor]:
        """Return the outputs of the block with these parameters."""
        return self.stack.run(
            lambda *args, **kwargs: functional_call(self.module, parameters, args, kwargs), call
        )

    def error(self, parameters: Mapping[str, Tensor]) -> float:
        """Return ``|Y' - Y| / |Y|`` over all samples with these parameters, in float32."""
        floats = {name: tensor.float() for name, tensor in parameters.items()}
        total = 0.0
        for sample, call in enumerate(self.calls):
            total += self.distance(sample, self.outputs(floats, call)).item()
        return math.sqrt(total / self.energy) if self.energy > 0 else math.sqrt(total)

    def train_(
        self, epochs: int, learning_rate: float, generator: torch.Generator
    ) -> tuple[float, float, int]:
        """Train the block in place; return the error before and after, and the epoch kept."""
        optimizer = torch.optim.Adam(self.module.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=epochs * len(self.calls)
        )
        best = self.rounded()
        before = least = self.error(best)
        best_epoch = 0
        for epoch in range(1, epochs + 1):
            for sample in torch.randperm(len(self.calls), generator=generator).tolist():
                optimizer.zero_grad()
                with torch.enable_grad(), self.changes():
                    outputs = self.outputs(self.used(), self.calls[sample])
                    loss = self.distance(sample, outputs) / max(self.energy, 1e-30)
                    loss.backward()  # type: ignore[no-untyped-call]
                for weight, kept in self.kept:
                    if weight.grad is not None:
                        # Adam does not change a weight all of whose gradients were zero.
                        weight.grad.mul_(kept)
                optimizer.step()
                schedule.step()
            candidate = self.rounded()
            error = self.error(candidate)
            if error < least:  # False for NaN
                best, least, best_epoch = candidate, error, epoch
        for name, parameter in self.block.named_parameters():
            parameter.detach().copy_(best[name])
        return before, least, best_epoch
