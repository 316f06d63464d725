"""Pruning: methods that choose weights, and the driver that collects statistics for them.

Models are pruned with ``prune_``. For single tensors, ``magnitude_mask`` and ``wanda_mask`` return
masks, and ``flash_llm.prune.sparsegpt.sparsegpt`` and ``flash_llm.prune.admm.admm`` new weights.
"""

from flash_llm.prune.calibrate import prune_
from flash_llm.prune.criteria import magnitude_mask, wanda_mask
from flash_llm.prune.report import PrunedLayer, PruneRecipe, PruneReport

__all__ = ["PruneRecipe", "PruneReport", "PrunedLayer", "magnitude_mask", "prune_", "wanda_mask"]
