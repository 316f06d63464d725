"""The gather format as Python sees it: its sizes, and weights of several tiles."""

import numpy as np
import pytest
import torch
from formats import read

from flash_llm import Gather, testing


@pytest.mark.parametrize("shape", [(20, 8200), (1030, 40)])
def test_weights_of_several_tiles_read_as_packed(shape):
    dense = testing.random_sparse(*shape, 0.98, seed=1)
    packed = Gather.from_dense(dense)
    packed.validate()
    assert torch.equal(packed.to_dense(), dense)
    assert np.array_equal(read(packed), dense.view(torch.int16).numpy().view(np.uint16))


def test_stats_counts_bytes_of_tiles():
    dense = torch.zeros(1030, 16, dtype=torch.float16)
    dense[:2] = 1  # one slice of 4 steps: 1024 bytes of rows, 128 of quads, 64 and 384 of the slice
    stats = Gather.from_dense(dense).stats()
    assert (stats.nnz, stats.exact_bytes, stats.tile_bytes_max) == (32, 96, 1600)
    assert stats.packed_bytes == 64 + 4 * 4 + 1600
    assert Gather.from_dense(torch.zeros(0, 5, dtype=torch.float16)).stats().tile_bytes_max == 0
