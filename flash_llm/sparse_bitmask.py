"""Read weights in the format ``sparse-bitmask`` that compressed-tensors wrote until 2026.

It keeps a bit for every element and the values of the others one after the other: instead of
``L.weight`` a file has ``L.shape`` int64, ``L.bitmask`` uint8[..., ceil(K / 8)], the lowest bit
first, ``L.compressed`` with the values, and ``L.row_offsets``, which the bits imply.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flash_llm.checkpoint import Checkpoint

PARTS = (".shape", ".bitmask", ".compressed", ".row_offsets")
FORMAT = "sparse-bitmask"


def find_weights(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of this format, by the name of its layer.

    Raises:
        ValueError: a part is missing, or contradicts the others.
    """
    shapes = {}
    for key in sorted(checkpoint.tensors):
        name = key.removesuffix(".bitmask")
        if name == key or checkpoint.dtype(key) != "U8":
            continue
        for part in PARTS:
            if name + part not in checkpoint.tensors:
                raise ValueError(f"flash_llm: the checkpoint has {key}, but no {name + part}")
        if len(checkpoint.shape(name + ".shape")) != 1:
            raise ValueError(f"flash_llm: {name}.shape must be one-dimensional")
        shape = tuple(int(size) for size in checkpoint.tensor(name + ".shape").tolist())
        bits = checkpoint.shape(key)
        if not shape or min(shape) < 0 or bits != (*shape[:-1], (shape[-1] + 7) // 8):
            raise ValueError(
                f"flash_llm: {key} of a weight of shape {list(shape)} has shape {list(bits)}"
            )
        shapes[name] = shape
    return shapes


def read_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the dense weight of a layer.

    Raises:
        ValueError: the number of values is not that of the bits.
    """
    bits = checkpoint.tensor(f"{name}.bitmask").numpy()
    mask = np.unpackbits(bits, axis=-1, count=shape[-1], bitorder="little").astype(bool)
    values = checkpoint.tensor(f"{name}.compressed")
    if values.shape != (int(mask.sum()),):
        raise ValueError(
            f"flash_llm: {name}.compressed must have shape [{int(mask.sum())}], as {name}.bitmask "
            f"says, got {list(values.shape)}"
        )
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[torch.from_numpy(mask)] = values
    return dense
