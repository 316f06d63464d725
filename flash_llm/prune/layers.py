"""The layers to prune: their weights as matrices, and the checks before any weight changes."""

from __future__ import annotations

from torch import Tensor, nn

from flash_llm.linear import SparseLinear, is_conv1d
from flash_llm.prune.inputs import Inputs
from flash_llm.select import refuse_tied


def matrix(layer: nn.Module) -> Tensor:
    """Return a view ``[M, K]`` of the weight; GPT-2's Conv1D stores it transposed."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t() if is_conv1d(layer) else weight


def check_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Check the weights of layers that are about to be pruned.

    Args:
        model: the model that the layers are part of.
        layers: linear layers by name.

    Raises:
        TypeError: a layer is packed, or a weight is not a floating point parameter.
        ValueError: a weight is not a matrix, on the meta device, not finite, or tied to another
            module; the message names the layer.
    """
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            raise TypeError(
                f"flash_llm: {name} is packed already; prune and recover before packing"
            )
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(
                f"flash_llm: {name}.weight must be a floating point parameter, got {found}"
            )
        if weight.dim() != 2:
            raise ValueError(f"flash_llm: {name}.weight must be a matrix, got {list(weight.shape)}")
        if weight.is_meta:
            raise ValueError(
                f"flash_llm: {name}.weight is on the meta device; load the weights first"
            )
        if not bool(weight.isfinite().all()):
            raise ValueError(f"flash_llm: {name}.weight must be finite, it holds NaN or Inf")
    refuse_tied(model, list(layers.items()), "flash_llm", "pruning one would prune the other")


def check_inputs(name: str, inputs: Inputs, weight: Tensor) -> None:
    """Check the statistic of a layer's inputs.

    Raises:
        ValueError: the statistic is not finite.
    """
    if not bool(inputs.total.isfinite().all()):
        raise ValueError(
            f"flash_llm: the calibration inputs of {name} are not finite; the model overflows in "
            f"{weight.dtype} on this text"
        )
