"""Gather, a format for few tokens and 80 % zeros and more: 3 bytes per nonzero, work per nonzero.

Each nonzero is a 16-bit value and an 8-bit step in column from the nonzero that the same lane of a
warp multiplied before. ``csrc/format/gather.h`` defines the bytes; this module is their Python
object.
"""

from __future__ import annotations

import dataclasses

from flash_llm.ops import PackedStats, PackedWeight


@dataclasses.dataclass(frozen=True)
class GatherStats(PackedStats):
    """What a packed weight takes.

    Attributes:
        exact_bytes: what 3 bytes per nonzero would take.
        tile_bytes_max: bytes of the largest tile of 512 x 8192.
    """

    exact_bytes: int
    tile_bytes_max: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gather(PackedWeight):
    """A weight packed as gather: ``offsets`` int32[tiles + 1] in units of 16 bytes.

    About ``3.05 (1 - sparsity) + 0.01`` bytes per element, so it is smaller than dense 16-bit from
    a sparsity of 0.35 upwards, and than the bitmap from about 0.88.

    Example:
        >>> import torch, flash_llm
        >>> w = flash_llm.Gather.from_dense(torch.eye(256, dtype=torch.bfloat16))
        >>> w.shape, w.nnz, bool((w.to_dense() == torch.eye(256, dtype=torch.bfloat16)).all())
        (torch.Size([256, 256]), 256, True)
    """

    FORMAT = "gather"
    FORMAT_ID = 4

    def stats(self) -> GatherStats:
        """Count what the buffers hold, after checking them in depth.

        Returns:
            Sizes in bytes; all zero for a weight without elements.

        Raises:
            ValueError: the weight is malformed; see :func:`flash_llm.ops.validate`.
        """
        self.validate()
        tile_bytes = self._tile_bytes()
        return GatherStats(
            **self._sizes(),
            exact_bytes=3 * self.nnz,
            tile_bytes_max=int(tile_bytes.max()) if tile_bytes.numel() else 0,
        )
