"""SparseGPT: prune column by column, and update the later columns to compensate.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot"
(arXiv 2301.00774), section 3. The sweep over the columns is that of ``reconstruction.py``. Columns
are processed in blocks: the mask of a block is chosen when the sweep reaches it, and the columns
after it are updated once per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_llm.prune.criteria import (
    check_prune_target,
    drop_smallest,
    largest_mask,
    num_pruned,
)
from flash_llm.prune.reconstruction import damped_problem, inverse_factor, sweep_


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None,
    scope: str = "row",
    *,
    block_size: int = 128,
    damping: float = 0.01,
    preserve_mask: bool = False,
) -> Tensor:
    """Prune a weight and update the weights that stay (SparseGPT, arXiv 2301.00774, algorithm 1).

    The paper's unstructured mask is scope ``"layer"``: the fraction ``sparsity`` of each block of
    columns is pruned, anywhere in the block; with scope ``"row"``, the fraction of every row of the
    block. The counts of the blocks are rounded such that they add up to that of the matrix or row.

    Args:
        weight: ``[M, K]`` finite floating point, any device and strides; not changed.
        hessian: ``[K, K]`` float32 or float64 ``X X^T`` of the layer's inputs, on the weight's
            device. The sweep runs in its dtype, the factorisation in float64.
        sparsity: fraction of zeros in [0, 1] per group of ``scope``; None only for N:M.
        scope: ``"row"``, ``"layer"`` or ``"N:M"`` (the N of every M neighbouring columns stay).
        block_size: columns per block, rounded to a multiple of M for N:M.
        damping: fraction of the mean diagonal of the Hessian that is added to its diagonal.
        preserve_mask: weights that are zero stay zero and count as the first ones pruned.

    Returns:
        The new weight ``[M, K]``, contiguous, of the weight's dtype. Columns of dead inputs (zero
        on the Hessian's diagonal) are zero, beyond ``sparsity`` if need be.

    Raises:
        TypeError: a dtype is wrong, the devices differ, or an argument has the wrong type.
        ValueError: a shape or number is wrong, a value is not finite, the target is invalid
            (:func:`flash_llm.prune.criteria.check_prune_target`), or the damped Hessian is not
            positive definite (:class:`flash_llm.prune.reconstruction.SingularHessianError`).

    Example:
        >>> weight, inputs = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.1]])
        >>> sparsegpt(weight, inputs.T @ inputs, 0.5, damping=0.0)  # nearly equal inputs: 1 + 2
        tensor([[0.0000, 2.9502]])
    """
    group = check_prune_target(sparsity, scope)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if group is not None:
        block_size = max(1, block_size // group[1]) * group[1]
    choose_every = block_size if group is None else group[1]
    weights, damped = damped_problem(weight, hessian, damping)
    factor = inverse_factor(damped, damping)
    frozen = weight == 0 if preserve_mask else torch.zeros_like(weight, dtype=torch.bool)

    columns, frozen = weights.t().contiguous(), frozen.t()
    pruned = torch.empty_like(columns, dtype=torch.bool)

    def settle(j: int) -> Tensor:
        if j % choose_every == 0:
            chosen = slice(j, j + choose_every)
            cost = (columns[chosen] / factor.diagonal()[chosen, None]).abs()
            cost.masked_fill_(frozen[chosen], -1.0)
            kept = _most_costly_mask(cost.t(), sparsity, scope, j).t()
            pruned[chosen] = ~kept | frozen[chosen]
        return columns[j].masked_fill(pruned[j], 0.0)

    sweep_(columns, factor, block_size, settle)
    return columns.t().to(weight.dtype).contiguous()


def _most_costly_mask(cost: Tensor, sparsity: float | None, scope: str, begin: int) -> Tensor:
    """Return the mask of the weights that stay, of the columns from ``begin`` on."""
    if sparsity is None or ":" in scope:
        return largest_mask(cost, None, scope)
    rows, end = cost.shape[0], begin + cost.shape[1]
    if scope == "row":
        return drop_smallest(cost, num_pruned(sparsity, end) - num_pruned(sparsity, begin))
    count = num_pruned(sparsity, rows * end) - num_pruned(sparsity, rows * begin)
    return drop_smallest(cost.reshape(1, -1), count).view(cost.shape)
