"""Finds the linear layers in which zeros cost much accuracy and save little.

These are output layers and task heads, the routers that choose experts, and adapters. Their names
differ between families of models, so they are found by the accessors of transformers, by the
modules next to them, and by PEFT's classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

# Children of PEFT's modules that belong to the adapted model; all others belong to the adapter.
_ADAPTED = ("base_layer", "base_model", "model", "original_module")


def output_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Find the layers that turn hidden states into logits, labels or scores.

    In a model of transformers these are the result of ``get_output_embeddings``, the modules next
    to the base model and, if there is no base model, the modules with an output for each label or
    token of the config. Stacks of blocks are never among them. Other models have no such accessor,
    so none is found in them.

    Args:
        model: any module; models of transformers inside it are searched too.

    Returns:
        ``"output layer"`` or ``"task head"`` for each module that is one or is inside one.
    """
    found: dict[nn.Module, str] = {}
    for owner in filter(_is_transformers, model.modules()):
        output = None
        with contextlib.suppress(NotImplementedError, AttributeError):  # some models have none
            output = owner.get_output_embeddings()  # type: ignore[operator]
        if isinstance(output, nn.Module):
            found.update(dict.fromkeys(output.modules(), "output layer"))
        base: nn.Module = owner.base_model  # type: ignore[assignment]
        sizes = {getattr(owner.config, key, None) for key in ("num_labels", "vocab_size")}
        for module in _beside(owner, base):
            if base is not owner or getattr(module, "out_features", 0) in sizes:
                found.setdefault(module, "task head")
    return found


def routers_and_adapters(model: nn.Module) -> dict[nn.Module, str]:
    """Find the linear layers that choose experts, and those of PEFT's adapters.

    A router has ``router`` in its name, or is next to experts and has one output for each of them,
    or a single output, as the gate of a shared expert.

    Args:
        model: any module.

    Returns:
        ``"router"`` or ``"adapter"`` for each layer that is one.
    """
    found: dict[nn.Module, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        steps = name.split(".") if name else []
        path = [model]  # from the model to the layer
        for step in steps:
            path.append(path[-1].get_submodule(step))
        if any(
            _is_peft(parent) and step not in _ADAPTED
            for parent, step in zip(path, steps, strict=False)
        ):
            found[layer] = "adapter"
        elif _is_router(steps, path):
            found[layer] = "router"
    return found


def _is_transformers(module: nn.Module) -> bool:
    # By its attributes: isinstance would need transformers to be imported.
    return hasattr(type(module), "base_model_prefix") and hasattr(module, "get_output_embeddings")


def _is_peft(module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def _beside(owner: nn.Module, base: nn.Module) -> Iterator[nn.Module]:
    """Modules of ``owner`` outside other models of transformers and stacks of blocks."""
    for child in owner.children():
        blocks = isinstance(child, nn.ModuleList) and not all(
            isinstance(block, nn.Linear) for block in child
        )
        if child is not base and not blocks and not _is_transformers(child):
            yield child
            yield from _beside(child, base)


def _is_router(steps: list[str], path: list[nn.Module]) -> bool:
    for step, module in list(zip(steps, path[1:], strict=True))[-3:]:
        if "router" in step.lower() or "router" in type(module).__name__.lower():
            return True
    num_outputs = getattr(path[-1], "out_features", None)
    # Next to it, or next to a module that contains only the router.
    for depth in range(2, min(len(path), 3) + 1):
        if num_outputs in _numbers_of_experts(path[-depth], without=path[-depth + 1]):
            return True
        if sum(isinstance(module, nn.Linear) for module in path[-depth].modules()) > 1:
            break
    return False


def _numbers_of_experts(module: nn.Module, without: nn.Module) -> set[int]:
    """The numbers of outputs that a router in ``module`` may have, given the experts there."""
    numbers: set[int] = set()
    for name, child in [("", module), *module.named_children()]:
        if child is without:
            continue
        stacked = [p.shape[0] for p in child.parameters(recurse=False) if _is_stack(child, p)]
        listed = []
        if child is not module and isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            listed = list(child._modules)
        if stacked or (listed and "expert" in name.lower()):
            numbers |= {1, *stacked}
        if len(listed) > 1:
            numbers.add(len(listed))
    return numbers


def _is_stack(module: nn.Module, parameter: nn.Parameter) -> bool:
    # Position embeddings and class tokens have a dimension of 1.
    return parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
