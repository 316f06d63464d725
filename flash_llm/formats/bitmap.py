"""Bitmap, the dense-in-bytes format: one bit per element and 16 bits per nonzero.

Chunks of 32 x 128 whose values stand where the lanes of a GPU warp want them, and chunks of
32 x 256, where zeros are many, for its sparse tensor cores. The bytes are defined in
``csrc/format/bitmap.h``; this module gives them a Python object.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flash_llm import _extension
from flash_llm.ops import PackedWeight

# Chunk rows that are stored together: kBandChunkRows.
_BAND_CHUNK_ROWS = 16


@dataclasses.dataclass(frozen=True)
class BitmapStats:
    """What a packed weight costs, and how evenly its nonzeros lie.

    Attributes:
        nnz: stored values, none of which is zero.
        sparsity: fraction of zeros in [0, 1].
        dense_bytes: bytes of the dense weight in the same dtype.
        packed_bytes: bytes of header, offsets and payload.
        bytes_per_element: ``packed_bytes`` over the number of dense elements; dense is 2.
        exact_bytes: what one bit per element and 2 bytes per nonzero would take.
        two_four_pairs: pairs of chunk columns (of 512 rows) that are stored as 2:4 chunks of
            32 x 256; all others are plain chunks of 32 x 128.
        empty_chunks: chunks without a nonzero, which take no payload.
        chunk_bytes_max: bytes of the largest chunk; a full one takes 8768.
    """

    nnz: int
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    bytes_per_element: float
    exact_bytes: int
    two_four_pairs: int
    empty_chunks: int
    chunk_bytes_max: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bitmap(PackedWeight):
    """A weight packed as Bitmap: ``offsets`` int32[chunks + 1] in units of 64 bytes.

    About ``2 (1 - sparsity) + 0.2`` bytes per element, so it is smaller than dense 16-bit from a
    sparsity of 0.1 upwards, and smaller than Tiled-CSL up to 0.9.

    Example:
        >>> import torch, flash_llm
        >>> dense = torch.randn(256, 256).to(torch.bfloat16)
        >>> dense[:, ::2] = 0
        >>> w = flash_llm.Bitmap.from_dense(dense)
        >>> w.nbytes < 0.65 * w.dense_nbytes, bool((w.to_dense() == dense).all())
        (True, True)
    """

    FORMAT = "bitmap"
    FORMAT_ID = 2

    def stats(self) -> BitmapStats:
        """Count what the buffers hold, after checking them in depth.

        Returns:
            Sizes in bytes; all zero for a weight without elements.

        Raises:
            ValueError: the weight is malformed; see :func:`flash_llm.ops.validate`.
        """
        self.validate()
        units = self.offsets.long().diff()
        column, pair = self._columns_and_pairs(units)
        # An even number of units makes a chunk 2:4, and the second chunk of its pair part of it.
        two_four = torch.zeros_like(units, dtype=torch.bool)
        two_four[pair[(units > 0) & (units % 2 == 0)]] = True
        is_part = two_four[pair] & (column % 2 == 1)
        unit_bytes = 4 * int(_extension.require().FORMATS[self.FORMAT]["unit_words"])
        elements = self.header.m * self.header.k
        return BitmapStats(
            **self._sizes(),
            exact_bytes=(elements + 7) // 8 + 2 * self.nnz,
            two_four_pairs=int(two_four.sum()),
            empty_chunks=int(((units == 0) & ~is_part).sum()),
            chunk_bytes_max=int(units.max()) * unit_bytes if units.numel() else 0,
        )

    def _columns_and_pairs(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return each stored chunk's column and which pair it is in; see ``chunk_index``."""
        sizes = _extension.require().FORMATS[self.FORMAT]
        rows = -(-self.header.m // int(sizes["tile_m"]))
        cols = -(-self.header.k // int(sizes["tile_k"]))
        index = torch.arange(units.numel(), device=units.device)
        band = index // max(_BAND_CHUNK_ROWS * cols, 1)
        height = (rows - _BAND_CHUNK_ROWS * band).clamp(max=_BAND_CHUNK_ROWS)
        column = (index - _BAND_CHUNK_ROWS * cols * band) // height
        return column, band * cols + column // 2
