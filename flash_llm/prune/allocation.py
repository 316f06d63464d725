"""Allocation: how a target sparsity is distributed over the parts of a model. Pure functions.

OWL (outlier weighed layerwise sparsity: Yin et al., arXiv 2310.05175, section 3) prunes blocks less
if more of their Wanda scores ``|W_ij| * ||x_j||`` are outliers: larger than M times the mean. The
other method minimises the sum of the errors that the layers were measured to have at several
sparsities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from flash_llm.quantize import check_weight

OWL_THRESHOLD = 5.0
"""M: a score is an outlier above this multiple of the mean (the paper takes 5 or 7)."""
OWL_SPREAD = 0.08
"""lambda: a block's sparsity differs from the target by at most this (the paper's choice)."""
SENSITIVITY_SPREAD = 0.05
"""Likewise for the sparsity of a layer by measured errors. On SmolLM2-135M, pruned by Wanda and
calibrated on 8 x 512 tokens, perplexity at 50 | 60 % zeros: uniform 27.7 | 62.0, spread 0.05
26.9 | 64.3, 0.1 27.3 | 71.1, 1 (only the errors count) 34.2 | 72.7."""


def outlier_ratio(
    weights: Sequence[Tensor], norms: Sequence[Tensor], threshold: float = OWL_THRESHOLD
) -> float:
    """Fraction of outliers among the Wanda scores of all layers of a block.

    Args:
        weights: ``[M, K]`` floating point for each layer of the block.
        norms: ``[K]`` float32 L2 norm of each input channel, on the weight's device.
        threshold: M, the multiple of the block's mean score above which a score is an outlier.

    Returns:
        A fraction in [0, 1]; 0 for a block without weights.

    Raises:
        TypeError: a weight is not floating point.
        ValueError: a weight is not a matrix, the numbers of weights and norms differ, or
            ``threshold`` is not positive.

    Example:
        >>> import torch
        >>> outlier_ratio([torch.tensor([[1.0, 1.0, 1.0, 9.0]])], [torch.ones(4)], threshold=2.0)
        0.25
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    for weight in weights:
        check_weight(weight)
    count = sum(weight.numel() for weight in weights)
    if count == 0:
        return 0.0
    pairs = list(zip(weights, norms, strict=True))
    # The scores are computed twice, rather than kept for all layers at once.
    total = sum((w.float().abs() * norm).double().sum().item() for w, norm in pairs)
    limit = threshold * total / count
    return sum(int((w.float().abs() * norm > limit).sum()) for w, norm in pairs) / count


def owl_sparsities(
    ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = OWL_SPREAD
) -> list[float]:
    """Return the sparsity of each block by its outlier ratio: ``s_b = S - c * (D_b - mean D)``.

    The mean is weighted by the sizes, so that the sparsity of the whole is S; c is the largest that
    ``|s_b - S| <= spread`` allows. The authors' code scales the range of the s_b to twice lambda
    instead, so that a single outstanding block exceeds the bounds that their paper states.

    Args:
        ratios: D, the outlier ratio of each block (:func:`outlier_ratio`).
        sizes: number of weights of each block.
        sparsity: S, the target for all of them together, in [0, 1].
        spread: lambda; reduced where S is so close to 0 or 1 that a sparsity would leave [0, 1].

    Returns:
        The sparsities, in [0, 1]; all equal to S when the ratios are.

    Raises:
        ValueError: the numbers of ratios and sizes differ, a value is negative or not finite, or
            ``sparsity`` is outside [0, 1].

    Example:
        >>> [round(s, 3) for s in owl_sparsities([0.01, 0.02, 0.06], [1, 1, 1], 0.6)]
        [0.653, 0.627, 0.52]
    """
    if len(ratios) != len(sizes):
        raise ValueError(f"there must be one size per ratio, got {len(sizes)} and {len(ratios)}")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    for value in (*ratios, *sizes, spread):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"ratios, sizes and spread must be finite and not negative: {value}")
    mean = math.fsum(r * size for r, size in zip(ratios, sizes, strict=True)) / max(sum(sizes), 1)
    if not ratios or min(ratios) == max(ratios):
        return [sparsity] * len(ratios)
    slope = min(spread, sparsity, 1.0 - sparsity) / max(abs(ratio - mean) for ratio in ratios)
    return [min(max(sparsity - slope * (ratio - mean), 0.0), 1.0) for ratio in ratios]


def least_error_sparsities(
    levels: Sequence[float],
    errors: Sequence[Sequence[float]],
    sizes: Sequence[int],
    sparsity: float,
    spread: float = SENSITIVITY_SPREAD,
) -> list[float]:
    """Return the sparsities of the layers that minimise ``sum_l e_l(s_l)^2`` at the target.

    ``e_l`` is the relative error of a layer's outputs. Its square is known at the levels, 0 for a
    dense layer and 1 for an empty one; in between, the largest convex piecewise linear function
    below these points stands for it. For this function the minimum is exact: segments are pruned in
    the order of their cost per weight until the target is reached. The relative error of a layer
    says little about its effect on the model, so every sparsity stays close to the target.

    Args:
        levels: increasing sparsities in (0, 1).
        errors: per layer, the error at each level, finite and at least 0.
        sizes: number of weights of each layer, at least 1.
        sparsity: the target for all of them together, in [0, 1].
        spread: a layer's sparsity differs from the target by at most this, at least 0.

    Returns:
        The sparsities, in [0, 1].

    Raises:
        ValueError: a length or a value is wrong.

    Example:
        >>> least_error_sparsities([0.5], [[0.1], [0.6]], [10, 10], 0.25, spread=1.0)
        [0.5, 0.0]
        >>> [round(s, 2) for s in least_error_sparsities([0.5], [[0.1], [0.6]], [10, 10], 0.25)]
        [0.3, 0.2]
    """
    points = [0.0, *levels, 1.0]
    if any(not low < high for low, high in itertools.pairwise(points)):
        raise ValueError(f"levels must rise within (0, 1), got {list(levels)}")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    if len(errors) != len(sizes) or any(size < 1 for size in sizes):
        raise ValueError("there must be one size of at least 1 per layer")
    if not 0.0 <= spread < math.inf:
        raise ValueError(f"spread must be finite and not negative, got {spread}")
    least, most = max(sparsity - spread, 0.0), min(sparsity + spread, 1.0)
    for known in errors:
        if len(known) != len(levels) or not all(0.0 <= error < math.inf for error in known):
            raise ValueError(
                f"a layer must have {len(levels)} finite errors, not negative, got {list(known)}"
            )
    if least == most:
        return [sparsity] * len(sizes)
    segments = []
    for layer, (known, size) in enumerate(zip(errors, sizes, strict=True)):
        squares = [0.0, *(error * error for error in known), 1.0]
        hull = _between(_lower_hull([*zip(points, squares, strict=True)]), least, most)
        for (low, before), (high, after) in itertools.pairwise(hull):
            num_weights = (high - low) * size
            segments.append(((after - before) / num_weights, layer, low, high))
    left = (sparsity - least) * sum(sizes)
    found = [least] * len(sizes)
    for _, layer, low, high in sorted(segments):
        taken = min((high - low) * sizes[layer], left)
        left -= taken
        if taken > 0:
            found[layer] = min(found[layer] + taken / sizes[layer], 1.0)
    return found


def _between(
    corners: list[tuple[float, float]], least: float, most: float
) -> list[tuple[float, float]]:
    """Return the corners of a piecewise linear function restricted to ``[least, most]``."""

    def at(x: float) -> float:
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            if x <= x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return corners[-1][1]

    inside = [corner for corner in corners if least < corner[0] < most]
    return [(least, at(least)), *inside, (most, at(most))]


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points sorted by x (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
