"""Layer-wise reconstruction: the quadratic problem that ``sparsegpt.py`` and ``admm.py`` solve.

A layer ``y = W x`` with weight ``W [M, K]`` is pruned such that the change of its outputs on the
calibration tokens ``X [K, T]`` is minimal. It depends on the tokens only by ``H = X X^T [K, K]``::

    |W X - W' X|^2 = tr((W - W') H (W - W')^T)

H is called the Hessian, as in the papers (theirs has a factor of 2, which changes nothing). With
fewer tokens than channels it is only semidefinite, so a fraction of its mean diagonal is added.
"""

from __future__ import annotations

import math

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
