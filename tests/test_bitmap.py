"""Bitmap: what only this format has: its layout, its canonical bytes, its size and its limits."""

import numpy as np
import pytest
import torch
from formats import (
    bits_of,
    chunk_places,
    chunks_of,
    from_bits,
    read,
    split_chunk,
    weights,
    without_negative_zero,
    write_chunk,
)
from hypothesis import given

import flash_llm
from flash_llm import Bitmap, _extension, testing

# At, below and above the edges of strips, chunks, halves and bands.
EDGES = [(16, 64), (17, 65), (31, 127), (32, 128), (33, 129), (511, 64), (512, 128), (513, 129)]
EDGES += [(544, 1), (1, 1100), (1024, 256), (1100, 300)]


def chunk_of(bits, row, col):
    """A chunk of a matrix, with zeros where it ends."""
    part = bits[32 * row : 32 * row + 32, 128 * col : 128 * col + 128]
    return np.pad(part, [(0, 32 - part.shape[0]), (0, 128 - part.shape[1])])


@pytest.mark.parametrize(("m", "k"), EDGES)
@pytest.mark.parametrize("pattern", testing.PATTERNS)
def test_round_trip_at_the_edges_of_chunks_and_bands(m, k, pattern, device):
    dense = testing.random_sparse(m, k, 0.5, pattern=pattern, device=device)
    packed = Bitmap.from_dense(dense)
    packed.validate()
    assert packed.offsets.numel() == -(-m // 32) * -(-k // 128) + 1
    np.testing.assert_array_equal(read(packed), bits_of(dense))
    assert torch.equal(packed.to_dense(), dense)


@pytest.mark.parametrize(
    "position", [(0, 0), (31, 127), (32, 0), (511, 130), (512, 130), (599, 299)]
)
def test_one_element_makes_one_chunk_of_one_row(position, dtype, device):
    dense = torch.zeros(600, 300, dtype=dtype, device=device)
    dense[position] = -1.5
    packed = Bitmap.from_dense(dense)
    packed.validate()
    sizes = [len(chunk) for chunk in chunks_of(packed)]
    where = sizes.index(11 * 64)
    assert sum(sizes) == 11 * 64
    assert chunk_places(600, 300)[where] == (position[0] // 32, position[1] // 128)
    np.testing.assert_array_equal(read(packed), bits_of(dense))


def test_bands_of_sixteen_chunk_rows_lie_column_after_column():
    places = chunk_places(1100, 300)
    assert places[:17] == [*((row, 0) for row in range(16)), (0, 1)]
    assert places[48:50] == [(16, 0), (17, 0)] and places[-1] == (34, 2)
    assert sorted(places) == [(row, col) for row in range(35) for col in range(3)]
    sizes = _extension.require().FORMATS["bitmap"]
    assert (sizes["tile_m"], sizes["tile_k"], sizes["unit_words"]) == (32, 128, 16)


def assert_canonical(packed, bits):
    for (row, col), chunk in zip(chunk_places(*packed.shape), chunks_of(packed), strict=True):
        expected = write_chunk(chunk_of(bits, row, col))
        np.testing.assert_array_equal(chunk, expected, err_msg=f"chunk {row}, {col}")


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("pattern", testing.PATTERNS)
def test_bytes_are_those_that_the_description_prescribes(sparsity, pattern, device):
    dense = testing.random_sparse(530, 200, sparsity, pattern=pattern, device=device)
    assert_canonical(Bitmap.from_dense(dense), bits_of(dense))


@given(weights())
def test_property_bytes_are_those_that_the_description_prescribes(weight):
    bits, dtype = weight
    assert_canonical(Bitmap.from_dense(from_bits(bits, dtype)), without_negative_zero(bits))


def test_lanes_read_from_different_banks(device):
    """Each strip's downward runs have a column each, and no two runs of a chunk share a slot."""
    for pattern in testing.PATTERNS:
        dense = testing.random_sparse(600, 300, 0.6, pattern=pattern, device=device)
        for chunk in filter(len, chunks_of(Bitmap.from_dense(dense))):
            _, _, sigma = split_chunk(chunk)
            assert not (sigma % 2).any()
            for strip in range(2):
                assert sorted(sigma[:, strip] // 4) == list(range(32))
            assert len(set(sigma.reshape(-1) // 2)) == 64


def test_a_full_chunk_has_no_padding(device):
    dense = torch.ones(512, 256, dtype=torch.float16, device=device)
    packed = Bitmap.from_dense(dense)
    assert {len(chunk) for chunk in chunks_of(packed)} == {64 * 137}
    assert torch.equal(packed.to_dense(), dense)


@pytest.mark.parametrize(("sparsity", "bound"), [(0.5, 1.10), (0.6, 1.10), (0.9, 1.35)])
def test_size_stays_near_one_bit_per_element_and_two_bytes_per_nonzero(sparsity, bound, device):
    dense = testing.random_sparse(1024, 2048, sparsity, device=device)
    stats = Bitmap.from_dense(dense).stats()
    assert stats.bytes_per_element <= bound * (2 * (1 - sparsity) + 0.125)
    assert stats.packed_bytes <= bound * stats.exact_bytes
    assert stats.packed_bytes >= stats.exact_bytes


def test_stats_count_what_a_dense_count_counts(dtype, device):
    dense = testing.random_sparse(300, 200, pattern="tiles", dtype=dtype, device=device)
    dense[128:160] = 0
    packed = Bitmap.from_dense(dense)
    stats = packed.stats()
    bits = bits_of(dense)
    sizes = [len(write_chunk(chunk_of(bits, *place))) for place in chunk_places(300, 200)]
    assert stats.nnz == packed.nnz == np.count_nonzero(bits)
    assert stats.empty_chunks == sizes.count(0) >= 2
    assert stats.chunk_bytes_max == max(sizes)
    assert stats.sparsity == pytest.approx(float((dense == 0).float().mean()))
    assert stats.dense_bytes == dense.nbytes
    assert stats.exact_bytes == 300 * 200 // 8 + 2 * stats.nnz
    assert stats.packed_bytes == packed.nbytes == 8 * 8 + 21 * 4 + sum(sizes)
    assert stats.bytes_per_element == pytest.approx(stats.packed_bytes / dense.numel())


def test_stats_of_no_chunks_and_of_empty_ones():
    stats = Bitmap.empty(0, 5).stats()
    assert (stats.exact_bytes, stats.empty_chunks, stats.chunk_bytes_max) == (0, 0, 0)
    stats = Bitmap.empty(33, 5).stats()
    assert (stats.exact_bytes, stats.empty_chunks, stats.chunk_bytes_max) == (21, 2, 0)


def test_fewest_rows_is_a_promise_of_packing_not_of_the_format():
    dense = testing.random_sparse(32, 128, 0.6)
    packed = Bitmap.from_dense(dense)
    values, bits, sigma = split_chunk(chunks_of(packed)[0])
    # One row more, between the upward and the downward run of each column and slot.
    up = np.array([[int(word).bit_count() for word in words] for words in bits[:, 0]])
    row = np.arange(len(values) + 1)[:, None, None]
    below = np.pad(values, [(0, 1), (0, 0), (0, 0)])
    above = np.pad(values, [(1, 0), (0, 0), (0, 0)])
    taller = np.where(row < up, below, np.where(row > up, above, 0)).astype("<u2")
    parts = (taller, bits, sigma.astype(np.uint8))
    payload = np.concatenate([part.reshape(-1).view(np.int32) for part in parts])
    header = packed.header._replace(payload_words=len(payload))
    offsets = packed.offsets + torch.tensor([0, 2], dtype=torch.int32)
    again = Bitmap.from_tensors(header, offsets, torch.from_numpy(payload))
    assert again.nbytes == packed.nbytes + 128
    assert torch.equal(again.to_dense(), dense)
    x = testing.small_integers(3, 128)
    assert torch.equal(flash_llm.spmm(x, again), flash_llm.spmm(x, packed))
