"""Bitmap: what only this format has: its layout, its canonical bytes, its size and its limits."""

import numpy as np
import pytest
import torch
from formats import (
    DTYPES,
    SPECIAL,
    assert_same_weight,
    bits_of,
    chunk_places,
    chunks_of,
    each,
    from_bits,
    is_two_four,
    read,
    split_chunk,
    split_two_four,
    weights,
    without_negative_zero,
    write_bitmap,
)
from hypothesis import given

import flash_llm
from flash_llm import Bitmap, _extension, testing
from flash_llm.ops import PackedHeader

# At, below and above the edges of strips, chunks, halves, pairs and bands.
EDGES = [(16, 64), (17, 65), (31, 127), (32, 128), (33, 129), (511, 64), (512, 128), (513, 129)]
EDGES += [(544, 1), (1, 1100), (1024, 256), (1100, 300), (40, 255), (40, 257), (530, 640)]


def mixed_pairs(m, k, dtype=torch.float16, seed=0):
    """Bit patterns, specials among them, whose pairs of chunk columns differ in sparsity and kind.

    Some have one column full and one empty.
    """
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, (m, k), dtype=np.uint16)
    special = rng.random((m, k)) < 0.1
    bits[special] = rng.choice(SPECIAL[dtype], special.sum())
    band, pair = np.arange(m)[:, None] // 512, np.arange(k)[None, :] // 256
    choice = (seed + 5 * band + pair) % 9
    density = np.array([0.1, 1.0, 0.03, 0.5, 0.15, 0.0, 0.001, 0.25, 1.0])[choice]
    density = np.where((choice == 8) & (np.arange(k) // 128 % 2 == 0), 0.0, density)
    bits[rng.random((m, k)) >= density] = 0
    return bits


@each(("m", "k"), EDGES)
@each("pattern", testing.PATTERNS)
def test_round_trip_at_the_edges_of_chunks_and_bands(m, k, pattern, device):
    dense = testing.random_sparse(m, k, 0.5, pattern=pattern, device=device)
    packed = Bitmap.from_dense(dense)
    packed.validate()
    assert packed.offsets.numel() == -(-m // 32) * -(-k // 128) + 1
    np.testing.assert_array_equal(read(packed), bits_of(dense))
    assert torch.equal(packed.to_dense(), dense)


@each("position", [(0, 0), (31, 127), (32, 0), (511, 130), (512, 130), (599, 299)])
@each("dtype", DTYPES)
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
    assert (sizes["tile_m"], sizes["unit_words"]) == (32, 16)
    assert sizes["tile_k"] == {1: 128, 2: 128}  # by value type


def assert_canonical(packed, bits):
    expected, places = write_bitmap(bits), chunk_places(*packed.shape)
    for place, chunk, written in zip(places, chunks_of(packed), expected, strict=True):
        np.testing.assert_array_equal(chunk, written, err_msg=f"chunk {place}")


@each("sparsity", [0.0, 0.1, 0.5, 0.78, 0.9, 0.99, 1.0])
@each("pattern", testing.PATTERNS)
def test_bytes_are_those_that_the_description_prescribes(sparsity, pattern, device):
    for m, k in ((530, 200), (70, 640)):
        dense = testing.random_sparse(m, k, sparsity, pattern=pattern, device=device)
        assert_canonical(Bitmap.from_dense(dense), bits_of(dense))


@given(weights())
def test_property_bytes_are_those_that_the_description_prescribes(weight):
    bits, dtype = weight
    assert_canonical(Bitmap.from_dense(from_bits(bits, dtype)), without_negative_zero(bits))


# Odd and even numbers of columns, and a last band of one to three chunk rows.
@each(("m", "k"), [(32, 1280), (50, 1200), (530, 1153), (600, 1100)])
@each(("dtype", "seed"), zip(DTYPES, (0, 1), strict=True))
def test_pairs_choose_their_kind_on_their_own(m, k, dtype, seed, device):
    bits = mixed_pairs(m, k, dtype, seed)
    packed = Bitmap.from_dense(from_bits(bits, dtype, device))
    packed.validate()
    expected = without_negative_zero(bits)
    np.testing.assert_array_equal(read(packed), expected)
    np.testing.assert_array_equal(bits_of(packed.to_dense()), expected)
    assert_canonical(packed, expected)
    kinds = {is_two_four(chunk) for chunk in chunks_of(packed) if len(chunk)}
    assert kinds == {True, False}


@pytest.mark.gpu
@each(("m", "k"), [(32, 1280), (1100, 5000), (2049, 1153)])
def test_cpu_and_cuda_choose_the_same_kinds(m, k, dtype):
    for seed in range(9):
        dense = from_bits(mixed_pairs(m, k, dtype, seed), dtype)
        there = Bitmap.from_dense(dense.cuda())
        assert_same_weight(Bitmap.from_dense(dense), there)
        np.testing.assert_array_equal(
            bits_of(there.to_dense()), bits_of(there.to("cpu").to_dense())
        )
        # Rows that do not begin at 16-byte boundaries.
        assert_same_weight(Bitmap.from_dense(dense[:, 3:]), Bitmap.from_dense(dense.cuda()[:, 3:]))


@each("dtype", DTYPES)
def test_every_bit_pattern_survives_in_a_two_four_chunk(dtype, device):
    # At random places, 1 of 16: a few hundred groups have three or four.
    bits = np.zeros(1024 * 1024, np.uint16)
    rng = np.random.default_rng(0)
    bits[rng.choice(bits.size, 1 << 16, replace=False)] = np.arange(1 << 16)
    bits = bits.reshape(1024, 1024)
    assert (np.count_nonzero(bits.reshape(1024, 256, 4), axis=-1) > 2).sum() > 100
    packed = Bitmap.from_dense(from_bits(bits, dtype, device))
    packed.validate()
    assert packed.stats().two_four_pairs == 2 * 4
    np.testing.assert_array_equal(bits_of(packed.to_dense()), without_negative_zero(bits))
    np.testing.assert_array_equal(read(packed), without_negative_zero(bits))


def test_every_group_of_a_two_four_chunk_takes_all_patterns(device):
    # Axes: chunk, row and group within a chunk. At each place within a chunk, each of the sixteen
    # patterns stands in one of the chunks; one in 5 of the other chunks has one element there.
    rng = np.random.default_rng(0)
    draw = rng.random((32 * 32, 32, 64))
    nth = draw.argsort(axis=0).argsort(axis=0)
    group = np.where(nth < 16, nth, 0)
    alone = draw > 0.8
    group[alone] = 1 << rng.integers(0, 4, alone.sum())
    patterns = np.bitwise_or.reduce(1 << group, axis=0)
    assert (patterns == 0xFFFF).all()
    group = group.reshape(32, 32, 32, 64).transpose(0, 2, 1, 3).reshape(1024, 2048)
    bits = (group[..., None] >> np.arange(4) & 1).reshape(1024, 8192)
    bits = (bits * rng.integers(1, 0x8000, bits.shape)).astype(np.uint16)
    packed = Bitmap.from_dense(from_bits(bits, torch.float16, device))
    assert packed.stats().two_four_pairs == 2 * 32
    np.testing.assert_array_equal(bits_of(packed.to_dense()), bits)
    np.testing.assert_array_equal(read(packed), bits)


def test_version_one_is_read(device):
    """Plain chunks, which is all that version 1 had."""
    dense = testing.random_sparse(600, 300, 0.5, device=device)
    packed = Bitmap.from_dense(dense)
    assert packed.header.version == 2 and packed.stats().two_four_pairs == 0
    old = Bitmap.from_tensors(packed.header._replace(version=1), packed.offsets, packed.payload)
    assert old.header.version == 1 and torch.equal(old.to_dense(), dense)
    x = testing.small_integers(3, 300, device=device)
    assert torch.equal(flash_llm.spmm(x, old), flash_llm.spmm(x, packed))


# 1 x 2 with values 1 and -1: R = 2 rows of values, of which lane 0 has the first two.
VERSION_1_HEADER = PackedHeader(0x4D4C4C4853414C46, 1, 2, 1, 1, 2, 2, 13 * 16)


def test_version_one_golden_bytes(device):
    data = np.zeros(13 * 64, np.uint8)
    data.view("<u2")[[0, 64]] = 0x3C00, 0xBC00
    data.view("<u4")[64] = 0x00000101  # bits 8 j + q, q = 0, j = 0 and 1
    # Lanes 31 ... 0 take columns 1 ... 31 and 0 in strip 0, and 0 ... 31 in strip 1.
    data[-64:].reshape(32, 2)[:, 0] = [4 * ((32 - lane) % 32) for lane in range(32)]
    data[-64:].reshape(32, 2)[:, 1] = [4 * (31 - lane) + 2 for lane in range(32)]
    offsets = torch.tensor([0, 13], dtype=torch.int32, device=device)
    payload = torch.from_numpy(data.view(np.int32)).to(device)
    packed = Bitmap.from_tensors(VERSION_1_HEADER, offsets, payload)
    dense = torch.tensor([[1.0, -1.0]], dtype=torch.float16, device=device)
    assert torch.equal(packed.to_dense(), dense)
    # Today's packer writes the same, but for the version.
    now = Bitmap.from_dense(dense)
    assert now.header == VERSION_1_HEADER._replace(version=2)
    assert torch.equal(now.offsets, offsets) and torch.equal(now.payload, payload)


def test_lanes_read_from_different_banks(device):
    """Each strip's downward runs have a column each, and no two runs of a chunk share a slot."""
    kinds = set()
    for pattern, sparsity in ((p, s) for p in testing.PATTERNS for s in (0.6, 0.9)):
        dense = testing.random_sparse(600, 300, sparsity, pattern=pattern, device=device)
        for chunk in filter(len, chunks_of(Bitmap.from_dense(dense))):
            kinds.add(is_two_four(chunk))
            down_offsets = split_two_four(chunk)[1] if is_two_four(chunk) else split_chunk(chunk)[2]
            assert not (down_offsets % 2).any()
            for strip in range(2):
                assert sorted(down_offsets[:, strip] // 4) == list(range(32))
            assert len(set(down_offsets.reshape(-1) // 2)) == 64
    assert kinds == {True, False}


def test_a_full_chunk_has_no_padding(device):
    dense = torch.ones(512, 256, dtype=torch.float16, device=device)
    packed = Bitmap.from_dense(dense)
    assert {len(chunk) for chunk in chunks_of(packed)} == {64 * 137}
    assert packed.stats().two_four_pairs == 0
    assert torch.equal(packed.to_dense(), dense)


@each(("sparsity", "bound"), [(0.5, 1.10), (0.6, 1.10), (0.9, 1.35)])
def test_size_stays_near_one_bit_per_element_and_two_bytes_per_nonzero(sparsity, bound, device):
    dense = testing.random_sparse(1024, 2048, sparsity, device=device)
    stats = Bitmap.from_dense(dense).stats()
    assert stats.bytes_per_element <= bound * (2 * (1 - sparsity) + 0.125)
    assert stats.packed_bytes <= bound * stats.exact_bytes
    assert stats.packed_bytes >= stats.exact_bytes
    # Below 60 % zeros no pair is 2:4, at 90 % every one of 2 bands and 8 pairs.
    assert stats.two_four_pairs == (16 if sparsity == 0.9 else 0)


@each("dtype", DTYPES)
def test_stats_count_what_a_dense_count_counts(dtype, device):
    bits = mixed_pairs(600, 1700, dtype)
    bits[128:160] = 0
    dense = from_bits(without_negative_zero(bits), dtype, device)
    packed = Bitmap.from_dense(dense)
    stats = packed.stats()
    chunks, places = write_bitmap(bits_of(dense)), chunk_places(600, 1700)
    sizes = [len(chunk) for chunk in chunks]
    two_four = {
        (row // 16, col // 2)
        for (row, col), chunk in zip(places, chunks, strict=True)
        if is_two_four(chunk)
    }
    # The second chunk of a 2:4 pair is part of the first.
    empty = sum(
        not len(chunk) and not ((row // 16, col // 2) in two_four and col % 2)
        for (row, col), chunk in zip(places, chunks, strict=True)
    )
    assert stats.nnz == packed.nnz == np.count_nonzero(bits_of(dense))
    assert stats.two_four_pairs == len(two_four) > 1
    assert stats.empty_chunks == empty >= 2
    assert stats.chunk_bytes_max == max(sizes)
    assert stats.sparsity == pytest.approx(1 - stats.nnz / dense.numel())
    assert stats.dense_bytes == dense.nbytes
    assert stats.exact_bytes == 600 * 1700 // 8 + 2 * stats.nnz
    assert stats.packed_bytes == packed.nbytes == 8 * 8 + (19 * 14 + 1) * 4 + sum(sizes)
    assert stats.bytes_per_element == pytest.approx(stats.packed_bytes / dense.numel())


def test_stats_of_no_chunks_and_of_empty_ones():
    stats = Bitmap.empty(0, 5).stats()
    assert (stats.exact_bytes, stats.empty_chunks, stats.chunk_bytes_max) == (0, 0, 0)
    stats = Bitmap.empty(33, 5).stats()
    assert (stats.exact_bytes, stats.empty_chunks, stats.chunk_bytes_max) == (21, 2, 0)
    assert Bitmap.empty(33, 500).stats().empty_chunks == 8
    assert stats.two_four_pairs == Bitmap.empty(33, 500).stats().two_four_pairs == 0


def test_fewest_rows_is_a_promise_of_packing_not_of_the_format():
    dense = testing.random_sparse(32, 128, 0.6)
    packed = Bitmap.from_dense(dense)
    values, bits, down_offsets = split_chunk(chunks_of(packed)[0])
    # One row more, between the upward and the downward run of each column and slot.
    up = np.array([[int(word).bit_count() for word in words] for words in bits[:, 0]])
    row = np.arange(len(values) + 1)[:, None, None]
    below = np.pad(values, [(0, 1), (0, 0), (0, 0)])
    above = np.pad(values, [(1, 0), (0, 0), (0, 0)])
    taller = np.where(row < up, below, np.where(row > up, above, 0)).astype("<u2")
    parts = (taller, bits, down_offsets.astype(np.uint8))
    payload = np.concatenate([part.reshape(-1).view(np.int32) for part in parts])
    header = packed.header._replace(payload_words=len(payload))
    offsets = packed.offsets + torch.tensor([0, 2], dtype=torch.int32)
    again = Bitmap.from_tensors(header, offsets, torch.from_numpy(payload))
    assert again.nbytes == packed.nbytes + 128
    assert torch.equal(again.to_dense(), dense)
    x = testing.small_integers(3, 128)
    assert torch.equal(flash_llm.spmm(x, again), flash_llm.spmm(x, packed))


@each("k", [256, 1024, 1020])
@each("dtype", DTYPES)
def test_a_weight_that_was_pruned_to_two_of_four_is_stored_so(k, dtype):
    """It has no residual, and every slot is full."""
    weight = torch.randn(64, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[:, 0::4] = 0
    weight[:, 2::4] = 0
    stats = flash_llm.Bitmap.from_dense(weight).stats()
    assert stats.two_four_pairs == -(-k // 256) and stats.nnz == 32 * k
    assert torch.equal(flash_llm.Bitmap.from_dense(weight).to_dense(), weight)
