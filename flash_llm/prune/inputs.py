"""Statistics of the layers' inputs over the calibration tokens, collected by hooks.

Layers that are called with the same tensor, such as the projections to queries, keys and values,
share one statistic: sums are replaced and never changed in place, and a layer that would add the
same tensor to the same sum as the layer before it reuses that result. Layers whose inputs differ
later continue with sums of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Statistic = Callable[[Tensor], Tensor]
"""Maps tokens ``[T, K]`` of any dtype to a tensor that is summed over all tokens."""


def squares(tokens: Tensor) -> Tensor:
    """Return the sum of squares of each channel, ``[K]`` float64; squared in float32."""
    return tokens.float().square().sum(dim=0).double()


def gram(tokens: Tensor) -> Tensor:
    """Return ``X X^T [K, K]``, multiplied in float32; the columns of X are the tokens.

    Sums over samples stay in float32: with products and sums in float64 the reconstruction errors
    of four layers of SmolLM2 (sparsity 0.6, 2048 tokens) differed by less than 3e-4 of themselves.
    """
    x = tokens.float()
    return x.t() @ x


@dataclass(frozen=True, eq=False)
class Inputs:
    """A statistic over the inputs that one or more layers saw.

    Attributes:
        total: sum of :func:`squares` or of :func:`gram`.
        num_tokens: number of tokens in the sum, at least 1.
    """

    total: Tensor
    num_tokens: int

    @property
    def norm(self) -> Tensor:
        """L2 norm of each channel, ``[K]`` float32."""
        squared = self.total if self.total.dim() == 1 else self.total.diagonal()
        return squared.sqrt().float()


class _Sums:
    """The sum of each layer, and the last addition."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.inputs: dict[str, Inputs] = {}
        self.last: tuple[Tensor, int, Inputs | None, Inputs] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Add the tokens ``x [..., K]`` to the sum of the layer ``name``."""
        if x.numel() == 0:
            return
        before = self.inputs.get(name)
        # Tensors of inference mode do not record changes in place.
        version = -1 if x.is_inference() else x._version
        if self.last is not None and version >= 0:
            tensor, last_version, start, result = self.last
            if tensor is x and last_version == version and start is before:
                self.inputs[name] = result
                return
        tokens = x.detach().reshape(-1, x.shape[-1])
        total = self.statistic(tokens)
        if before is None:
            result = Inputs(total, len(tokens))
        else:
            result = Inputs(before.total + total, before.num_tokens + len(tokens))
        self.inputs[name] = result
        self.last = (x, version, before, result)


@contextlib.contextmanager
def collect_inputs(
    layers: dict[str, nn.Module], statistic: Statistic
) -> Iterator[dict[str, Inputs]]:
    """Collect a statistic of the inputs of ``layers`` from every forward pass inside the context.

    Args:
        layers: modules by name, each called with its input ``[..., K]`` as the first argument.
        statistic: :func:`squares` or :func:`gram`.

    Yields:
        Inputs by the names of the layers; a layer that no token has reached is missing. Layers that
        saw the same tensors in the same calls hold the same object.
    """
    sums = _Sums(statistic)
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():

            def add(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                sums.add(name, args[0])

            hooks.callback(layer.register_forward_pre_hook(add).remove)
        yield sums.inputs
        sums.last = None
