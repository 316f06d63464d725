"""Row bitmap, the format for CPUs: one bit per element and 16 bits per nonzero, row after row.

Blocks of four rows whose bits and values a CPU reads forward and expands with one instruction per
32 elements. The bytes are defined in ``csrc/format/row_bitmap.h``; this module gives them a Python
object.
"""

from __future__ import annotations

import dataclasses

from flash_llm import _extension
from flash_llm.ops import PackedWeight


@dataclasses.dataclass(frozen=True)
class RowBitmapStats:
    """What a packed weight costs, and how evenly its nonzeros lie.

    Attributes:
        nnz: stored values, none of which is zero.
        sparsity: fraction of zeros in [0, 1].
        dense_bytes: bytes of the dense weight in the same dtype.
        packed_bytes: bytes of header, offsets and payload.
        bytes_per_element: ``packed_bytes`` over the number of dense elements; dense is 2.
        exact_bytes: what one bit per element and 2 bytes per nonzero would take.
        empty_blocks: blocks of four rows without a nonzero, which take no payload.
        block_bytes_max: bytes of the largest block.
    """

    nnz: int
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    bytes_per_element: float
    exact_bytes: int
    empty_blocks: int
    block_bytes_max: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RowBitmap(PackedWeight):
    """A weight packed as row bitmap: ``offsets`` int32[blocks + 1] in units of 16 bytes.

    About ``2 (1 - sparsity) + 0.13`` bytes per element, so it is smaller than dense 16-bit from a
    sparsity of 0.07 upwards. It is for CPUs: on a GPU the host packs and unpacks it, at each
    multiplication, too.

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
        units = self.offsets.long().diff()
        unit_bytes = 4 * int(_extension.require().FORMATS[self.FORMAT]["unit_words"])
        elements = self.header.m * self.header.k
        return RowBitmapStats(
            **self._sizes(),
            exact_bytes=(elements + 7) // 8 + 2 * self.nnz,
            empty_blocks=int((units == 0).sum()),
            block_bytes_max=int(units.max()) * unit_bytes if units.numel() else 0,
        )
