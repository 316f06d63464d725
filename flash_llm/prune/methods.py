"""The table of pruning methods, which the drivers, ``sensitivity`` and the command line read.

To add a method, write its function in this folder and give it a row in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flash_llm.prune.admm import admm
from flash_llm.prune.criteria import magnitude_mask, wanda_mask
from flash_llm.prune.inputs import Inputs, Statistic, gram, squares
from flash_llm.prune.sparsegpt import sparsegpt


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        function: ``function(weight, sparsity, scope)``, or ``function(weight, of_inputs, sparsity,
            scope)`` if the method has a statistic. It returns the mask ``[M, K]`` of the weights
            that stay. If the method updates weights, it also takes ``damping=`` and
            ``preserve_mask=`` and returns the new weight.
        statistic: what the method needs to know about the inputs of a layer: None for nothing,
            :func:`squares` for the L2 norms of the channels (``of_inputs`` is ``[K]`` float32), or
            :func:`gram` for ``X X^T`` (``[K, K]`` float32).
        updates_weights: whether the weights that stay change as well. The statistic is then
            :func:`gram`.

    Raises:
        ValueError: the statistic is none of these.
    """

    function: Callable[..., Tensor]
    statistic: Statistic | None = None
    updates_weights: bool = False

    def __post_init__(self) -> None:
        # calibrate.py computes the error of a new weight from X X^T. sensitivity.py measures all
        # other methods with X X^T, from which both statistics follow.
        known = (gram,) if self.updates_weights else (None, squares, gram)
        if self.statistic not in known:
            expected = "gram" if self.updates_weights else "None, squares or gram"
            raise ValueError(
                f"the statistic of {self.function.__name__} must be {expected}, "
                f"got {self.statistic!r}"
            )

    def __call__(
        self,
        weight: Tensor,
        inputs: Inputs | None,
        sparsity: float | None,
        scope: str,
        **options: Any,
    ) -> Tensor:
        """Call the function with the statistic it needs, moved to the weight's device.

        Args:
            weight: ``[M, K]``.
            inputs: sums of the method's statistic, or of :func:`gram`, whose diagonal holds the
                squares; unused, and may be None, if the method has no statistic.
            sparsity: as in :func:`flash_llm.prune_`.
            scope: likewise.
            options: passed to the function.
        """
        if self.statistic is None:
            return self.function(weight, sparsity, scope, **options)
        assert inputs is not None
        of_inputs = inputs.norm if self.statistic is squares else inputs.total
        return self.function(weight, of_inputs.to(weight.device), sparsity, scope, **options)


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude_mask),
    "wanda": Method(wanda_mask, squares),
    "sparsegpt": Method(sparsegpt, gram, updates_weights=True),
    "admm": Method(admm, gram, updates_weights=True),
}
"""The methods by the name that :func:`flash_llm.prune_` takes, from the fastest to the slowest."""
