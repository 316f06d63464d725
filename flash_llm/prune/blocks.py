"""Run a model block by block: its stacks of blocks, and their recorded calls.

No attribute path of a model family is hard-coded:

1. The stacks are the outermost ``nn.ModuleList``s whose elements contain targeted layers.
2. One pass of the model records the arguments of every block, for every sample. An argument that is
   an output of the block before it, or an object that blocks change and pass on (a cache, say), is
   not stored but replaced by a link; all others (masks, position embeddings, which differ between
   the blocks of some models) are kept with the values that they had when the block was called.
3. From then on each block runs alone: its links are replaced by the results of the block before it.

A stack has a home device, where its blocks and their calls are kept, and a compute device, where a
block and its arguments are while the block runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.forward import evaluation_mode
from flash_llm.progress import ProgressBar, track
from flash_llm.prune.arguments import Memo, carry_back, changeable, copied, equal

Sample = Tensor | dict[str, Any]
"""The input of one call of a model: int64 token ids ``[B, L]``, or its arguments by name."""

logger = logging.getLogger("flash_llm")


@dataclass(frozen=True)
class Link:
    """Stands in a recorded call for a result of the block before.

    The results of a call are a list of its outputs and then its arguments, as the block left them.
    The index of an output counts from the beginning of the list, the index of an argument from its
    end and is negative.
    """

    index: int


@dataclass
class Call:
    """Arguments of one call of a block, with links in place of the previous block's outputs."""

    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def arguments(self) -> list[Any]:
        """All arguments, positional ones first."""
        return [*self.args, *self.kwargs.values()]

    def map(self, function: Callable[[Tensor], Tensor], memo: Memo | None = None) -> Call:
        """Return a copy of the call, with a function applied to its tensors."""
        return self.replace(copied(function, self.arguments, memo))

    def replace(self, arguments: list[Any]) -> Call:
        """Return the same call with other arguments."""
        number = len(self.args)
        return Call(arguments[:number], dict(zip(self.kwargs, arguments[number:], strict=True)))

    def float(self) -> Call:
        """Return the same call with its floating point tensors in float32."""
        return self.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


@dataclass
class Stack:
    """A list of blocks and, per block and sample, the call that was recorded.

    Attributes:
        name: of the ``nn.ModuleList``.
        blocks: in the order in which they run.
        home: device where blocks and calls are kept.
        device: where a block runs.
        calls: for each block, one call per sample.
        chained: whether each block is called once and gets the results of the block before it.
        in_place: whether a block changes its arguments.
    """

    name: str
    blocks: list[nn.Module]
    home: torch.device
    device: torch.device
    calls: list[list[Call]] = field(default_factory=list)
    chained: bool = True
    in_place: bool = False

    def prefix(self, index: int) -> str:
        """Return the prefix of all names inside a block."""
        return f"{self.name}.{index}."

    def passed_on(self) -> list[int]:
        """Return the indices of the results that the next block takes; 0 for a single block.

        Known from the recorded calls until the first link is filled.
        """
        if len(self.blocks) == 1:
            return [0]
        links = {a.index for a in self.calls[1][0].arguments if isinstance(a, Link)}
        return sorted(index for index in links if index >= 0) or sorted(links)

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """Move a block to the compute device, and home again afterwards."""
        block = self.blocks[index]
        try:
            yield block.to(self.device)
        finally:
            block.to(self.home)

    def run(self, block: Callable[..., Any], call: Call) -> list[Any]:
        """Return the results of a block on the compute device; the call stays as it is."""
        moved = call.map(self._bring)
        return [*as_list(block(*moved.args, **moved.kwargs)), *moved.arguments]

    def _bring(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=self.in_place)

    def advance(self, index: int) -> None:
        """Run a block, which is on the compute device, and pass its results to the next, if any.

        The calls of the block are deleted.
        """
        for number, call in enumerate(self.calls[index]):
            self.hand_on(index, number, self.run(self.blocks[index], call))
        self.calls[index].clear()

    def hand_on(self, index: int, number: int, results: list[Any]) -> None:
        """Fill the links of the next block's call of a sample, if there is a next block."""
        if index + 1 == len(self.blocks):
            return
        call, memo = self.calls[index + 1][number], Memo()
        self.calls[index + 1][number] = call.replace(
            [
                copied(self._bring_home, results[a.index], memo) if isinstance(a, Link) else a
                for a in call.arguments
            ]
        )

    def _bring_home(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.home)

    def with_same_calls(self) -> Stack:
        """Return a stack of the same blocks with links of its own to fill."""
        calls = [[Call([*call.args], {**call.kwargs}) for call in calls] for calls in self.calls]
        twin = copy.copy(self)
        twin.blocks, twin.calls = [*self.blocks], calls
        return twin


def find_stacks(
    model: nn.Module, layers: Iterable[str], device: torch.device | None = None
) -> list[Stack]:
    """Return the outermost ModuleLists that contain the named layers (experts are inside a block).

    Args:
        model: the device of its first parameter is the home device.
        layers: qualified names.
        device: the compute device; None means the home device.
    """
    layers = list(layers)
    home = next(model.parameters()).device
    stacks: list[Stack] = []
    for name, module in model.named_modules():  # parents come before their children
        inside = any(name.startswith(f"{stack.name}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside:
            if any(layer.startswith(f"{name}.") for layer in layers):
                stacks.append(Stack(name, list(module), home, device or home))
    return stacks


def record_calls(
    model: nn.Module,
    stacks: list[Stack],
    samples: Sequence[Sample],
    progress: bool | ProgressBar = False,
) -> None:
    """Run the model once per sample and set ``calls``, ``chained``, ``in_place`` of each stack.

    Args:
        model: in :func:`calibration_mode`.
        stacks: of the model, from :func:`find_stacks`.
        samples: from :func:`flash_llm.prune.samples.samples_for`.
        progress: a bar over the samples, as in :func:`flash_llm.prune_`.
    """
    tapes = [_Tape(stack) for stack in stacks]
    for stack in stacks:
        stack.calls, stack.chained, stack.in_place = [[] for _ in stack.blocks], True, False
    with contextlib.ExitStack() as hooks:
        for stack, tape in zip(stacks, tapes, strict=True):
            for index, block in enumerate(stack.blocks):
                before = functools.partial(tape.before, index)
                hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        # Hooks run in the order of registration: arguments and outputs are recorded at home.
        hooks.enter_context(taking_turns(stacks))
        for stack, tape in zip(stacks, tapes, strict=True):
            for block in stack.blocks:
                hooks.callback(block.register_forward_hook(tape.after).remove)
        for sample in track(samples, "recording calls", progress):
            # All logits but the last are left out by the models that support it.
            forward(model, sample, logits_to_keep=1)
            for tape in tapes:
                tape.finish()
    for stack in stacks:
        if not stack.chained:
            stack.calls.clear()
            logger.warning(
                "flash_llm: the blocks of %s do not feed one another in order; its layers are "
                "calibrated in one pass instead of block by block",
                stack.name,
            )


class _Tape:
    """Records the arguments and results of a stack's blocks during one pass of the model.

    Blocks may change their arguments in place, and so may the model between two blocks. Therefore
    values are compared with copies: the version of a tensor does not count changes through
    ``.data`` or by other libraries' kernels.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._begin()

    def _begin(self) -> None:
        self.calls: list[Call] = []
        # The arguments of the running block, and a copy of each from before the call.
        self.arguments: list[Any] = []
        self.copies: list[Any] = []
        # Each result of the block before with its link and a copy, by id.
        self.results: dict[int, tuple[Any, Link, Any]] = {}
        # Everything that blocks created or changed, by id.
        self.made: dict[int, Any] = {}
        # Tensors and their copies, by the id of the tensor and by the id of the copy.
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.of_copy: dict[int, tuple[Tensor, Tensor]] = {}

    def before(
        self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record the arguments of a block that is about to run."""
        if not self.stack.chained:
            return
        self.arguments, self.copies = [*args, *kwargs.values()], []
        memo: Memo = {}
        recorded: list[Any] = []
        for argument in self.arguments:
            if id(argument) in self.results:
                _, link, twin = self.results[id(argument)]
                self.stack.chained &= equal(argument, twin)  # not changed between the blocks
                recorded.append(link)
            else:
                twin = copied(self._keep, argument, memo)
                self.stack.chained &= not any(id(i) in self.made for i in changeable(argument))
                recorded.append(twin)
            self.copies.append(twin)
        fed = index == 0 or any(isinstance(argument, Link) for argument in recorded)
        self.stack.chained &= fed and index == len(self.calls)
        self.calls.append(Call([*args], kwargs).replace(recorded))

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record the outputs of a block and the arguments that it changed."""
        if not self.stack.chained:
            return
        earlier, self.results = self.results, {}
        for number, result in enumerate(as_list(output)):
            self._note(result, Link(number))
        for number, (argument, twin) in enumerate(zip(self.arguments, self.copies, strict=True)):
            link = Link(number - len(self.arguments))
            if not equal(argument, twin):
                self.stack.in_place = True
                self._note(argument, link)
            elif id(argument) in earlier:
                self._note(argument, link, twin)

    def finish(self) -> None:
        """End a pass: keep the calls with the values that the arguments had."""
        self.stack.chained &= len(self.calls) == len(self.stack.blocks)
        if self.stack.chained:
            for calls, call in zip(self.stack.calls, self.calls, strict=True):
                calls.append(call.map(self._original))
        self._begin()

    def _note(self, result: Any, link: Link, twin: Any = None) -> None:
        """Record a result for the next block, unless it already has another link."""
        inside = {id(item): item for item in changeable(result)}
        self.made.update(inside)
        if id(result) in inside and id(result) not in self.results:
            twin = copied(Tensor.clone, result) if twin is None else twin
            self.results[id(result)] = (result, link, twin)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, the same one as long as the tensor is unchanged."""
        kept = self.kept.get(id(tensor))
        if kept is None or not equal(*kept):
            kept = self.kept[id(tensor)] = (tensor, tensor.clone())
            self.of_copy[id(kept[1])] = kept
        return kept[1]

    def _original(self, twin: Tensor) -> Tensor:
        """Return the tensor that was copied, or the copy if the tensor has changed since.

        Blocks share tensors such as masks; a copy for each would waste memory.
        """
        tensor, _ = self.of_copy[id(twin)]
        return tensor if equal(tensor, twin) else twin


@contextlib.contextmanager
def taking_turns(stacks: list[Stack]) -> Iterator[None]:
    """Run each block on its compute device, one at a time, in passes of the whole model."""
    with contextlib.ExitStack() as hooks:
        for stack in stacks:
            if stack.device == stack.home:
                continue
            moved: dict[nn.Module, Memo] = {}

            def fetch(
                block: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                stack: Stack = stack,
                moved: dict[nn.Module, Memo] = moved,
            ) -> tuple[Any, Any]:
                block.to(stack.device)
                memo = moved[block] = {}
                call = Call([*args], kwargs).map(lambda tensor: tensor.to(stack.device), memo)
                return tuple(call.args), call.kwargs

            def bring_back(
                block: nn.Module,
                _: tuple[Any, ...],
                output: Any,
                stack: Stack = stack,
                moved: dict[nn.Module, Memo] = moved,
            ) -> Any:
                block.to(stack.home)
                return carry_back(moved.pop(block), lambda tensor: tensor.to(stack.home), output)

            for block in stack.blocks:
                hooks.callback(block.register_forward_pre_hook(fetch, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(bring_back).remove)
        yield


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Run a model such that hooks see its computation and no call depends on an earlier one.

    It is in evaluation mode, without gradients, and not compiled (compiled code runs no hooks). The
    key/value cache is disabled in all configurations inside the model: the models in a wrapper have
    their own, and arguments of the wrapper may not reach them.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None)]
    with contextlib.ExitStack() as restore:
        restore.enter_context(evaluation_mode(model))
        restore.enter_context(torch.compiler.set_stance("force_eager"))
        for config in caching:
            restore.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        yield


def is_encoder_decoder(model: nn.Module | None) -> bool:
    """Whether a model of transformers has an encoder and a decoder."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def forward(model: nn.Module, sample: Sample, **wanted: Any) -> None:
    """Run the model without a key/value cache; an encoder-decoder gets text also as labels.

    Args:
        model: called with the sample on the device of its first parameter.
        sample: int64 token ids ``[B, L]``, or the model's arguments by name.
        wanted: arguments that are passed if the model's ``forward`` has them.
    """
    known = inspect.signature(model.forward).parameters
    options = {k: v for k, v in {"use_cache": False, **wanted}.items() if k in known}
    sample = on(next(model.parameters()).device, sample)
    if isinstance(sample, Tensor):
        if is_encoder_decoder(model) and "labels" in known:
            options["labels"] = sample
        model(sample, **options)
    else:
        model(**{**options, **sample})


def as_list(output: Any) -> list[Any]:
    """Return the outputs of a block as a list."""
    return list(output) if isinstance(output, (tuple, list)) else [output]


def on(device: torch.device, value: Any) -> Any:
    """Return a copy of nested values, with their tensors on a device."""
    return copied(lambda tensor: tensor.to(device), value)
