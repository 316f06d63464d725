"""GPTQ: round the weights column by column, and let the later columns compensate.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (arXiv 2210.17323), on a support: the sweep of ``reconstruction.py``
rounds the weights that are not zero and puts all others back to zero. Errors add up linearly, so
the result for SparseGPT's weight is what its sweep would give if it rounded every column as it
passes, with the same mask; and for ADMM's, whose error is orthogonal to every change on its
support, it is a back-solve on the grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_llm.prune.grids import Grid, grid_of
from flash_llm.prune.reconstruction import damped_problem, inverse_factor, sweep_

BLOCK_SIZE = 128
"""Columns per block of the sweep where a scale covers the whole row."""


def gptq(weight: Tensor, hessian: Tensor, values: str, *, damping: float = 0.01) -> Tensor:
    """Round a weight to a grid such that the layer's outputs change little; zeros stay zeros.

    The scales of a group of columns are chosen when the sweep reaches it, for the least error. The
    weight of largest magnitude in the group is rounded to the end of the grid, so that the scale
    can be computed from the result (:mod:`flash_llm.prune.grids`); on layers of SmolLM2 this costs
    nothing.

    Args:
        weight: ``[M, K]`` finite floating point, any device and strides; not changed.
        hessian: ``[K, K]`` float32 or float64 ``X X^T`` of the layer's inputs, on the weight's
            device. The sweep runs in its dtype, the factorisation in float64.
        values: one of :data:`flash_llm.prune.grids.GRIDS`.
        damping: fraction of the mean diagonal of the Hessian that is added to its diagonal.

    Returns:
        The new weight ``[M, K]``, contiguous, of the weight's dtype, on the grid. Columns of dead
        inputs (zero on the Hessian's diagonal) are zero. NaN where a scale overflows.

    Raises:
        TypeError: a dtype is wrong, or the devices differ.
        ValueError: a shape or number is wrong, a value is not finite, ``values`` is unknown, or the
            damped Hessian is not positive definite
            (:class:`flash_llm.prune.reconstruction.SingularHessianError`).

    Example:
        >>> weight, inputs = torch.tensor([[127.0, 2.4, 2.2]]), torch.ones(1, 3)
        >>> gptq(weight, inputs.T @ inputs, "int8")  # the third input stands in for the second
        tensor([[127.,   2.,   3.]])
    """
    grid = grid_of(values)
    weights, damped = damped_problem(weight, hessian, damping)
    factor = inverse_factor(damped, damping)
    importance = factor.diagonal().pow(-2)
    columns = weights.t().contiguous()
    zero = columns == 0
    size = grid.group or max(len(columns), 1)
    rounders: list[Callable[[int, Tensor], Tensor]] = []

    def settle(j: int) -> Tensor:
        within = j % size
        if within == 0:
            group = columns[j : j + size].masked_fill(zero[j : j + size], 0.0)
            rounders.append(_rounder(grid, group, weight.dtype, importance[j : j + size]))
        return rounders[-1](within, columns[j]).masked_fill_(zero[j], 0.0)

    sweep_(columns, factor, grid.group or BLOCK_SIZE, settle)
    return columns.t().to(weight.dtype).contiguous()


def _rounder(
    grid: Grid, group: Tensor, dtype: torch.dtype, importance: Tensor
) -> Callable[[int, Tensor], Tensor]:
    """Return the function that rounds a column of a group, by its index there and its values."""
    scaled = grid.fit(group, dtype, importance)
    if grid.has_zero_point:
        return lambda _, column: scaled.round(column)
    largest = group.abs().argmax(dim=0)
    # Where even the largest weight rounds to zero, no weight is moved to the end of the grid.
    sign = scaled.round(group.gather(0, largest[None])[0]).sign()
    end = scaled.scale * sign * grid.largest
    return lambda i, column: torch.where(largest == i, end, scaled.round(column))
