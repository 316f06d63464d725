"""Pruning criteria: pure functions from a weight and input statistics to the mask of what stays.

A mask is a boolean ``[M, K]`` tensor, True where the weight stays. Scores are compared in float32.
Of equal scores the first in row-major order is pruned first, so every mask has an exact count and
is the same on all devices; ``csrc/format/prune.h`` (``prune_pack``) follows the same rules. Nothing
here knows about modules: hooks and the layer-by-layer driver are in ``calibrate.py``. Methods that
also update the weights that stay have files of their own (``sparsegpt.py``, ``admm.py``) and select
weights by the functions at the end of this one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flash_llm.quantize import check_weight

MAX_PRUNE_GROUP = 64
"""Largest M of a scope ``"N:M"``, the limit of ``csrc/format/prune.h``."""


def num_pruned(sparsity: float, count: int) -> int:
    """Return the number of elements to prune: ``sparsity * count``, rounded half up."""
    return min(count, math.floor(sparsity * count + 0.5))


def check_prune_target(sparsity: float | None, scope: str) -> tuple[int, int] | None:
    """Check a pruning target before any weight is touched.

    Args:
        sparsity: fraction of zeros in [0, 1]; may be None for an N:M scope, which implies it.
        scope: ``"row"``, ``"layer"`` or ``"N:M"`` (keep the N largest of every M columns).

    Returns:
        ``(N, M)`` for an N:M scope, otherwise None.

    Raises:
        TypeError: ``sparsity`` is not a number or ``scope`` not a string.
        ValueError: ``sparsity`` is outside [0, 1] or NaN, missing, or contradicts the N:M scope;
            ``scope`` is none of the three.
    """
    if sparsity is not None:
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
            raise TypeError(f"sparsity must be a number in [0, 1], got {type(sparsity).__name__}")
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
    if not isinstance(scope, str):
        raise TypeError(f"scope must be a string, got {type(scope).__name__}")
    if scope in ("row", "layer"):
        if sparsity is None:
            raise ValueError(f'sparsity must be given for scope "{scope}"')
        return None
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", scope)
    keep, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= keep <= group <= MAX_PRUNE_GROUP:
        raise ValueError(
            f'scope must be "row", "layer" or "N:M" with 1 <= N <= M <= {MAX_PRUNE_GROUP}, '
            f'got "{scope}"'
        )
    implied = 1.0 - keep / group
    if sparsity is not None and abs(sparsity - implied) > 1e-9:
        raise ValueError(
            f'sparsity must be {implied} for scope "{scope}" (or left out), got {sparsity}'
        )
    return keep, group


def magnitude_mask(weight: Tensor, sparsity: float | None, scope: str = "row") -> Tensor:
    """Return the mask of the weights of largest magnitude ``|W|``.

    Args:
        weight: ``[M, K]`` floating point, any device and strides.
        sparsity: fraction of zeros in [0, 1] per group of ``scope``; None only for N:M.
        scope: ``"row"`` (the fraction holds in every row), ``"layer"`` (over the matrix) or
            ``"N:M"`` (the N largest of every M neighbouring columns stay).

    Returns:
        Boolean ``[M, K]`` on the weight's device, True where the weight stays.

    Raises:
        TypeError: ``weight`` is not floating point, or an argument has the wrong type.
        ValueError: ``weight`` is not a matrix, or the target is invalid
            (:func:`check_prune_target`).

    Example:
        >>> magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), sparsity=0.5)
        tensor([[False,  True,  True, False]])
    """
    check_weight(weight)
    return largest_mask(weight.float().abs(), sparsity, scope)


def global_magnitude_masks(weights: Sequence[Tensor], sparsity: float) -> Iterator[Tensor]:
    """Yield the masks of the weights of largest magnitude, with one threshold for all matrices.

    The threshold is found from two histograms of the bits of ``|W|`` in float32, whose order as
    integers is that of the numbers, so that no copy of all weights is needed.

    Args:
        weights: ``[M, K]`` floating point matrices of any shapes, strides and devices.
        sparsity: fraction of zeros in [0, 1] over all of them together.

    Yields:
        For each matrix, in order, its mask: boolean ``[M, K]`` on its device, True where the weight
        stays. Of equal magnitudes at the threshold the first are pruned, in the order of the
        matrices and row-major in each. A matrix may be masked before the next mask is taken.

    Raises:
        TypeError: a weight is not floating point, or ``sparsity`` not a number.
        ValueError: a weight is not a matrix, or ``sparsity`` is outside [0, 1].

    Example:
        >>> weights = [torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 0.25]])]
        >>> [mask.tolist() for mask in global_magnitude_masks(weights, 0.5)]
        [[[True, True]], [[False, False]]]
    """
    check_prune_target(sparsity, "layer")
    for weight in weights:
        check_weight(weight)
    count = num_pruned(sparsity, sum(weight.numel() for weight in weights))

    def bits(weight: Tensor) -> Tensor:
        return weight.float().abs().contiguous().view(torch.int32)

    def histogram(high: int | None) -> Tensor:
        """Count the high 15 bits, or the low 16 bits of the elements with the given high bits."""
        bins = 1 << 15 if high is None else 1 << 16
        total = torch.zeros(bins, dtype=torch.int64)
        for weight in weights:
            found = bits(weight).flatten()
            found = found >> 16 if high is None else found[found >> 16 == high] & 0xFFFF
            total += torch.bincount(found, minlength=bins).cpu()
        return total

    def split(counts: Tensor, below: int) -> tuple[int, int]:
        """Return the bin of element number ``below``, and the count of the bins before it."""
        ends = counts.cumsum(0)
        index = int(torch.searchsorted(ends, below, right=True).clamp_(max=counts.numel() - 1))
        return index, int(ends[index] - counts[index])

    high, before_high = split(histogram(None), count)
    low, before_low = split(histogram(high), count - before_high)
    threshold, ties = (high << 16) | low, count - before_high - before_low
    for weight in weights:
        magnitude = bits(weight)
        tied = magnitude == threshold
        # The first ``ties`` equal elements are pruned, over all matrices.
        dropped = tied & (tied.flatten().cumsum(0).view(tied.shape) <= ties)
        ties -= int(dropped.sum())
        yield (magnitude >= threshold) & ~dropped


def wanda_mask(
    weight: Tensor, input_norm: Tensor, sparsity: float | None, scope: str = "row"
) -> Tensor:
    """Return the mask of the weights of largest ``|W_ij| * ||x_j||_2`` (Wanda, arXiv 2306.11695).

    A weight matters if both it and its input are large (section 3). The paper compares the scores
    within one output row, which is the default scope here.

    Args:
        weight: ``[M, K]`` floating point, any device and strides.
        input_norm: ``[K]`` L2 norm of each input channel over the calibration tokens, on the
            weight's device.
        sparsity: fraction of zeros in [0, 1] per group of ``scope``; None only for N:M.
        scope: ``"row"``, ``"layer"`` or ``"N:M"`` as in :func:`magnitude_mask`.

    Returns:
        Boolean ``[M, K]`` on the weight's device, True where the weight stays.

    Raises:
        TypeError: a tensor is not floating point, the devices differ, or an argument has the wrong
            type.
        ValueError: a shape is wrong, ``input_norm`` is negative or not finite, or the target is
            invalid (:func:`check_prune_target`).

    Example:
        >>> weight = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> wanda_mask(weight, torch.tensor([9.0, 1.0, 1.0, 9.0]), sparsity=0.5)
        tensor([[ True, False, False,  True]])
    """
    check_weight(weight)
    if not input_norm.is_floating_point():
        raise TypeError(f"input_norm must be floating point, got {input_norm.dtype}")
    if input_norm.device != weight.device:
        raise TypeError(f"input_norm must be on {weight.device}, got {input_norm.device}")
    if input_norm.shape != (weight.shape[1],):
        raise ValueError(
            f"input_norm must have shape [K={weight.shape[1]}], got {list(input_norm.shape)}"
        )
    norm = input_norm.float()
    if not bool(((norm >= 0) & norm.isfinite()).all()):
        raise ValueError("input_norm must be finite and not negative")
    return largest_mask(weight.float().abs() * norm, sparsity, scope)


def largest_mask(score: Tensor, sparsity: float | None, scope: str) -> Tensor:
    """Return the mask of the largest scores of each group of the scope.

    Args:
        score: ``[M, K]``, at least -1; NaN counts as largest.
        sparsity: fraction of zeros in [0, 1] per group of ``scope``; None only for N:M.
        scope: ``"row"``, ``"layer"`` or ``"N:M"`` as in :func:`magnitude_mask`.

    Returns:
        Boolean ``[M, K]``, True where the score is kept.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the target is invalid (:func:`check_prune_target`).
    """
    rows, cols = score.shape
    group = check_prune_target(sparsity, scope)
    if group is not None:
        keep, size = group
        # A shorter last group of g columns keeps min(keep, g): the padding is smaller than every
        # score and so is pruned first.
        padded = torch.nn.functional.pad(score, (0, -cols % size), value=-2.0)
        kept = drop_smallest(padded.reshape(-1, size), size - keep)
        return kept.view(padded.shape)[:, :cols].contiguous()
    assert sparsity is not None  # checked by check_prune_target
    if scope == "layer":
        return drop_smallest(score.reshape(1, -1), num_pruned(sparsity, rows * cols)).reshape(
            rows, cols
        )
    return drop_smallest(score, num_pruned(sparsity, cols))


def drop_smallest(score: Tensor, count: int) -> Tensor:
    """Return the mask without the ``count`` smallest scores of each row, the first of equal ones.

    Args:
        score: ``[M, K]``; NaN counts as largest.
        count: scores to drop, in [0, K].

    Returns:
        Boolean ``[M, K]``, True where the score is kept.
    """
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, count)
    larger = score > threshold
    if bool((larger.sum(dim=1) == score.shape[1] - count).all()):
        return larger  # no ties at the threshold, and no NaN
    nan, all_nan = score.isnan(), threshold.isnan()
    larger = (score > threshold) | (nan & ~all_nan)
    tied = (score == threshold) | (nan & all_nan)
    drop_tied = count - (score.shape[1] - (larger | tied).sum(dim=1, keepdim=True))
    return larger | (tied & (tied.cumsum(dim=1) > drop_tied))


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of each row of ``[M, K]``, as ``[M, 1]``; NaN counts as largest.

    ADMM needs it in each iteration. 1536 x 576 in float32 on 2 cores of a Xeon: a stable sort takes
    30 ms, torch's kthvalue 8.6, topk 6.9, and numpy's partition 2.6 on one core.
    """
    one_thread_is_faster = score.shape[0] == 1 or torch.get_num_threads() <= 4
    if score.device.type == "cpu" and score.dtype == torch.float32 and one_thread_is_faster:
        ordered = np.partition(score.detach().numpy(), k - 1, axis=1)
        return torch.from_numpy(ordered[:, k - 1 : k].copy())
    smallest = score.topk(k, dim=1, largest=False, sorted=False).values
    return smallest.amax(dim=1, keepdim=True)
