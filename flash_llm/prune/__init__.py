"""Pruning: criteria that choose weights, and the driver that feeds them calibration statistics."""

from flash_llm.prune.calibrate import PrunedLayer, PruneReport, prune_
from flash_llm.prune.criteria import magnitude_mask, wanda_mask

__all__ = ["PruneReport", "PrunedLayer", "magnitude_mask", "prune_", "wanda_mask"]
