"""Bitmap, the dense-in-bytes format: one bit per element and 16 bits per nonzero.

32 x 128 chunks whose values stand where the lanes of a GPU warp want them. The bytes are defined in
``csrc/core/bitmap.h``; this module gives them a Python object.
"""

from __future__ import annotations

import dataclasses

from flash_llm import _extension
from flash_llm.ops import PackedWeight


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
        empty_chunks: chunks of 32 x 128 without a nonzero, which take no payload.
        chunk_bytes_max: bytes of the largest chunk; dense it would be 8192.
    """

    nnz: int
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    bytes_per_element: float
    exact_bytes: int
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
        unit_bytes = 4 * int(_extension.require().FORMATS[self.FORMAT]["unit_words"])
        chunk_bytes = self.offsets.long().diff() * unit_bytes
        elements = self.header.m * self.header.k
        return BitmapStats(
            nnz=self.nnz,
            sparsity=self.sparsity,
            dense_bytes=self.dense_nbytes,
            packed_bytes=self.nbytes,
            bytes_per_element=self.nbytes / elements if elements else 0.0,
            exact_bytes=(elements + 7) // 8 + 2 * self.nnz,
            empty_chunks=int((chunk_bytes == 0).sum()),
            chunk_bytes_max=int(chunk_bytes.max()) if chunk_bytes.numel() else 0,
        )
