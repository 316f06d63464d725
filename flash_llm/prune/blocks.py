"""Run a model block by block: its stacks of blocks, and the calls that reach them.

No attribute path of any model family is written here:

1. The stacks are the outermost ``nn.ModuleList``s whose elements contain targeted layers.
2. One pass of the model records the arguments of every block, for every sample. An argument that is
   an output of the block before it, or an object that blocks change and hand on (a cache, say), is
   not stored but marked as a link; all else (masks, position embeddings, which some models vary
   from block to block) is kept with the values that it had when the block was called.
3. From then on a block runs alone: its links are filled with what the block before it made.

A stack has a home, where its blocks and their calls are kept, and a compute device, where a block
and its arguments are while it runs.
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
"""What a model is called with once: int64 token ids ``[B, L]``, or its arguments by name."""

logger = logging.getLogger("flash_llm")


@dataclass(frozen=True)
class Link:
    """Stands in a recorded call for a result of the block before.

    The results of a call are its outputs and then its arguments, as the block left them. An index
    of a list: arguments are counted from its end, and negative.
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
        """A copy of the call, with a function applied to its tensors."""
        return self.replace(copied(function, self.arguments, memo))

    def replace(self, arguments: list[Any]) -> Call:
        """The same call with other arguments."""
        number = len(self.args)
        return Call(arguments[:number], dict(zip(self.kwargs, arguments[number:], strict=True)))

    def float(self) -> Call:
        """The same call with its floating point tensors in float32."""
        return self.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


@dataclass
class Stack:
    """A list of blocks and, per block and sample, the call that was recorded.

    Attributes:
        name: of the ``nn.ModuleList``.
        blocks: in the order in which they run.
        home: where blocks and calls are kept.
        device: where a block runs.
        calls: per block, one call for each sample.
        chained: whether each block is called once and fed by the block before it alone.
        in_place: whether a block changes what it is called with.
    """

    name: str
    blocks: list[nn.Module]
    home: torch.device
    device: torch.device
    calls: list[list[Call]] = field(default_factory=list)
    chained: bool = True
    in_place: bool = False

    def prefix(self, index: int) -> str:
        """What the name of everything inside a block begins with."""
        return f"{self.name}.{index}."

    def passed_on(self) -> list[int]:
        """Numbers of a block's outputs that the next one takes; of a single block, the first.

        Recorded calls tell, as long as no link has been filled.
        """
        if len(self.blocks) == 1:
            return [0]
        links = {a.index for a in self.calls[1][0].arguments if isinstance(a, Link)}
        return sorted(index for index in links if index >= 0) or sorted(links)

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """Have a block on the compute device; afterwards it is at home again."""
        block = self.blocks[index]
        try:
            yield block.to(self.device)
        finally:
            block.to(self.home)

    def run(self, block: Callable[..., Any], call: Call) -> list[Any]:
        """Call a block on the compute device, where its results stay; the call is left as it is."""
        moved = call.map(self._bring)
        return [*as_list(block(*moved.args, **moved.kwargs)), *moved.arguments]

    def _bring(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=self.in_place)

    def advance(self, index: int) -> None:
        """Run a block, which is on the compute device, and hand its results to the next, if any.

        The calls of the block are dropped.
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
        """A stack over the same blocks whose links can be filled with other outputs."""
        calls = [[Call([*call.args], {**call.kwargs}) for call in calls] for calls in self.calls]
        twin = copy.copy(self)
        twin.blocks, twin.calls = [*self.blocks], calls
        return twin


def find_stacks(
    model: nn.Module, layers: Iterable[str], device: torch.device | None = None
) -> list[Stack]:
    """The outermost ModuleLists that contain the named layers (experts lie inside a block).

    Args:
        model: whose first parameter says where home is.
        layers: qualified names.
        device: the compute device; None means home.
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
    """Run the model once per sample and fill ``calls``, ``chained``, ``in_place`` of each stack.

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
        # Hooks run in the order of their making: arguments are recorded, and outputs kept, at home.
        hooks.enter_context(taking_turns(stacks))
        for stack, tape in zip(stacks, tapes, strict=True):
            for block in stack.blocks:
                hooks.callback(block.register_forward_hook(tape.after).remove)
        for sample in track(samples, "recording calls", progress):
            # The logits are not needed; models that can leave them out are asked to.
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
    """What a stack's blocks are called with during one pass of the model, and what they make.

    Blocks may change their arguments in place, and so may the model between two blocks. So all is
    compared with copies by value: versions of tensors do not tell of changes through ``.data`` or
    by foreign kernels.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._begin()

    def _begin(self) -> None:
        self.calls: list[Call] = []
        # Of the running block: its arguments and, per argument, a copy from before the call.
        self.arguments: list[Any] = []
        self.copies: list[Any] = []
        # By id, each result of the block before, its link, and a copy of it.
        self.results: dict[int, tuple[Any, Link, Any]] = {}
        # By id, everything that blocks made or changed.
        self.made: dict[int, Any] = {}
        # Tensors that were copied, by their ids and by those of the copies: (tensor, copy).
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
        """Note what a block made and what it changed."""
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
        """Let the next block find a result, unless it is there under another link already."""
        inside = {id(item): item for item in changeable(result)}
        self.made.update(inside)
        if id(result) in inside and id(result) not in self.results:
            twin = copied(Tensor.clone, result) if twin is None else twin
            self.results[id(result)] = (result, link, twin)

    def _keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, the same one as long as the tensor stays what it is."""
        kept = self.kept.get(id(tensor))
        if kept is None or not equal(*kept):
            kept = self.kept[id(tensor)] = (tensor, tensor.clone())
            self.of_copy[id(kept[1])] = kept
        return kept[1]

    def _original(self, twin: Tensor) -> Tensor:
        """The tensor of a copy, or the copy where the tensor has changed since.

        Blocks share tensors such as masks, and should not hold a copy each.
        """
        tensor, _ = self.of_copy[id(twin)]
        return tensor if equal(tensor, twin) else twin


@contextlib.contextmanager
def taking_turns(stacks: list[Stack]) -> Iterator[None]:
    """Let passes of the whole model run each block on its compute device, and no other there."""
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
    """Run a model so that hooks see what its layers compute, and a call needs no earlier one.

    It is in evaluation mode, without gradients, not compiled (compiled code runs no hooks), and
    builds no key/value cache where its configurations can say so: the models inside a wrapper have
    their own, which no argument of the wrapper may reach.
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
    """Run the model without a key/value cache; text is an encoder-decoder's input and its labels.

    Args:
        model: called with the sample on the device of its first parameter.
        sample: int64 token ids ``[B, L]``, or the model's arguments by name.
        wanted: options that are passed on if the model's ``forward`` knows them.
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
    """What a block returned, as a list of its outputs."""
    return list(output) if isinstance(output, (tuple, list)) else [output]


def on(device: torch.device, value: Any) -> Any:
    """A copy of nested values, with its tensors on a device."""
    return copied(lambda tensor: tensor.to(device), value)
