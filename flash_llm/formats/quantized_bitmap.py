"""Quantised bitmap, the format for GPUs of values that have scales.

It has a bit per element, and a byte or, of int4 values, a nibble per nonzero.

The values lie as a GPU's tensor cores take them, so that a kernel decodes eight elements by two
byte permutations. ``csrc/format/quantized_bitmap.h`` defines the bytes; this module is their Python
object.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from flash_llm import quantize
from flash_llm.formats.bitmap import bits_and_values_bytes
from flash_llm.ops import PackedStats, PackedWeight


@dataclasses.dataclass(frozen=True)
class QuantizedBitmapStats(PackedStats):
    """What a packed weight takes, and how evenly its nonzeros lie.

    Attributes:
        exact_bytes: what one bit per element and the values of the nonzeros would take.
        empty_chunks: chunks of 16 x 256 (int4: 16 x 512) without a nonzero, which have no values in
            the payload.
        chunk_bytes_max: bytes of the largest chunk.
    """

    exact_bytes: int
    empty_chunks: int
    chunk_bytes_max: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedBitmap(PackedWeight):
    """Quantised values packed for GPUs: ``offsets`` int32[chunks + 1] in units of 32 bytes.

    About ``1.06 (1 - sparsity) + 0.134`` bytes per element, and 4 bytes per row for the scales; of
    int4 values ``0.53 (1 - sparsity) + 0.15``, scales included.

    Example:
        >>> import torch, flash_llm
        >>> dense = torch.randn(256, 256).to(torch.float16)
        >>> dense[:, ::2] = 0
        >>> w = flash_llm.QuantizedBitmap.from_dense(dense, values="int8")
        >>> w.nbytes < 0.4 * w.dense_nbytes, (w.to_dense() - dense).abs().max().item() < 0.05
        (True, True)
    """

    FORMAT = "quantized_bitmap"
    FORMAT_ID = 5

    def stats(self) -> QuantizedBitmapStats:
        """Count what the buffers hold, after checking them in depth.

        Returns:
            Sizes in bytes; all zero for a weight without elements.

        Raises:
            ValueError: the weight is malformed; see :func:`flash_llm.ops.validate`.
        """
        self.validate()
        chunk_bytes = self._tile_bytes()
        _, tile_k = self._tile_size(self.header.value_type)
        columns = max(-(-self.header.k // tile_k), 1)
        # The first chunk of a strip has its scales, even if it has no nonzero.
        scales = math.prod(quantize.scales_shape(16, self.header.k, self.values))
        scale_bytes = scales * quantize.GRIDS[self.values].scale_dtype.itemsize
        values_from = torch.zeros_like(chunk_bytes)
        values_from[::columns] = scale_bytes
        return QuantizedBitmapStats(
            **self._sizes(),
            exact_bytes=bits_and_values_bytes(self),
            empty_chunks=int((chunk_bytes <= values_from).sum()),
            chunk_bytes_max=int(chunk_bytes.max()) if chunk_bytes.numel() else 0,
        )
