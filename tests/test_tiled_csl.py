"""Tiled-CSL: what only this format has: positions, banks, padding and the order of entries."""

import itertools

import numpy as np
import pytest
import torch
from formats import DTYPES, bits_of, each, from_bits, weights, without_negative_zero
from hypothesis import given
from hypothesis import strategies as st

from flash_llm import TiledCSL, _extension, testing


def test_full_tile_is_stored_without_bank_conflicts():
    packed = TiledCSL.from_dense(torch.ones(128, 64, dtype=torch.float16))
    # One store instruction of a warp writes entry e of the vectors of its 32 lanes.
    positions = (packed.payload.view(-1, 32, 4) >> 16) & 0xFFFF
    words = (positions // 2).transpose(1, 2).reshape(-1, 32)
    assert len(words) == 256
    for store in words:  # two halves of one word are no conflict
        assert len(set((store % 32).tolist())) == len(set(store.tolist()))


def test_position_functions_agree_with_each_other_and_with_the_description():
    extension = _extension.require()
    sizes = extension.FORMATS["tiled_csl"]
    assert (sizes["tile_m"], sizes["unit_words"]) == (128, 4)
    assert sizes["tile_k"] == {1: 64, 2: 64}  # by value type
    positions = set()
    for row, col in itertools.product(range(128), range(64)):
        position = extension.position_of(row, col)
        thread, chunk, half = col // 8 % 4, col // 32 * 4 + col // 2 % 4, col % 2
        assert position == 64 * row + 8 * (chunk ^ (row % 8)) + 2 * thread + half
        assert (extension.row_of_position(position), extension.col_of_position(position)) == (
            row,
            col,
        )
        positions.add(position)
    assert positions == set(range(8192))


@each("dtype", DTYPES)
def test_stats_count_what_a_dense_count_counts(dtype, device):
    dense = testing.random_sparse(300, 200, pattern="tiles", dtype=dtype, device=device)
    packed = TiledCSL.from_dense(dense)
    stats = packed.stats()
    padded = torch.nn.functional.pad(dense.float(), (0, 256 - 200, 0, 384 - 300)).cpu()
    tile_nnz = (padded.view(3, 128, 4, 64) != 0).sum(dim=(1, 3))
    assert stats.nnz == packed.nnz == int(tile_nnz.sum())
    assert stats.tile_nnz_min == int(tile_nnz.min())
    assert stats.tile_nnz_max == int(tile_nnz.max())
    assert stats.tile_nnz_mean == pytest.approx(float(tile_nnz.float().mean()))
    assert stats.padding_entries == int((-tile_nnz % 4).sum())
    assert stats.sparsity == pytest.approx(float((dense == 0).float().mean()))
    assert stats.dense_bytes == dense.nbytes
    assert stats.packed_bytes == 8 * 8 + 13 * 4 + 4 * (stats.nnz + stats.padding_entries)
    assert stats.bytes_per_element == pytest.approx(stats.packed_bytes / dense.numel())


def test_stats_of_no_tiles():
    stats = TiledCSL.empty(0, 5).stats()
    assert (stats.tile_nnz_min, stats.tile_nnz_mean, stats.tile_nnz_max) == (0, 0.0, 0)
    assert stats.padding_entries == 0


@given(weights())
def test_property_a_tile_is_padded_to_whole_vectors(weight):
    packed = TiledCSL.from_dense(from_bits(*weight))
    assert 0 <= packed.header.payload_words - packed.nnz <= 3 * (packed.offsets.numel() - 1)


@given(weights(), st.data())
def test_property_order_of_entries_in_a_tile_does_not_matter(weight, data):
    bits, dtype = weight
    packed = TiledCSL.from_dense(from_bits(bits, dtype))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    payload = packed.payload.clone().numpy()
    for first, last in itertools.pairwise(packed.offsets.tolist()):
        rng.shuffle(payload[4 * first : 4 * last])
    shuffled = TiledCSL.from_tensors(packed.header, packed.offsets, torch.from_numpy(payload))
    np.testing.assert_array_equal(bits_of(shuffled.to_dense()), without_negative_zero(bits))
