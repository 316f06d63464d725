"""Run a model block by block: its stacks of blocks, and the calls that reach them.

No attribute path of any model family is written here:

1. The stacks are the outermost ``nn.ModuleList``s whose elements contain targeted layers.
2. One pass of the model records the arguments of every block, for every sample. An argument that is
   an output of the block before it is not stored but marked as a link; all else (masks, position
   embeddings, which some models vary from block to block) is kept as it came.
3. From then on a block runs alone: its links are filled with the outputs of the block before it.

A stack has a home, where its blocks and their calls are kept, and a compute device, where a block
and its arguments are while it runs.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("flash_llm")


@dataclass(frozen=True)
class Link:
    """Stands in a recorded call for output number ``index`` of the block before."""

    index: int


@dataclass
class Call:
    """Arguments of one call of a block, with links in place of the previous block's outputs."""

    args: list[Any]
    kwargs: dict[str, Any]

    def on(self, device: torch.device) -> Call:
        """The same call with its tensors on a device."""
        return Call(on(device, self.args), on(device, self.kwargs))

    def float(self) -> Call:
        """The same call with its floating point tensors in float32."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.is_floating_point() else tensor

        return Call(_map(cast, self.args), _map(cast, self.kwargs))

    def fill_links(self, outputs: list[Any]) -> None:
        """Put the outputs of the block before in the places of the links."""
        self.args = [outputs[a.index] if isinstance(a, Link) else a for a in self.args]
        self.kwargs = {
            k: outputs[a.index] if isinstance(a, Link) else a for k, a in self.kwargs.items()
        }


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
    """

    name: str
    blocks: list[nn.Module]
    home: torch.device
    device: torch.device
    calls: list[list[Call]] = field(default_factory=list)
    chained: bool = True

    def prefix(self, index: int) -> str:
        """What the name of everything inside a block begins with."""
        return f"{self.name}.{index}."

    def passed_on(self) -> list[int]:
        """Numbers of a block's outputs that the next one takes; of a single block, the first.

        Recorded calls tell, as long as no link has been filled.
        """
        if len(self.blocks) == 1:
            return [0]
        call = self.calls[1][0]
        arguments = [*call.args, *call.kwargs.values()]
        return sorted({a.index for a in arguments if isinstance(a, Link)})

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """Have a block on the compute device; afterwards it is at home again."""
        block = self.blocks[index]
        try:
            yield block.to(self.device)
        finally:
            block.to(self.home)

    def run(self, block: nn.Module, call: Call) -> list[Any]:
        """Call a block on the compute device; its outputs stay there."""
        moved = call.on(self.device)
        return as_list(block(*moved.args, **moved.kwargs))

    def advance(self, index: int) -> None:
        """Run a block, which is on the compute device, and hand its outputs to the next, if any.

        The calls of the block are dropped.
        """
        for number, call in enumerate(self.calls[index]):
            outputs = self.run(self.blocks[index], call)
            if index + 1 < len(self.blocks):
                self.calls[index + 1][number].fill_links(on(self.home, outputs))
        self.calls[index].clear()

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


def record_calls(model: nn.Module, stacks: list[Stack], samples: list[Tensor]) -> None:
    """Run the model once per sample and fill ``calls`` and ``chained`` of every stack.

    Args:
        model: in evaluation mode, without gradients.
        stacks: of the model, from :func:`find_stacks`.
        samples: int64 token ids ``[B, L]``.
    """
    outputs: dict[nn.Module, list[Any]] = {}
    for stack in stacks:
        stack.calls, stack.chained = [[] for _ in stack.blocks], True
    with contextlib.ExitStack() as hooks:
        for stack in stacks:
            for index, block in enumerate(stack.blocks):

                def record(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    stack: Stack = stack,
                    index: int = index,
                ) -> None:
                    earlier = [outputs.get(block, []) for block in stack.blocks[:index]]
                    call = _link_call(args, kwargs, earlier)
                    stack.chained &= call is not None
                    if call is not None:
                        stack.calls[index].append(call)

                hooks.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
        # Hooks run in the order of their making: arguments are recorded, and outputs kept, at home.
        hooks.enter_context(taking_turns(stacks))
        for stack in stacks:
            for block in stack.blocks:

                def keep(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
                    outputs[block] = as_list(output)

                hooks.callback(block.register_forward_hook(keep).remove)
        for sample in samples:
            outputs.clear()
            # The logits are not needed; models that can leave them out are asked to.
            forward(model, sample, logits_to_keep=1)
    for stack in stacks:
        stack.chained &= all(len(calls) == len(samples) for calls in stack.calls)
        if not stack.chained:
            stack.calls.clear()
            logger.warning(
                "flash_llm: the blocks of %s do not feed one another in order; its layers are "
                "calibrated in one pass instead of block by block",
                stack.name,
            )


@contextlib.contextmanager
def taking_turns(stacks: list[Stack]) -> Iterator[None]:
    """Let passes of the whole model run each block on its compute device, and no other there."""
    with contextlib.ExitStack() as hooks:
        for stack in stacks:
            if stack.device == stack.home:
                continue

            def fetch(
                block: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                stack: Stack = stack,
            ) -> tuple[Any, Any]:
                block.to(stack.device)
                return on(stack.device, args), on(stack.device, kwargs)

            def bring_back(
                block: nn.Module, _: tuple[Any, ...], output: Any, stack: Stack = stack
            ) -> Any:
                block.to(stack.home)
                return on(stack.home, output)

            for block in stack.blocks:
                hooks.callback(block.register_forward_pre_hook(fetch, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(bring_back).remove)
        yield


def _link_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], earlier: list[list[Any]]
) -> Call | None:
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
        return Link(previous[id(argument)]) if id(argument) in previous else argument

    return Call([link(a) for a in args], {k: link(a) for k, a in kwargs.items()})


def forward(model: nn.Module, sample: Tensor, **wanted: Any) -> None:
    """Run the model without a key/value cache.

    Args:
        model: called with token ids on the device of its first parameter.
        sample: int64 ``[B, L]``.
        wanted: options that are passed on if the model's ``forward`` knows them.
    """
    known = inspect.signature(model.forward).parameters
    options = {k: v for k, v in {"use_cache": False, **wanted}.items() if k in known}
    model(sample.to(next(model.parameters()).device), **options)


def as_list(output: Any) -> list[Any]:
    """What a block returned, as a list of its outputs."""
    return list(output) if isinstance(output, (tuple, list)) else [output]


def on(device: torch.device, value: Any) -> Any:
    """The tensors in nested tuples, lists and dicts on a device; all else as it is."""
    return _map(lambda tensor: tensor.to(device), value)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(function, item) for item in value)
    if type(value) is dict:
        return {key: _map(function, item) for key, item in value.items()}
    return value
