"""Bitmap, the format for the tensor cores of GPUs: one bit per element, 16 bits per nonzero.

Plain chunks of 32 x 128 elements store their values in the order in which the lanes of a GPU warp
read them. At high sparsity chunks of 32 x 256 elements, for the sparse tensor cores, replace them.
``csrc/format/bitmap.h`` defines the bytes; this module is their Python object.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flash_llm.ops import PackedStats, PackedWeight

# Chunk rows that are stored together: kBandChunkRows.
_BAND_CHUNK_ROWS = 16
# The unit of offsets and of chunk sizes: kChunkUnitBytes.
_UNIT_BYTES = 64


def bits_and_values_bytes(weight: PackedWeight) -> int:
    """Bytes of one bit for each element and the values of the nonzeros of a weight."""
    elements = weight.header.m * weight.header.k
    return (elements + 7) // 8 + weight.nnz * weight.header.value_bits // 8


@dataclasses.dataclass(frozen=True)
class BitmapStats(PackedStats):
    """What a packed weight takes, and how evenly its nonzeros lie.

    Attributes:
        exact_bytes: what one bit per element and 2 bytes per nonzero would take.
        two_four_pairs: pairs of chunk columns (of 512 rows) that are stored as 2:4 chunks of
            32 x 256; all others are stored as plain chunks of 32 x 128.
        empty_chunks: chunks without a nonzero, which have no bytes in the payload.
        chunk_bytes_max: bytes of the largest chunk; a full one takes 8768.
    """

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
        chunk_bytes = self._tile_bytes()
        column, pair = self._columns_and_pairs(chunk_bytes)
        # 2:4 chunks take an even number of units, plain ones an odd number. A 2:4 chunk
        # has the elements of both columns of its pair.
        two_four = torch.zeros_like(chunk_bytes, dtype=torch.bool)
        two_four[pair[(chunk_bytes > 0) & (chunk_bytes // _UNIT_BYTES % 2 == 0)]] = True
        is_part = two_four[pair] & (column % 2 == 1)
        return BitmapStats(
            **self._sizes(),
            exact_bytes=bits_and_values_bytes(self),
            two_four_pairs=int(two_four.sum()),
            empty_chunks=int(((chunk_bytes == 0) & ~is_part).sum()),
            chunk_bytes_max=int(chunk_bytes.max()) if chunk_bytes.numel() else 0,
        )

    def _columns_and_pairs(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column of each stored chunk and its pair; see ``chunk_index`` in C++.

        Args:
            chunks: ``[chunks]`` of any values.
        """
        tile_m, tile_k = self._tile_size(self.header.value_type)
        rows, cols = -(-self.header.m // tile_m), -(-self.header.k // tile_k)
        index = torch.arange(chunks.numel(), device=chunks.device)
        band = index // max(_BAND_CHUNK_ROWS * cols, 1)
        height = (rows - _BAND_CHUNK_ROWS * band).clamp(max=_BAND_CHUNK_ROWS)
        column = (index - _BAND_CHUNK_ROWS * cols * band) // height
        return column, band * cols + column // 2
