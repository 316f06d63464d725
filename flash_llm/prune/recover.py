"""Recovery: after pruning, train the weights that stay, block by block, towards the dense model.

Each block in turn gets the inputs that the already recovered blocks before it put out, and is
trained to put out what the dense model puts out there, so that errors do not add up. Zeros stay
zeros. There are no labels, and only one block is trained at a time, in float32: it takes the memory
of one block five times over (weights, gradients, two moments of Adam and the dense block) and of
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
from flash_llm.progress import ProgressBar, remark, track
from flash_llm.prune.blocks import (
    Call,
    Stack,
    calibration_mode,
    find_stacks,
    on,
    record_calls,
)
from flash_llm.prune.layers import check_weights
from flash_llm.prune.samples import Calibration, Tokenizer, samples_for
from flash_llm.report import SavedReport
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS, select_layers
from flash_llm.table import aligned


@dataclass(frozen=True)
class RecoveredBlock:
    """What recovery did to one block.

    Attributes:
        name: qualified module name.
        before: ``|Y' - Y| / |Y|`` in the Frobenius norm, Y being the dense model's outputs of the
            block on the calibration tokens and Y' those of the recovered model up to this block,
            itself not yet trained.
        after: the same once it is trained; never more.
        epoch: the epoch whose weights were kept; 0 means those from before.
    """

    name: str
    before: float
    after: float
    epoch: int


@dataclass(frozen=True)
class RecoveryReport(SavedReport):
    """What :func:`flash_llm.recover_` did; ``print`` it for a table.

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
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    device: torch.device | str | None = None,
    progress: bool | ProgressBar = False,
) -> RecoveryReport:
    """Train what :func:`flash_llm.prune_` left of a model towards the dense model, in place.

    Call it before :func:`flash_llm.sparsify_`. Block by block, Adam lowers the squared difference
    between the block's outputs and the dense model's, one calibration sample at a time, and the
    weights of the epoch with the lowest error over all samples are kept. Everything in a block is
    trained but the zeros of the pruned layers. All of it runs in float32, and errors are taken of
    the weights as rounded to their dtype.

    Args:
        model: pruned, not packed; called as ``model(ids)`` with int64 token ids ``[B, L]``.
        dense: the model before pruning, or a folder of safetensors with its weights, from which no
            more than a block is loaded at a time.
        calibration: text, as in :func:`flash_llm.prune_`; that of pruning will do.
        tokenizer: for files and strings.
        nsamples: use only so many samples; None for all.
        seqlen: tokens per sample.
        seed: draws the samples, as in :func:`flash_llm.prune_`, and their order in each epoch.
        epochs: passes over the samples per block, at least 1.
        learning_rate: of Adam at the beginning; it falls to 0 along a cosine. On five blocks of
            SmolLM2 (SparseGPT at 0.6, 1536 tokens) 5e-4 did better than 1e-4, held out too.
        targets: patterns of the layers whose zeros must stay, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers that are trained freely; wins over ``targets``.
        device: where blocks are trained, one at a time; None means where the model is.
        progress: True for a tqdm bar, or a callable such as ``rich.progress.track``.

    Returns:
        A :class:`RecoveryReport`, one entry per block.

    Raises:
        TypeError: an argument or a sample has the wrong type; a layer is packed already.
        ValueError: ``epochs`` or ``learning_rate`` is out of range; ``dense`` lacks a tensor or has
            it in another shape; calibration missing or empty; a weight or the outputs of a block
            are not finite; a pattern matches nothing.
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
            # The twin carries the dense model's activations, the stack those of the recovered one.
            twin, passed_on = stack.with_same_calls(), stack.passed_on()
            steps += [(stack, twin, passed_on, index) for index in range(len(stack.blocks))]
        bar = track(steps, "recovering", progress)
        for stack, twin, passed_on, index in bar:
            name = f"{stack.name}.{index}"
            inside = [layer for layer in layers if layer.startswith(f"{name}.")]
            frozen = [f"{layer.removeprefix(f'{name}.')}.weight" for layer in inside]
            with stack.on_device(index) as block:
                wanted = _dense_outputs(twin, index, _dense_copy(block, name, read), passed_on)
                student = _Student(block, frozen, stack, stack.calls[index], wanted, passed_on)
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
    """A function that returns a tensor of the dense model by name; all that is needed is there."""
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
    """The dense block, in float32 where the pruned one is."""
    twin = copy.deepcopy(block).float()
    for key, tensor in twin.state_dict().items():
        tensor.copy_(read(f"{name}.{key}"))
    return twin


def _dense_outputs(
    twin: Stack, index: int, block: nn.Module, passed_on: list[int]
) -> list[list[Tensor]]:
    """Per sample, what the dense block passes on, at home; the next block gets it too."""
    wanted = []
    for number, call in enumerate(twin.calls[index]):
        results = twin.run(block, call.float())
        for i in passed_on:  # what is wanted and what the next block gets are the same tensors
            results[i] = on(twin.home, results[i])
        wanted.append([results[i] for i in passed_on])
        twin.hand_on(index, number, results)
    twin.calls[index].clear()
    return wanted


class _Student:
    """A block in training: its copy in float32, its inputs, and what it should make of them.

    Args:
        block: pruned, on the compute device.
        frozen: its parameters whose zeros stay.
        stack: where it runs.
        calls: per sample, its inputs.
        wanted: per sample, what the outputs that are passed on should be.
        passed_on: the numbers of those outputs.
    """

    def __init__(
        self,
        block: nn.Module,
        frozen: list[str],
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

    def distance(self, sample: int, outputs: list[Tensor]) -> Tensor:
        """Sum of the squared differences of one sample's outputs from what they should be."""
        wanted = on(self.stack.device, self.wanted[sample])
        pairs = zip(self.passed_on, wanted, strict=True)
        return torch.stack([(outputs[i] - tensor).square().sum() for i, tensor in pairs]).sum()

    def changes(self) -> contextlib.AbstractContextManager[Any]:
        """Differentiate a block that works in place; it costs copies, so only where needed."""
        if self.stack.in_place:
            return torch.autograd.graph.allow_mutation_on_saved_tensors()
        return contextlib.nullcontext()

    def rounded(self) -> dict[str, Tensor]:
        """The parameters as the block would hold them."""
        own = dict(self.block.named_parameters())
        return {
            n: p.detach().to(own[n].dtype, copy=True) for n, p in self.module.named_parameters()
        }

    def error(self, parameters: Mapping[str, Tensor]) -> float:
        """``|Y' - Y| / |Y|`` over all samples with these parameters, in float32."""
        floats = {name: tensor.float() for name, tensor in parameters.items()}
        total = 0.0
        for sample, call in enumerate(self.calls):
            outputs = self.stack.run(
                lambda *args, **kwargs: functional_call(self.module, floats, args, kwargs), call
            )
            total += self.distance(sample, outputs).item()
        return math.sqrt(total / self.energy) if self.energy > 0 else math.sqrt(total)

    def train_(
        self, epochs: int, learning_rate: float, generator: torch.Generator
    ) -> tuple[float, float, int]:
        """Train the block in place; returns the error before and after, and the epoch kept."""
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
                    outputs = self.stack.run(self.module, self.calls[sample])
                    loss = self.distance(sample, outputs) / max(self.energy, 1e-30)
                    loss.backward()  # type: ignore[no-untyped-call]
                for weight, kept in self.kept:
                    if weight.grad is not None:
                        weight.grad.mul_(kept)  # Adam moves nothing that never had another gradient
                optimizer.step()
                schedule.step()
            candidate = self.rounded()
            error = self.error(candidate)
            if error < least:  # never for NaN
                best, least, best_epoch = candidate, error, epoch
        for name, parameter in self.block.named_parameters():
            parameter.detach().copy_(best[name])
        return before, least, best_epoch
