"""Layer-wise reconstruction: the quadratic problem that the methods which change weights solve.

A layer ``y = W x`` with weight ``W [M, K]`` is pruned such that the change of its outputs on the
calibration tokens ``X [K, T]`` is minimal. It depends on the tokens only by ``H = X X^T [K, K]``::

    |W X - W' X|^2 = tr((W - W') H (W - W')^T)

H is called the Hessian, as in the papers (theirs has a factor of 2, which changes nothing). With
fewer tokens than channels it is only semidefinite, so a fraction of its mean diagonal is added.

``sparsegpt.py`` and ``gptq.py`` give the columns new values from left to right. With U the
upper triangular factor of the inverse, ``H^-1 = U^T U``, optimal brain surgery on the columns from
j on needs only row j of U: to change ``W_ij`` to v costs ``((W_ij - v) / U_jj)^2`` after the best
compensation by the columns that follow::

    W_i,j: -= ((W_ij - v) / U_jj) U_j,j:

so one Cholesky factor serves all rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_llm.prune.criteria import check_weight


def damped_problem(weight: Tensor, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Check a reconstruction problem and make it positive definite.

    Args:
        weight: ``[M, K]`` finite floating point.
        hessian: ``[K, K]`` float32 or float64 ``X X^T`` on the weight's device, symmetric.
        damping: fraction of the mean diagonal to add to the diagonal, at least 0.

    Returns:
        A copy of the weight in the Hessian's dtype, and the damped Hessian. Weights of dead inputs
        (zero on every token) become zero, since no output depends on them. The diagonal entry of a
        dead input, whose other entries in the Hessian are zero, is set to the mean of the others.

    Raises:
        TypeError: a dtype is wrong, or the devices differ.
        ValueError: a shape is wrong, a value is not finite, or ``damping`` is negative.
    """
    check_weight(weight)
    if hessian.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hessian must be float32 or float64, got {hessian.dtype}")
    if hessian.device != weight.device:
        raise TypeError(f"hessian must be on {weight.device}, got {hessian.device}")
    cols = weight.shape[1]
    if hessian.shape != (cols, cols):
        raise ValueError(f"hessian must have shape [K={cols}, {cols}], got {list(hessian.shape)}")
    if not 0.0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and at least 0, got {damping}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite")
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()) or bool((diagonal < 0).any()):
        raise ValueError("hessian must be finite, and its diagonal not negative")

    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    damped = hessian.clone()
    damped.diagonal().add_(dead * mean + damping * mean)
    return weight.to(hessian.dtype).masked_fill(dead, 0.0), damped


def inverse_factor(damped: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with ``H^-1 = U^T U``, in the dtype of H.

    The lower Cholesky factor of H with rows and columns in reverse order becomes, reversed again,
    an upper triangular V with ``H = V V^T``; U is the inverse of V.

    Raises:
        SingularHessianError: the damped Hessian is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(damped.double().flip(0, 1))
    if bool(failed):
        raise SingularHessianError(damping)
    upper = lower.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse.to(damped.dtype)


def sweep_(
    columns: Tensor, factor: Tensor, block_size: int, settle: Callable[[int], Tensor]
) -> None:
    """Give the columns new values from left to right, each compensated by those that follow.

    Args:
        columns: ``[K, M]`` the transposed weight, so that columns are contiguous; changed in place.
        factor: ``[K, K]`` from :func:`inverse_factor`.
        block_size: the columns of a block are compensated at once, later columns once per block.
        settle: called with 0, 1, … K - 1, returns the new values ``[M]`` of this column. It may
            read ``columns``, which are up to date from this column to the end of its block, and
            everywhere at the first column of a block.
    """
    for begin in range(0, len(columns), block_size):
        block = columns[begin : begin + block_size]
        end = begin + len(block)
        triangle = factor[begin:end, begin:end]
        errors = torch.empty_like(block)
        for j in range(len(block)):
            settled = settle(begin + j)
            torch.sub(block[j], settled, out=errors[j]).div_(triangle[j, j])
            block[j] = settled
            block[j + 1 :].addr_(triangle[j, j + 1 :], errors[j], alpha=-1)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)


class SingularHessianError(ValueError):
    """A Hessian is not positive definite in spite of damping."""

    def __init__(self, damping: float) -> None:
        super().__init__(
            f"hessian must be positive definite after a damping of {damping}; raise damping, or "
            "calibrate on more tokens"
        )


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """Return the relative change of the outputs, ``|W X - W' X| / |W X|`` in the Frobenius norm.

    Args:
        weight: ``[M, K]`` floating point, before pruning.
        pruned: ``[M, K]``, after pruning.
        hessian: ``[K, K]`` float32 or float64 ``X X^T``, not damped.

    Returns:
        0 for unchanged outputs, 1 if all outputs became zero; 0 if they were zero before.

    Example:
        >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), torch.eye(2))
        0.6
    """

    def energy(matrix: Tensor) -> float:
        matrix = matrix.to(hessian.dtype)
        return ((matrix @ hessian) * matrix).sum(dtype=torch.float64).item()

    difference = energy(weight.to(hessian.dtype) - pruned.to(hessian.dtype))
    before = energy(weight)
    return math.sqrt(max(difference, 0.0) / before) if before > 0 else 0.0
