"""Selects layers of a model by patterns, and finds tied weights.

A pattern is a class name (``"Linear"``, which matches subclasses too), a module's dotted name or
the end of one (``"q_proj"``, ``"mlp.up_proj"``), or ``"re:"`` and a regular expression that matches
the name from its beginning. A pattern that matches a container selects all modules inside it.
Pruning and packing select their layers here; :mod:`flash_llm.roles` finds the layers that are left
alone by default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from flash_llm import roles
from flash_llm.linear import local_part

DEFAULT_TARGETS: tuple[str, ...] = ("Linear", "Conv1D")
DEFAULT_IGNORE: tuple[str, ...] = ("lm_head",)


def select_layers(
    model: nn.Module,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
) -> dict[str, nn.Module]:
    """Return the linear layers that ``targets`` match and ``ignore`` does not.

    Args:
        model: any module.
        targets: patterns, as :func:`sparsify_` takes them.
        ignore: patterns of the layers to leave out.

    Returns:
        ``nn.Linear`` (subclasses too) and Conv1D modules by name, in the model's order; a module
        with several names has the first.

    Raises:
        ValueError: a pattern that is not a default matches nothing, or a regular expression is
            invalid.
        TypeError: a pattern is not a string.
    """
    return {
        name: module
        for name, module, left_alone in match_layers(model, targets, ignore)
        if not left_alone
    }


def match_layers(
    model: nn.Module,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
) -> list[tuple[str, nn.Module, str]]:
    """Return the linear layers that ``targets`` match, and why some of them are left alone.

    Args:
        model: any module.
        targets: patterns, as :func:`sparsify_` takes them.
        ignore: patterns of the layers to leave alone.

    Returns:
        First name, module, and the reason why the module is left alone or "", in the model's order.

    Raises:
        ValueError: as :func:`select_layers`.
        TypeError: as :func:`select_layers`.
    """
    target_patterns = parse_patterns("targets", targets)
    ignore_patterns = parse_patterns("ignore", ignore)
    layers: dict[nn.Module, tuple[str, str | None]] = {}
    named: set[nn.Module] = set()  # targets of a pattern that is not a default
    hit: dict[str, set[str]] = {}  # name -> patterns that match the module or one that contains it
    seen: dict[str, nn.Module] = {}  # pattern -> the first module that it matched
    used: set[str] = set()  # target patterns that reached a linear layer
    for name, module in model.named_modules(remove_duplicate=False):
        here = {p for p in (*target_patterns, *ignore_patterns) if _matches(p, name, module)}
        for pattern in here:
            seen.setdefault(pattern, module)
        hit[name] = here | (hit[name.rpartition(".")[0]] if name else set())
        wanted = [p for p in target_patterns if p in hit[name]]
        if not wanted or not is_linear_layer(module):
            continue
        used.update(wanted)
        if not set(wanted) <= set(DEFAULT_TARGETS):
            named.add(module)
        ignored_by = next((p for p in ignore_patterns if p in hit[name]), None)
        # A module with several names is ignored if one of them is.
        first_name, earlier = layers.get(module, (name, None))
        layers[module] = (first_name, earlier or ignored_by)

    if targets == DEFAULT_TARGETS:
        if not layers:
            raise ValueError("flash_llm: the model has no nn.Linear or Conv1D")
    else:
        for pattern in target_patterns:
            if pattern not in used:
                other = seen.get(pattern)
                raise ValueError(
                    f'flash_llm: target "{pattern}" must match a linear layer, '
                    + (f"it matches {type(other).__name__}" if other else "it matches nothing")
                )
    if ignore != DEFAULT_IGNORE:
        for pattern in ignore_patterns:
            if pattern not in seen:
                raise ValueError(
                    f'flash_llm: ignore "{pattern}" must match a module, it matches nothing'
                )
    kinds = roles.routers_and_adapters(model)
    ties: dict[nn.Module, str] = {}
    if ignore == DEFAULT_IGNORE:
        kinds = {**roles.output_layers(model), **kinds}
        ties = {module: other for module, (_, other) in _ties(model, list(layers)).items()}
    matched = []
    for module, (name, ignored_by) in layers.items():
        left_alone = ""
        if ignored_by is not None:
            left_alone = f'ignored by "{ignored_by}"'
        elif module in named:
            pass
        elif module in kinds:
            left_alone = f"{kinds[module]}: left alone unless targets name it"
        elif module in ties:
            left_alone = f"tied to {ties[module]}: left alone"
        matched.append((name, module, left_alone))
    return matched


def parse_patterns(label: str, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return one pattern or several as a tuple.

    Args:
        label: name of the argument, for errors.
        patterns: as :func:`sparsify_` takes them.

    Raises:
        ValueError: the text after ``"re:"`` is not a regular expression.
        TypeError: a pattern is not a string.
    """
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"flash_llm: {label} must be strings, got {type(pattern).__name__}")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f'flash_llm: {label} "{pattern}" is not a regular expression: {error}'
                ) from None
    return listed


def matches_name(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module's dotted name; none matches "", the model itself."""
    if pattern.startswith("re:"):
        return bool(name) and re.match(pattern[3:], name) is not None
    return bool(name) and (name == pattern or name.endswith("." + pattern))


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    if matches_name(pattern, name):
        return True
    if pattern.startswith("re:"):
        return False
    # Without nn.Module, from which every module derives.
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    return any(cls.__name__ == pattern for cls in classes)


def is_linear_layer(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear``, a subclass of it, or a class named Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def refuse_tied(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], caller: str, consequence: str
) -> None:
    """Refuse to change layers whose weight is also another parameter of the model.

    Args:
        model: the model that has the layers.
        layers: names and modules that would be changed.
        caller: name of the calling function, for the error.
        consequence: of a change to one of two tied weights, for the error.

    Raises:
        ValueError: a weight is tied; the message names both parameters.
    """
    names = {layer: name for name, layer in layers}
    for layer, (key, other) in _ties(model, list(names)).items():
        name = names[layer]
        raise ValueError(
            f"{caller}: {name}.{key} is tied to {other}; {consequence}, so untie them or add "
            f'"{name}" to ignore'
        )


def _ties(model: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Module, tuple[str, str]]:
    """For each layer whose weight is another parameter too, its key and that parameter's name."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}  # by storage
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{module_name}.{key}" if module_name else key
                owners.setdefault(_storage(parameter), []).append((module, key, name))
    ties = {}
    for layer in layers:
        key = "weight" if "weight" in layer._parameters else "weight_orig"
        weight = layer._parameters.get(key)
        if weight is None:  # packed, or computed by a hook
            continue
        first, last = _byte_range(weight)
        for module, other_key, other in owners[_storage(weight)]:
            parameter = module._parameters[other_key]
            assert parameter is not None
            other_first, other_last = _byte_range(parameter)
            same = module is layer and other_key == key
            if not same and (parameter is weight or (first < other_last and other_first < last)):
                ties[layer] = key, other
                break
    return ties


def _storage(parameter: Tensor) -> int:
    # Tensors without memory (on the meta device, or empty) are distinguished by identity.
    address = 0 if parameter.is_meta else local_part(parameter).untyped_storage().data_ptr()
    return address or id(parameter)


def _byte_range(parameter: Tensor) -> tuple[int, int]:
    """First byte and one past the last, in the storage; (0, 0) for a tensor without elements."""
    parameter = local_part(parameter)
    if parameter.numel() == 0:
        return 0, 0
    sizes = zip(parameter.shape, parameter.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in sizes)
    first = int(parameter.storage_offset()) * parameter.element_size()
    return first, first + int(elements) * parameter.element_size()
