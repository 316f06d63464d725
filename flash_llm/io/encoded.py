"""Read dense tensors that other tools store in several parts.

compressed-tensors wrote the format ``sparse-bitmask`` until 2026. It stores one bit for each
element and, consecutively, the values whose bit is set. Instead of a tensor ``N`` a file has
``P.shape`` (int64), ``P.bitmask`` (uint8[..., ceil(K / 8)], lowest bit first), ``P.compressed``
(the values) and ``P.row_offsets``, which follow from the bits. Up to version 0.8 the prefix P is
the full name N. Later versions store only weights; P is the layer's name, and N is ``P.weight``.

``torch.nn.utils.prune`` stores ``N_orig`` and ``N_mask`` instead of ``N`` until a mask is made
permanent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flash_llm.io.checkpoint import Checkpoint

BITMASK_FORMAT = "sparse-bitmask"
_BITMASK_PARTS = (".compressed", ".bitmask", ".shape", ".row_offsets")
_MASKED_PARTS = ("_orig", "_mask")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tensor that is stored in several parts.

    Attributes:
        parts: names of the parts; the tensor has the dtype and the file of the first one.
        shape: of the dense tensor.
        read: returns the dense tensor.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def find_encoded(checkpoint: Checkpoint) -> dict[str, Encoded]:
    """Return the tensors that are stored in parts, by the name of the dense tensor.

    Raises:
        ValueError: a part is missing or contradicts the others, or the dense tensor is stored too.
    """
    found = {**_find_bitmasks(checkpoint), **_find_masked(checkpoint)}
    for name, encoded in found.items():
        if name in checkpoint.tensors:
            raise ValueError(f"flash_llm: the files hold both {name} and {encoded.parts[0]}")
    return found


def _find_bitmasks(checkpoint: Checkpoint) -> dict[str, Encoded]:
    prefixes = [
        key.removesuffix(".bitmask")
        for key in sorted(checkpoint.tensors)
        if key.endswith(".bitmask") and checkpoint.dtype(key) == "U8"
    ]
    # The same version wrote all tensors, and every model has weights among them.
    whole_names = any(f".{prefix}".endswith(".weight") for prefix in prefixes)
    found = {}
    for prefix in prefixes:
        parts = tuple(prefix + part for part in _BITMASK_PARTS)
        for part in parts:
            if part not in checkpoint.tensors:
                raise ValueError(f"flash_llm: the checkpoint has {prefix}.bitmask, but no {part}")
        if len(checkpoint.shape(f"{prefix}.shape")) != 1:
            raise ValueError(f"flash_llm: {prefix}.shape must be one-dimensional")
        shape = tuple(int(size) for size in checkpoint.tensor(f"{prefix}.shape").tolist())
        bits = checkpoint.shape(f"{prefix}.bitmask")
        if not shape or min(shape) < 0 or bits != (*shape[:-1], (shape[-1] + 7) // 8):
            raise ValueError(
                f"flash_llm: {prefix}.bitmask has shape {list(bits)}, which does not fit a weight "
                f"of shape {list(shape)}"
            )

        def read(prefix: str = prefix, shape: tuple[int, ...] = shape) -> Tensor:
            return _read_bitmask(checkpoint, prefix, shape)

        found[prefix if whole_names else f"{prefix}.weight"] = Encoded(parts, shape, read)
    return found


def _read_bitmask(checkpoint: Checkpoint, prefix: str, shape: tuple[int, ...]) -> Tensor:
    bits = checkpoint.tensor(f"{prefix}.bitmask").numpy()
    mask = np.unpackbits(bits, axis=-1, count=shape[-1], bitorder="little").astype(bool)
    values = checkpoint.tensor(f"{prefix}.compressed")
    if values.shape != (int(mask.sum()),):
        raise ValueError(
            f"flash_llm: {prefix}.compressed must have shape [{int(mask.sum())}], one value for "
            f"each bit set in {prefix}.bitmask, got {list(values.shape)}"
        )
    dense = torch.zeros(shape, dtype=values.dtype, device="cpu")
    dense[torch.from_numpy(mask)] = values
    return dense


def _find_masked(checkpoint: Checkpoint) -> dict[str, Encoded]:
    found = {}
    for key in sorted(checkpoint.tensors):
        name = key.removesuffix("_orig")
        parts = tuple(name + part for part in _MASKED_PARTS)
        if name == key or parts[1] not in checkpoint.tensors:
            continue
        shape, mask_shape = (checkpoint.shape(part) for part in parts)
        if shape != mask_shape:
            raise ValueError(
                f"flash_llm: {parts[1]} must have shape {list(shape)}, like {key}, got "
                f"{list(mask_shape)}"
            )

        def read(parts: tuple[str, ...] = parts) -> Tensor:
            values, mask = (checkpoint.tensor(part) for part in parts)
            # Where the mask is 0, the product is -0.0 for negative and NaN for infinite values.
            return (values * mask.to(values.dtype)).masked_fill_(mask == 0, 0)

        found[name] = Encoded(parts, shape, read)
    return found
