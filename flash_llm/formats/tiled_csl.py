"""Tiled-CSL, the packed format of Flash-LLM (arXiv 2309.10285, section 4.3.1).

The weight is cut into tiles of 128 x 64. Each nonzero is one 32-bit entry: its value and its
position in the tile, 16 bits each. ``csrc/format/tiled_csl.h`` defines the bytes; this module is
their Python object.
"""

from __future__ import annotations

import dataclasses

import torch

from flash_llm import _extension
from flash_llm.ops import PackedStats, PackedWeight


@dataclasses.dataclass(frozen=True)
class TiledCSLStats(PackedStats):
    """What a packed weight takes, and how evenly its nonzeros lie.

    Attributes:
        padding_entries: entries that only fill the last vector of a tile.
        tile_nnz_min: nonzeros of the tile that has the fewest.
        tile_nnz_mean: mean nonzeros of a tile.
        tile_nnz_max: nonzeros of the tile that has the most; a full tile has 8192.
    """

    padding_entries: int
    tile_nnz_min: int
    tile_nnz_mean: float
    tile_nnz_max: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TiledCSL(PackedWeight):
    """A weight packed as Tiled-CSL: ``offsets`` int32[tiles + 1], one payload word per entry.

    4 bytes per nonzero, so it is smaller than dense 16-bit from a sparsity of 0.5 upwards.

    Example:
        >>> import torch, flash_llm
        >>> w = flash_llm.TiledCSL.from_dense(torch.eye(256, dtype=torch.bfloat16))
        >>> w.shape, w.nnz, w.nbytes < w.dense_nbytes
        (torch.Size([256, 256]), 256, True)
        >>> bool((w.to_dense() == torch.eye(256, dtype=torch.bfloat16)).all())
        True
    """

    FORMAT = "tiled_csl"
    FORMAT_ID = 1

    def stats(self) -> TiledCSLStats:
        """Count what the buffers hold; reads the whole payload, and checks it in depth first.

        Returns:
            Sizes in bytes and nonzeros per tile; all zero for a weight without tiles.

        Raises:
            ValueError: the weight is malformed; see :func:`flash_llm.ops.validate`.
        """
        self.validate()
        # Padding entries have the value 0. The differences of a running count of the others are the
        # nonzeros of the tiles.
        running = torch.zeros(
            self.payload.numel() + 1, dtype=torch.int64, device=self.payload.device
        )
        torch.cumsum((self.payload & 0xFFFF) != 0, dim=0, out=running[1:])
        vector_entries = int(_extension.require().FORMATS[self.FORMAT]["unit_words"])
        tile_nnz = running[self.offsets.long() * vector_entries].diff()
        num_tiles = tile_nnz.numel()
        return TiledCSLStats(
            **self._sizes(),
            padding_entries=self.header.payload_words - self.nnz,
            tile_nnz_min=int(tile_nnz.min()) if num_tiles else 0,
            tile_nnz_mean=self.nnz / num_tiles if num_tiles else 0.0,
            tile_nnz_max=int(tile_nnz.max()) if num_tiles else 0,
        )
