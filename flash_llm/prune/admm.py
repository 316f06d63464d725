"""ADMM: choose mask and weights of a layer together, then solve exactly for the weights that stay.

Meng, Behdin, Wang and Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
Large Language Models" (arXiv 2406.07831), sections 3.1 to 3.3. The weight is split into a copy B
that minimises the reconstruction error and a copy D that is sparse; a dual V and a penalty rho pull
the two together::

    B = (W H - V + rho D) (H + rho I)^-1
    D = the largest elements of B + V / rho, as many as may stay
    V = V + rho (B - D)

H is eigendecomposed once, so that a change of rho costs one product. rho grows while the support of
D changes, and faster if more of it changes. Once the support is stable, conjugate gradients find
the best weights on it, for all rows together. The problem is scaled so that H has a unit diagonal:
inputs are divided by their norms and weights multiplied by them. So the first mask is Wanda's, and
conjugate gradients are preconditioned by the diagonal (the paper's choice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_llm.prune.criteria import check_prune_target, largest_mask
from flash_llm.prune.reconstruction import SingularHessianError, damped_problem

FIRST_RHO = 0.1
"""Penalty at the start, relative to the unit diagonal (paper, section 3.2)."""
SMALLEST_RHO = 1e-4
"""If the support hardly changes at the start, rho is divided by 5 and the search restarted, as long
as rho is above this."""
RHO_EVERY = 3
"""Iterations between two checks of the support."""
RHO_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(fraction, factor): rho grows by factor when more than fraction of the support changed. The first
pair that applies counts (paper, section 3.2)."""
STABLE_AFTER = 30
"""Iterations after which a change of less than the fraction ``STABLE`` of the support ends the
search."""
STABLE = 3e-4
MAX_ITERATIONS = 300
MAX_SOLVE_ITERATIONS = 500


def admm(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None,
    scope: str = "row",
    *,
    damping: float = 0.01,
    preserve_mask: bool = False,
) -> Tensor:
    """Prune a weight by ADMM and solve for what stays (ALPS, arXiv 2406.07831, algorithm 1).

    The paper prunes over the whole layer (scope ``"layer"``) or N:M, but the method works with any
    scope: the scope only defines the projection D.

    Args:
        weight: ``[M, K]`` finite floating point, any device and strides; not changed.
        hessian: ``[K, K]`` float32 or float64 ``X X^T`` of the layer's inputs, on the weight's
            device. Iterations run in its dtype, the eigendecomposition in float64.
        sparsity: fraction of zeros in [0, 1] per group of ``scope``; None only for N:M.
        scope: ``"row"``, ``"layer"`` or ``"N:M"`` (the N of every M neighbouring columns stay).
        damping: fraction of the mean diagonal of the Hessian that is added to its diagonal.
        preserve_mask: weights that are zero stay zero and count as the first ones pruned.

    Returns:
        The new weight ``[M, K]``, contiguous, of the weight's dtype. On its support it minimises
        the damped reconstruction error, to a relative residual of the square root of the dtype's
        epsilon. Columns of dead inputs (zero on the Hessian's diagonal) are zero, beyond
        ``sparsity`` if need be.

    Raises:
        TypeError: a dtype is wrong, the devices differ, or an argument has the wrong type.
        ValueError: a shape or number is wrong, a value is not finite, the target is invalid
            (:func:`flash_llm.prune.criteria.check_prune_target`), or the damped Hessian is not
            positive definite (:class:`flash_llm.prune.reconstruction.SingularHessianError`).

    Example:
        >>> weight = torch.tensor([[1.0, 2.0, 0.5]])
        >>> hessian = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> admm(weight, hessian, 0.34, damping=0.0)  # the second input stands in for the first
        tensor([[0.0000, 2.9500, 0.5000]])
    """
    check_prune_target(sparsity, scope)
    target, damped = damped_problem(weight, hessian, damping)
    scale = damped.diagonal().sqrt()
    unit = damped / scale / scale[:, None]
    target *= scale
    frozen = weight == 0 if preserve_mask else torch.zeros_like(weight, dtype=torch.bool)

    keep = _find_support(target, unit, sparsity, scope, frozen, damping)
    solved = _solve_on_support(target, unit, keep)
    return (solved / scale).to(weight.dtype)


def _find_support(
    target: Tensor,
    unit: Tensor,
    sparsity: float | None,
    scope: str,
    frozen: Tensor,
    damping: float,
) -> Tensor:
    """Return the mask ``[M, K]`` of the weights that stay, found by ADMM."""
    eigenvalues, vectors = torch.linalg.eigh(unit.double())
    if bool((eigenvalues <= 0).any()):
        raise SingularHessianError(damping)

    # The iterations run in the dtype of H: the product takes a third of the time of a wide layer.
    eigenvalues, vectors = eigenvalues.to(unit.dtype), vectors.to(unit.dtype)

    def shifted_inverse(rho: float) -> Tensor:
        inverse: Tensor = (vectors / (eigenvalues + rho)) @ vectors.t()
        return inverse

    def project(candidate: Tensor) -> Tensor:
        score = candidate.abs().masked_fill_(frozen, -1.0)
        return largest_mask(score, sparsity, scope) & ~frozen

    gradient = target @ unit
    start = project(target)
    num_kept = max(int(start.sum()), 1)
    rho, inverse = FIRST_RHO, shifted_inverse(FIRST_RHO)
    keep, sparse, dual = start, target * start, torch.zeros_like(target)
    before, moving = start, False
    for iteration in range(1, MAX_ITERATIONS + 1):
        dense = (gradient - dual).add_(sparse, alpha=rho) @ inverse
        candidate = dense.add_(dual, alpha=1.0 / rho)
        keep = project(candidate)
        sparse = candidate * keep
        dual = candidate.sub_(sparse).mul_(rho)
        if iteration % RHO_EVERY:
            continue
        changed = int((keep != before).sum()) / num_kept
        before = keep
        moving |= changed > RHO_GROWTH[1][0]
        if moving:
            if changed == 0 or (iteration >= STABLE_AFTER and changed < STABLE):
                break
            rho *= next(factor for least, factor in RHO_GROWTH if changed > least)
        elif rho > SMALLEST_RHO:
            rho /= 5
            keep, sparse, dual = start, target * start, torch.zeros_like(target)
            before = start
        else:
            break
        inverse = shifted_inverse(rho)
    return keep


def _solve_on_support(target: Tensor, unit: Tensor, keep: Tensor) -> Tensor:
    """Minimise ``(w - t) H (w - t)^T`` for each row over the w that are zero where not kept."""
    solution = target * keep
    residual = ((target - solution) @ unit) * keep
    direction = residual.clone()
    energy = residual.square().sum(dim=1, keepdim=True)
    tiny = torch.finfo(unit.dtype).tiny
    tolerance = torch.finfo(unit.dtype).eps * ((target @ unit) * keep).square().sum(1, keepdim=True)
    for _ in range(MAX_SOLVE_ITERATIONS):
        if bool((energy <= tolerance).all()):
            break
        image = (direction @ unit) * keep
        step = energy / (direction * image).sum(dim=1, keepdim=True).clamp(min=tiny)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1.0)
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(energy / before.clamp(min=tiny)).add_(residual)
    return solution
