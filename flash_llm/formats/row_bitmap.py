"""Row bitmap, the format for CPUs: one bit per element and 16, 8 or 4 per nonzero, row by row.

A CPU reads the bits and values of a block of four rows in the order in which they are stored, and
expands 32 elements by one instruction. ``csrc/format/row_bitmap.h`` defines the bytes; this module
is their Python object.
"""

from __future__ import annotations

import dataclasses

from flash_llm.formats.bitmap import bits_and_values_bytes
from flash_llm.ops import PackedStats, PackedWeight


@dataclasses.dataclass(frozen=True)
class RowBitmapStats(PackedStats):
    """What a packed weight takes, and how evenly its nonzeros lie.

    Attributes:
        exact_bytes: what one bit per element and the values of the nonzeros would take.
        empty_blocks: blocks of four rows without a nonzero, which have no bytes in the payload.
        block_bytes_max: bytes of the largest block.
    """

    exact_bytes: int
    empty_blocks: int
    block_bytes_max: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RowBitmap(PackedWeight):
    """A weight packed as row bitmap: ``offsets`` int32[blocks + 1] in units of 16 bytes.

    About ``2 (1 - sparsity) + 0.13`` bytes per element, so it is smaller than dense 16-bit from a
    sparsity of 0.07 upwards. Values of 8 bits take half of the bytes per nonzero, and 4 bytes per
    row for the scales; int4 values a quarter, and 2 bytes per row and 128 columns. It is for CPUs:
    a weight on a GPU is packed and unpacked by the host, and unpacked again for each product.

    Example:
        >>> import torch, flash_llm
        >>> dense = torch.randn(256, 256).to(torch.bfloat16)
        >>> dense[:, ::2] = 0
        >>> w = flash_llm.RowBitmap.from_dense(dense)
        >>> w.nbytes < 0.6 * w.dense_nbytes, bool((w.to_dense() == dense).all())
        (True, True)
    """

    FORMAT = "row_bitmap"
    FORMAT_ID = 3

    def stats(self) -> RowBitmapStats:
        """Count what the buffers hold, after checking them in depth.

        Returns:
            Sizes in bytes; all zero for a weight without elements.

        Raises:
            ValueError: the weight is malformed; see :func:`flash_llm.ops.validate`.
        """
        self.validate()
        block_bytes = self._tile_bytes()
        return RowBitmapStats(
            **self._sizes(),
            exact_bytes=bits_and_values_bytes(self),
            empty_blocks=int((block_bytes == 0).sum()),
            block_bytes_max=int(block_bytes.max()) if block_bytes.numel() else 0,
        )
