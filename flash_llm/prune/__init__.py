"""Pruning: methods that choose weights, and the driver that feeds them calibration statistics.

``prune_`` is what models need. For single tensors there are ``magnitude_mask`` and ``wanda_mask``,
and ``flash_llm.prune.sparsegpt.sparsegpt`` and ``flash_llm.prune.admm.admm``, which return new
weights.
"""

from flash_llm.prune.calibrate import prune_
from flash_llm.prune.criteria import magnitude_mask, wanda_mask
from flash_llm.prune.report import PrunedLayer, PruneRecipe, PruneReport

__all__ = ["PruneRecipe", "PruneReport", "PrunedLayer", "magnitude_mask", "prune_", "wanda_mask"]
